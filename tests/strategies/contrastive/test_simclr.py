"""SimCLR: the loss against a double loop over views, and the strategy inside runs with and without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.losses import nt_xent
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.run import RunResult, run
from fedcl.strategies.contrastive.simclr import SimCLR
from fedcl.strategy import Batch

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]

TWO_VIEWS = """
from fedcl.strategy import Strategy


class TwoViews(Strategy):
    name = "two_views"

    def prepare(self, batch):
        return batch.repeat(2)
"""


def chen(z: Tensor, temperature: float) -> Tensor:
    """Equation 1, row by row: rows i and i + B/2 are the two views of an image."""
    unit = [row / row.square().sum().sqrt() for row in z]
    half, total = len(z) // 2, torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        other = i + half if i < half else i - half
        below = sum(torch.exp(unit[i] @ unit[k] / temperature) for k in range(len(z)) if k != i)
        total = total - torch.log(torch.exp(unit[i] @ unit[other] / temperature) / below)
    return total / len(z)


def drawn(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_value_and_gradient_are_equation_1s(images: int, temperature: float) -> None:
    z = drawn(2 * images)
    ours, theirs = nt_xent(z, 2, temperature), chen(z, temperature)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    (one,), (other,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_one_view_has_no_positive() -> None:
    assert nt_xent(drawn(6), 1).item() == 0


def test_weight_zero_is_finetune_on_the_same_two_views(tiny: Run, tmp_path: Path, oracle: ModuleType) -> None:
    plugin = tmp_path / "two_views.py"
    plugin.write_text(TWO_VIEWS)
    common = {"data.augment": ["crop(1)"], "model.projector": "linear", "model.projector_dim": 6}
    neutral = tiny({"strategy": ["simclr"], "options.simclr.weight": 0.0, **common})
    views = tiny({"strategy": ["two_views"], "plugins": [str(plugin)], **common})
    assert oracle.distance(oracle.final(neutral), oracle.final(views)) < 1e-12
    assert oracle.distance(oracle.final(neutral), oracle.final(tiny({"strategy": ["simclr"], **common}))) > 1e-4


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_step_moves_by_the_gradient_of_equation_1(rate: float, tiny_config: Configure, oracle: ModuleType) -> None:
    """One plain SGD step over all images, labelled or not, is linear in the weight; its slope is the gradient."""
    one_step = {
        "strategy": ["simclr"], "scenario.tasks": 1, "federation.clients": 1, "federation.rounds": 1,
        "federation.batch_size": 256, "data.limit": 4, "optimiser.momentum": 0.0, "model.projector": "linear",
        "model.projector_dim": 4, "labels.rate": rate,
    }  # fmt: skip
    config = tiny_config(one_step)
    at_zero = oracle.final(run(tiny_config({**one_step, "options.simclr.weight": 0.0})))
    world = oracle.World.of(tiny_config({**one_step, "labels.rate": 1.0}))
    w = oracle.leaves(oracle.grown(world.start, world, 10))
    rows = world.held[0][0] * 2
    assert len(rows) == 80
    hidden = torch.relu(world.x[rows] @ w["encoder.1.weight"].T + w["encoder.1.bias"])
    slope = oracle.gradient(chen(hidden @ w["projector.weight"].T + w["projector.bias"], 0.5), w)
    for weight in (0.01, 3.0):
        moved = oracle.final(run(tiny_config({**one_step, "options.simclr.weight": weight})))
        for name in w:
            expected = at_zero[name] - config.optimiser.lr * weight * slope[name]
            torch.testing.assert_close(moved[name], expected, rtol=0, atol=1e-10)
    assert max(float(g.abs().max()) for g in slope.values()) > 1e-3


def test_without_labels_the_head_stays_as_it_was(tiny: Run, moved: Callable[[RunResult], set[str]]) -> None:
    found = moved(tiny({"strategy": ["simclr"], "labels.rate": 0.0}))
    assert not any(name.startswith("head.") for name in found)
    assert any(name.startswith("encoder.") for name in found)
    assert any(name.startswith("projector.") for name in found)


def test_views_stand_as_blocks() -> None:
    batch = Batch(
        torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([5, 6, -1]),
        torch.tensor([10, 11, 12]), torch.tensor([0, 0, 1]), hidden=(1,),
    )  # fmt: skip
    viewed = SimCLR(SimCLR.Options(views=3)).prepare(batch)
    assert viewed.views == 3
    assert viewed.labelled().tolist() == [0, 1, 3, 4, 6, 7]
    assert viewed.at(viewed.labelled()).labels.tolist() == [5, 6] * 3


@pytest.mark.parametrize(
    "odd",
    [
        {"federation.clients": 12, "partition.min_size": 0, "partition.alpha": 0.05, "data.limit": 4},
        {"data.limit": 1, "federation.clients": 2, "partition.min_size": 0},
        {"scenario.tasks": 10, "partition.min_size": 0},
    ],
    ids=["empty clients", "one image a class", "one class a task"],
)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any], rate: float) -> None:
    result = tiny(
        {"strategy": ["simclr"], "federation.rounds": 1, "model.projector_dim": 8, "labels.rate": rate, **odd}
    )
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -1.0), ("weight", math.inf), ("temperature", 0.0), ("views", 0), ("views", 1), ("views", 1.5),
        ("tau", 1.0),
    ],
)  # fmt: skip
def test_wrong_options(tiny: Run, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["simclr"], f"options.simclr.{key}": value})
    assert "\n" not in str(caught.value)
    assert "options.simclr" in str(caught.value)


def test_one_image_a_step_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match=r"federation\.batch_size.*compares the images"):
        tiny({"strategy": ["simclr"], "federation.batch_size": 1})
    none = {"options.simclr.weight": 0.0, "options.simclr.views": 1}
    tiny({"strategy": ["simclr"], "federation.batch_size": 1, "federation.rounds": 1, **none})


def test_a_model_without_projector_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match="projector"):
        tiny({"strategy": ["simclr"], "model.projector": "none"})
