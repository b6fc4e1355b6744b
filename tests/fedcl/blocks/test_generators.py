"""The generator and the losses of data-free inversion against loops over single numbers in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fedcl.blocks.generators import Generator, disagreement, moments, smoothed, statistics_distance


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3), (1, 2), (4, 3, 2, 2), (2, 3, 7)])
def test_moments_are_those_of_all_numbers_of_a_channel(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    mean, var = moments(x)
    for channel in range(shape[1]):
        numbers = x[:, channel].flatten().tolist()
        middle = sum(numbers) / len(numbers)
        assert mean[channel].item() == pytest.approx(middle, abs=1e-14)
        spread = sum((n - middle) ** 2 for n in numbers) / len(numbers)
        assert var[channel].item() == pytest.approx(spread, abs=1e-14)


def test_statistics_distance_is_the_sum_of_plain_norms_over_the_layers() -> None:
    found = {name: (normal(n, seed=n), normal(n, seed=n + 9).square()) for name, n in (("a", 3), ("b.c", 2))}
    arrays = {f"{name}.running_{what}": normal(n, seed=n + 20)
              for name, n in (("a", 3), ("b.c", 2)) for what in ("mean", "var")}  # fmt: skip
    total = 0.0
    for name, both in found.items():
        for what, value in zip(("mean", "var"), both, strict=True):
            running = arrays[f"{name}.running_{what}"].tolist()
            total += math.sqrt(sum((v - r) ** 2 for v, r in zip(value.tolist(), running, strict=True)))
    assert statistics_distance(found, arrays).item() == pytest.approx(total, rel=1e-14)


def test_the_distance_of_equal_statistics_is_zero_with_a_finite_gradient() -> None:
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    arrays = {"n.running_mean": torch.zeros(2), "n.running_var": torch.ones(2)}
    value = statistics_distance({"n": (mean, torch.ones(2, dtype=torch.float64))}, arrays)
    (slope,) = torch.autograd.grad(value, mean)
    assert value.item() == 0.0
    assert bool(slope.isfinite().all())


def test_smoothing_keeps_a_share_of_what_was_and_no_gradient_to_it() -> None:
    new, old = normal(2, seed=1).requires_grad_(), normal(2, seed=2).requires_grad_()
    assert smoothed((new, new), None, 0.9) == (new, new)
    mean, var = smoothed((new, 2 * new), (old, old), 0.9)
    assert torch.allclose(mean, 0.1 * new + 0.9 * old)
    assert torch.allclose(var, 0.2 * new + 0.9 * old)
    assert torch.autograd.grad(mean.sum(), old, allow_unused=True)[0] is None
    assert torch.autograd.grad(var.sum(), new)[0].tolist() == pytest.approx([0.2, 0.2])


def literal_disagreement(student: torch.Tensor, teacher: torch.Tensor, classes: list[int]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        if max(classes, key=lambda c: s[c].item()) != max(classes, key=lambda c: t[c].item()):
            continue
        p = [torch.exp(t[c]) / sum(torch.exp(t[k]) for k in classes) for c in classes]
        q = [torch.exp(s[c]) / sum(torch.exp(s[k]) for k in classes) for c in classes]
        total = total - sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [1, 3], [2]])
def test_disagreement_and_its_gradients(classes: list[int]) -> None:
    s, t = normal(12, 4, seed=3).requires_grad_(), normal(12, 4, seed=4).requires_grad_()
    found = disagreement(s, t, torch.tensor([c in classes for c in range(4)]))
    expected = literal_disagreement(s, t, classes)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    slopes, literal = torch.autograd.grad(found, [s, t]), torch.autograd.grad(expected, [s, t])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(slopes, literal, strict=True))
    assert (found.item() < -1e-3) == (len(classes) > 1), "one class leaves nothing to disagree on"


def test_where_the_student_errs_nothing_is_to_be_gained() -> None:
    s, t = torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 0.0]])
    assert disagreement(s, t, torch.tensor([True, True])).item() == 0.0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 10, 7), (1, 3, 1)])
def test_generator_makes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = Generator(shape, latent=5, width=2)(z)
    assert images.shape == (2, *shape)
    assert 0 < images.min().item() < images.max().item() < 1
    (slope,) = torch.autograd.grad(images.square().sum(), z)
    assert bool(slope.any())
