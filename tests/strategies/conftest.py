"""What tests of losses between views share: runs that prove where in training such a loss stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.config import Config
from fedcl.run import RunResult, run

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]

TWO_VIEWS = """
from fedcl.strategy import Strategy


class TwoViews(Strategy):
    name = "two_views"

    def prepare(self, batch):
        return batch.repeat(2)
"""


@pytest.fixture
def equals_two_views(tiny: Run, tmp_path: Path, oracle: ModuleType) -> Callable[[str], None]:
    """``equals_two_views(name)``: with weight 0 the strategy is finetuning on two views, with its own weight not."""

    def check(name: str) -> None:
        plugin = tmp_path / "two_views.py"
        plugin.write_text(TWO_VIEWS)
        common = {
            "data.augment": ["crop(1)"], "model.projector": "linear", "model.projector_dim": 6, "optimiser.clip": 1.0,
        }  # fmt: skip
        neutral = oracle.final(tiny({"strategy": [name], f"options.{name}.weight": 0.0, **common}))
        views = oracle.final(tiny({"strategy": ["two_views"], "plugins": [str(plugin)], **common}))
        shared = {n: neutral[n] for n in views}
        assert oracle.distance(shared, views) < 1e-12
        own = oracle.final(tiny({"strategy": [name], **common}))
        assert oracle.distance({n: own[n] for n in views}, views) > 1e-4

    return check


ONE_STEP: dict[str, Any] = {
    "scenario.tasks": 1, "federation.clients": 1, "federation.rounds": 1, "federation.batch_size": 256,
    "data.limit": 4, "optimiser.momentum": 0.0, "model.projector": "linear", "model.projector_dim": 4,
    "data.augment": ["crop(1)"],
}  # fmt: skip
"""One client with 40 images takes one step of plain SGD a round, on two views that differ."""


@pytest.fixture
def one_step() -> dict[str, Any]:
    """Settings of a run whose one client takes one step of plain SGD a round, on two views of its 40 images."""
    return dict(ONE_STEP)


@pytest.fixture
def shown(tiny_config: Configure, oracle: ModuleType) -> Callable[..., Tensor]:
    """``shown(settings, round)``: the images (80, d) of the step of a round, image i in the rows i and i + 40."""

    def images(settings: Mapping[str, Any], round: int = 0) -> Tensor:
        config = tiny_config(settings)
        rows = oracle.World.of(tiny_config({**settings, "labels.rate": 1.0})).held[0][0]
        key = (config.seed, "client", 0, 0, round)
        order = torch.from_numpy(counter.permutation(len(rows), *key, "order", 0))
        node = build(config).node
        pixels = node.store.gather(torch.tensor(rows)[order].repeat(2))
        x = node.images(pixels, counter.step_seed(torch.tensor(counter.fold(*key)), torch.tensor(0))).flatten(1)
        assert not torch.equal(x[: len(rows)], x[len(rows) :])
        return x

    return images


@pytest.fixture
def moves_by(tiny_config: Configure, oracle: ModuleType, shown: Callable[..., Tensor]) -> Callable[..., None]:
    """``moves_by(name, loss, rate, settings)``: a step is linear in the weight, its slope the gradient of ``loss``.

    ``loss`` is of the embeddings of both views (80, 4) and the model's parameters; ``rate`` of the images have a label
    (0 or 1).
    """

    def check(
        name: str,
        loss: Callable[[Tensor, dict[str, Tensor]], Tensor],
        rate: float,
        own: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        settings = {**ONE_STEP, "strategy": [name], "labels.rate": rate, **own}
        config = tiny_config(settings)
        at_zero = oracle.final(run(tiny_config({**settings, f"options.{name}.weight": 0.0})))
        world = oracle.World.of(config)
        start = {n: a for n, a in world.start.items() if not n.rpartition(".")[2].startswith(("running_", "num_"))}
        w = oracle.leaves(oracle.grown(start, world, 10))
        hidden = torch.relu(shown(settings) @ w["encoder.1.weight"].T + w["encoder.1.bias"])
        slope = oracle.gradient(loss(hidden @ w["projector.weight"].T + w["projector.bias"], w), w)
        moved = oracle.final(run(tiny_config({**settings, f"options.{name}.weight": 3.0})))
        for array in w:
            expected = at_zero[array] - config.optimiser.lr * 3.0 * slope[array]
            torch.testing.assert_close(moved[array], expected, rtol=1e-9, atol=1e-10)
        assert max(float(g.abs().max()) for g in slope.values()) > 1e-3

    return check


ODD: dict[str, dict[str, Any]] = {
    "empty clients": {
        "federation.clients": 12, "partition.min_size": 0, "partition.alpha": 0.05, "data.limit": 4,
    },
    "one image a class": {"data.limit": 1, "federation.clients": 2, "partition.min_size": 0},
    "one class a task": {"scenario.tasks": 10, "partition.min_size": 0},
    "last batch of one": {"federation.batch_size": 2, "data.limit": 3, "partition.min_size": 0},
}  # fmt: skip


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings in which clients have few images, classes or batches."""
    return {"federation.rounds": 1, "model.projector_dim": 8, **ODD[request.param]}
