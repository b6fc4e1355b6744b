"""SupCon: the loss against a double loop over anchors and positives, and the strategy inside a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.losses import supervised_contrastive
from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.run import RunResult
from fedcl.strategies.contrastive.supcon import SupCon
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


def khosla(z: Tensor, labels: list[int], temperature: float) -> Tensor:
    """Equation 2, anchor by anchor; anchors without a positive are left out."""
    unit = [row / row.square().sum().sqrt() for row in z]
    total, anchors = torch.zeros((), dtype=z.dtype), 0
    for i in range(len(unit)):
        positives = [p for p in range(len(unit)) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        below = sum(torch.exp(unit[i] @ unit[a] / temperature) for a in range(len(unit)) if a != i)
        terms = [torch.log(torch.exp(unit[i] @ unit[p] / temperature) / below) for p in positives]
        total = total - sum(terms) / len(positives)
        anchors += 1
    return total / max(anchors, 1)


def drawn(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 0, 1, 0, 1],
        [0, 0, 0, 0, 1, 2],
        [3, 3],
        [2, 2, 2, 2],
        [0, 1, 2, 1],
    ],
    ids=["balanced", "lone anchors", "one pair", "one class", "one pair among three"],
)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_value_and_gradient_are_equation_2s(labels: list[int], temperature: float) -> None:
    z = drawn(len(labels))
    ours = supervised_contrastive(z, torch.tensor(labels), temperature)
    theirs = khosla(z, labels, temperature)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    (one,), (other,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_batch_of_one_class_has_a_gradient() -> None:
    z = drawn(4)
    (gradient,) = torch.autograd.grad(supervised_contrastive(z, torch.zeros(4, dtype=torch.int64), 0.1), z)
    assert float(gradient.abs().max()) > 1e-3


@pytest.mark.parametrize("labels", [[0, 1, 2], [0]])
def test_a_batch_without_positives_is_exactly_zero(labels: list[int]) -> None:
    z = drawn(len(labels))
    loss = supervised_contrastive(z, torch.tensor(labels), 0.1)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == 0
    assert not gradient.any()


def test_stacked_clients_are_the_same_as_one_by_one() -> None:
    z = torch.stack([drawn(6, seed).detach() for seed in range(3)])
    y = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])
    together = torch.func.vmap(lambda a, b: supervised_contrastive(a, b, 0.2))(z, y)
    alone = torch.stack([supervised_contrastive(a, b, 0.2) for a, b in zip(z, y, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    gradient = torch.func.vmap(torch.func.grad(lambda a, b: supervised_contrastive(a, b, 0.2)))(z, y)
    assert bool(torch.isfinite(gradient).all())
    assert not gradient[1].any()


def test_views_stand_as_blocks() -> None:
    batch = Batch(
        torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([5, 6, 7]),
        torch.tensor([10, 11, 12]), torch.tensor([0, 0, 1]),
    )  # fmt: skip
    viewed = SupCon(SupCon.Options(views=3)).prepare(batch)
    assert viewed.views == 3
    for name in ("pixels", "labels", "ids", "source"):
        first, second, third = getattr(viewed, name).reshape(3, 3)
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert torch.equal(first, getattr(batch, name).reshape(3))


@pytest.mark.parametrize("augment", [[], ["crop(2)"]])
def test_views_are_augmented_on_their_own(tiny_config: Configure, augment: list[str]) -> None:
    node = build(tiny_config({"strategy": ["supcon"], "data.augment": augment})).node
    ids = torch.arange(8)
    batch = SupCon().prepare(Batch(node.store.gather(ids), node.store.label_tensor[ids], ids, 0 * ids))
    x = node.images(batch.pixels, torch.tensor(3))
    first, second = x.split(8)
    assert torch.equal(first, second) is (not augment)


def test_weight_zero_is_finetune_on_the_same_two_views(tiny: Run, tmp_path: Path, oracle: ModuleType) -> None:
    plugin = tmp_path / "two_views.py"
    plugin.write_text(TWO_VIEWS)
    common = {"data.augment": ["crop(1)"], "model.projector": "linear", "model.projector_dim": 6}
    neutral = tiny({"strategy": ["supcon"], "options.supcon.weight": 0.0, **common})
    views = tiny({"strategy": ["two_views"], "plugins": [str(plugin)], **common})
    assert oracle.distance(oracle.final(neutral), oracle.final(views)) < 1e-12
    single = tiny({"strategy": ["finetune"], **common})
    assert oracle.distance(oracle.final(neutral), oracle.final(single)) > 1e-4


def test_a_step_moves_by_weight_times_the_gradient(tiny_config: Configure, oracle: ModuleType) -> None:
    """One plain SGD step is linear in the weight, from 0 on, and its slope is equation 2's gradient."""
    from fedcl.run import run

    one_step = {
        "strategy": ["supcon"], "scenario.tasks": 1, "federation.clients": 1,
        "federation.rounds": 1, "federation.batch_size": 256, "data.limit": 2,
        "optimiser.momentum": 0.0, "model.projector": "linear",
        "model.projector_dim": 4, "options.supcon.temperature": 0.5, "options.supcon.views": 2,
    }  # fmt: skip
    config = tiny_config(one_step)
    at_zero = oracle.final(run(tiny_config({**one_step, "options.supcon.weight": 0.0})))
    world = oracle.World.of(config)
    w = oracle.leaves(oracle.grown(world.start, world, 10))
    rows = world.held[0][0] * 2
    hidden = torch.relu(world.x[rows] @ w["encoder.1.weight"].T + w["encoder.1.bias"])
    z = hidden @ w["projector.weight"].T + w["projector.bias"]
    slope = oracle.gradient(khosla(z, [world.y[r] for r in rows], 0.5), w)
    for weight in (0.01, 3.0):
        moved = oracle.final(run(tiny_config({**one_step, "options.supcon.weight": weight})))
        for name in w:
            expected = at_zero[name] - config.optimiser.lr * weight * slope[name]
            torch.testing.assert_close(moved[name], expected, rtol=0, atol=1e-10)
    assert max(float(g.abs().max()) for g in slope.values()) > 1e-3


@pytest.mark.parametrize(
    "odd",
    [
        {"federation.batch_size": 1, "options.supcon.views": 1},
        {"federation.batch_size": 1},
        {"federation.clients": 12, "partition.min_size": 0, "partition.alpha": 0.05, "data.limit": 4},
        {"data.limit": 1, "federation.clients": 2, "partition.min_size": 0},
        {"scenario.tasks": 10, "partition.min_size": 0},
    ],
    ids=["batch of one, one view", "batch of one", "empty clients", "one sample a class", "one class a task"],
)
def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": ["supcon"], "federation.rounds": 1, "model.projector_dim": 8, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


def test_one_view_of_single_images_is_finetune(tiny: Run, oracle: ModuleType) -> None:
    alone = {"federation.batch_size": 1, "federation.rounds": 1, "model.projector": "linear"}
    ours = tiny({"strategy": ["supcon"], "options.supcon.views": 1, **alone})
    assert oracle.identical(oracle.final(ours), oracle.final(tiny({"strategy": ["finetune"], **alone})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -1.0),
        ("weight", math.inf),
        ("temperature", 0.0),
        ("views", 0),
        ("views", 1.5),
        ("tau", 1.0),
    ],
)
def test_wrong_options(tiny: Run, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["supcon"], f"options.supcon.{key}": value})
    assert "\n" not in str(caught.value)
    assert "options.supcon" in str(caught.value)


def test_a_model_without_projector_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match="projector"):
        tiny({"strategy": ["supcon"], "model.projector": "none"})
