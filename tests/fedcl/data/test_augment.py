"""Batched augmentation: counter-based, the same alone and under vmap, each transform against an oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as oracle
from torchvision.transforms.functional import InterpolationMode

from fedcl.data.augment import TRANSFORMS, Augmentation, Draws, augment, parse_augmentations
from fedcl.errors import UsageError

EVERY = ["crop(2)", "flip", "jitter(0.4 0.8)", "grayscale(0.5)", "blur", "rotation(20)", "resized_crop(0.3)"]
LISTS = [[name] for name in EVERY] + [["standard"], ["simclr"], EVERY]


def batch(count: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    values = np.random.default_rng(channels).random((16, channels, 12, 10))
    return torch.from_numpy(values[:count]).to(dtype)


def seed(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("texts", LISTS)
def test_a_row_does_not_depend_on_the_batch(texts: list[str], channels: int) -> None:
    specs = parse_augmentations(texts)
    few, many = augment(batch(2, channels), specs, seed(5)), augment(batch(3, channels), specs, seed(5))
    assert torch.equal(few, many[:2])
    assert few.shape == (2, channels, 12, 10)
    assert few.min() >= 0
    assert few.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("texts", LISTS)
def test_vmap_over_clients_equals_one_by_one(texts: list[str], channels: int) -> None:
    specs = parse_augmentations(texts)
    clients = torch.stack([batch(4, channels, torch.float64).roll(k, 0) for k in range(3)])
    seeds = torch.tensor([3, 4, 2**31])
    stacked = torch.func.vmap(lambda x, s: augment(x, specs, s), randomness="error")(clients, seeds)
    for k in range(3):
        torch.testing.assert_close(stacked[k], augment(clients[k], specs, seeds[k]), atol=1e-12, rtol=0)
    if texts != ["grayscale(0.5)"] or channels == 3:
        assert not torch.equal(stacked[0], clients[0])


@pytest.mark.parametrize("texts", LISTS)
def test_seeds_views_and_rows_draw_differently(texts: list[str]) -> None:
    specs = parse_augmentations(texts)
    same = batch(1).expand(16, -1, -1, -1)
    out = augment(same, specs, seed(0))
    assert torch.equal(out, augment(same, specs, seed(0)))
    assert not torch.equal(out, augment(same, specs, seed(1)))
    assert not torch.equal(out, augment(same, specs, seed(0), view=1))
    assert not torch.equal(out[0].expand_as(out), out)


def test_the_same_transform_twice_draws_twice() -> None:
    once = parse_augmentations(["flip"])
    twice = augment(batch(16), once * 2, seed(0))
    assert not torch.equal(twice, batch(16))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    augment(batch(4), parse_augmentations(EVERY), seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_float32_and_float64_draw_the_same_numbers() -> None:
    specs = parse_augmentations(EVERY)
    double = augment(batch(8, 3, torch.float64), specs, seed(1))
    torch.testing.assert_close(augment(batch(8), specs, seed(1)).double(), double, atol=2e-5, rtol=0)


class Fixed(Draws):
    """Draws that a test chooses, by name; all others are in the middle of their range."""

    def __init__(self, **values: float) -> None:
        self.values = values

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.full((4,), self.values.get(name, 0.0 if name == "happens" else (low + high) / 2)).double()

    def integers(self, name: str, bound: int) -> Tensor:
        return torch.full((4,), int(self.values[name]))


def run(name: str, values: tuple[float, ...], draws: Draws, x: Tensor) -> Tensor:
    return TRANSFORMS[name][0](x, draws, values)


X = batch(4, 3, torch.float64)


def test_crop_moves_and_pads_with_black() -> None:
    out = run("crop", (2,), Fixed(down=4, right=1), X)
    assert torch.equal(out[:, :, :10, 1:], X[:, :, 2:, :9])
    assert not out[:, :, 10:].any()
    assert not out[:, :, :, :1].any()
    assert torch.equal(run("crop", (2,), Fixed(down=2, right=2), X), X)


def test_crop_reaches_every_place_and_none_outside() -> None:
    image = torch.zeros(400, 1, 9, 9)
    image[:, :, 4, 4] = 1
    out = augment(image, parse_augmentations(["crop"]), seed(0))
    places = {tuple(row[2:]) for row in out.nonzero().tolist()}
    assert places == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}


def test_flip() -> None:
    assert torch.equal(run("flip", (0.5,), Fixed(happens=0.4), X), X.flip(-1))
    assert torch.equal(run("flip", (0.5,), Fixed(happens=0.6), X), X)
    share = (
        augment(torch.arange(2.0).expand(2000, 1, 2, 2), parse_augmentations(["flip(0.3)"]), seed(0))[:, 0, 0, 0]
    ).mean()
    assert abs(float(share) - 0.3) < 0.05


def test_jitter_against_torchvision() -> None:
    draws = Fixed(brightness=0.7, contrast=1.3, saturation=0.6)
    expected = oracle.adjust_saturation(oracle.adjust_contrast(oracle.adjust_brightness(X, 0.7), 1.3), 0.6)
    torch.testing.assert_close(run("jitter", (0.4, 1.0), draws, X), expected, atol=1e-3, rtol=0)
    grey = X[:, :1]
    expected = oracle.adjust_contrast(oracle.adjust_brightness(grey, 0.7), 1.3)
    torch.testing.assert_close(run("jitter", (0.4, 1.0), draws, grey), expected, atol=1e-6, rtol=0)


def test_grayscale_against_torchvision() -> None:
    expected = oracle.rgb_to_grayscale(X, 3)
    torch.testing.assert_close(run("grayscale", (1.0,), Fixed(), X), expected, atol=1e-3, rtol=0)
    assert torch.equal(run("grayscale", (1.0,), Fixed(), X[:, :1]), X[:, :1])


def test_blur_against_torchvision() -> None:
    expected = oracle.gaussian_blur(X, [5, 5], [0.8, 0.8])
    torch.testing.assert_close(run("blur", (1.0, 1.0), Fixed(sigma=0.8), X), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("degrees", [0.0, 11.0, 90.0, -30.0])
def test_rotation_against_torchvision(degrees: float) -> None:
    expected = oracle.rotate(X, degrees, InterpolationMode.BILINEAR)
    out = run("rotation", (180.0,), Fixed(angle=math.radians(degrees)), X)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_resized_crop() -> None:
    whole = Fixed(area=1.0, aspect=0.0)
    torch.testing.assert_close(run("resized_crop", (0.1,), whole, X), X, atol=1e-12, rtol=0)
    quarter = Fixed(area=0.25, aspect=0.0, right=-1.0, down=1.0)
    expected = oracle.resized_crop(X, 6, 0, 6, 5, [12, 10], InterpolationMode.BILINEAR, antialias=False)
    out = run("resized_crop", (0.1,), quarter, X)
    # away from the border: the box shows what lies beyond it, a cut box repeats its edge
    torch.testing.assert_close(out[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-6, rtol=0)

    # half the width and all of the height: e^aspect = 1/2, no room to move up or down
    tall = Fixed(area=0.5, aspect=math.log(0.5), right=-1.0, down=1.0)
    expected = oracle.resized_crop(X, 0, 0, 12, 5, [12, 10], InterpolationMode.BILINEAR, antialias=False)
    out = run("resized_crop", (0.1,), tall, X)
    torch.testing.assert_close(out[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-6, rtol=0)


def test_parse() -> None:
    assert parse_augmentations([]) == ()
    assert parse_augmentations(["jitter( 0.4, 0.8 )"]) == (Augmentation("jitter", (0.4, 0.8)),)
    assert parse_augmentations(["jitter(0.3)", "crop"])[1] == Augmentation("crop", (0,))
    assert [a.name for a in parse_augmentations(["standard", "blur"])] == ["crop", "flip", "blur"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crpo", "Did you mean 'crop'"),
        ("crop(x)", "whole number"),
        ("crop(1.5)", "whole number"),
        ("crop(-1)", "from 0 to"),
        ("flip(1.2)", "from 0 to 1"),
        ("flip(nan)", "from 0 to 1"),
        ("flip(0.1 0.2)", "at most 1 number"),
        ("standard(3)", "takes no numbers"),
        ("crop(4", "NAME"),
        ("", "NAME"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_augmentations([text])
    assert caught.value.key == "data.augment"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["crop(10)", "blur(5)"])
def test_a_transform_larger_than_the_image(text: str) -> None:
    with pytest.raises(UsageError, match="12x10"):
        augment(batch(2), parse_augmentations([text]), seed(0))
