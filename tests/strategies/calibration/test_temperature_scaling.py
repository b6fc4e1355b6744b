"""Temperature scaling: SciPy's minimum, exact sums over clients, and a head whose confidence alone changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from fedcl.errors import UsageError
from fedcl.strategies.calibration.temperature_scaling import (
    TemperatureScaling,
    best_temperature,
    negative_log_likelihood,
)


def literal(logits: Any, labels: list[int], classes: list[list[int]], t: float) -> float:
    total = 0.0
    for row, y, inside in zip(logits.tolist(), labels, classes, strict=True):
        top = max(row[c] / t for c in inside)
        total += top + math.log(sum(math.exp(row[c] / t - top) for c in inside)) - row[y] / t
    return total


def noisy(seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right more often than not."""
    make = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (60,), generator=make)
    logits = torch.randn(60, 4, generator=make, dtype=torch.float64)
    logits[torch.arange(60), labels] += 1.0
    return scale * logits, labels


@pytest.mark.parametrize("scale", [0.3, 1.0, 9.0])
def test_losses_and_the_best_temperature_are_those_of_a_plain_search(scale: float) -> None:
    logits, labels = noisy(0, scale)
    inside = torch.ones(60, 4, dtype=torch.bool)
    inside[torch.arange(60), (labels + 1) % 4] = False
    classes = [[c for c in range(4) if row[c]] for row in inside.tolist()]
    grid = torch.tensor([0.05, 1.0, 3.0])
    found = negative_log_likelihood(logits, labels, inside, grid)
    expected = [literal(logits, labels.tolist(), classes, t) for t in (0.05, 1.0, 3.0)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    theirs = minimize_scalar(
        lambda log: literal(logits, labels.tolist(), classes, math.exp(log)), bounds=(-4, 4), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    ours = best_temperature(logits, labels, inside, 0.01, 100.0)
    assert ours == pytest.approx(math.exp(theirs.x), rel=1e-4)


def test_a_likelihood_without_a_maximum_takes_the_bound_and_a_flat_one_takes_1() -> None:
    two, labels = torch.tensor([True, True]), torch.tensor([0, 1])
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert best_temperature(right, labels, two, 0.1, 10.0) == 0.1
    assert best_temperature(-right, labels, two, 0.1, 10.0) == 10.0
    assert best_temperature(torch.zeros(2, 2), labels, two, 0.1, 10.0) == 1.0
    assert best_temperature(right, labels, torch.eye(2, dtype=torch.bool), 0.1, 10.0) == 1.0


@pytest.mark.parametrize(("head", "divided"), [("linear", ("weight", "bias")), ("cosine", ("scale",))])
def test_the_evaluated_head_is_divided_by_the_temperature_of_the_servers_images(
    tiny: Any, tiny_config: Any, oracle: Any, after: Any, head: str, divided: tuple[str, ...]
) -> None:
    from fedcl.build import build

    settings = {"strategy": ["temperature_scaling"], "partition.public": 4, "model.head": head, "data.limit": 24}
    result = tiny(settings)
    found = after.ended(result, "temperature_scaling")
    plain = tiny({**settings, "strategy": ["finetune"]})
    assert oracle.identical(found.model, oracle.final(plain))
    assert result.matrix == plain.matrix
    experiment = build(tiny_config(settings))
    assert experiment.split.public is not None
    rows = torch.from_numpy(np.concatenate(experiment.split.public))
    store = experiment.node.store
    logits = experiment.node.forward(found.model, store.batch(rows, torch.float64), "eval").logits.detach()
    labels = store.label_tensor[rows].tolist()
    theirs = minimize_scalar(
        lambda log: literal(logits, labels, [list(range(10))] * len(labels), math.exp(log)),
        bounds=(math.log(0.05), math.log(20.0)), method="bounded", options={"xatol": 1e-9},
    )  # fmt: skip
    temperature = float(found.state["temperature"])
    assert temperature == pytest.approx(math.exp(theirs.x), rel=1e-4)
    assert abs(temperature - 1) > 1e-3
    for name, array in found.model.items():
        by = temperature if name in {f"head.{n}" for n in divided} else 1.0
        torch.testing.assert_close(found.evaluated[name], array / by, rtol=0, atol=1e-12)


def test_clients_sums_of_losses_find_the_grids_best(tiny: Any, tiny_config: Any, oracle: Any, after: Any) -> None:
    settings = {"strategy": ["temperature_scaling"], "options.temperature_scaling.data": "clients"}
    found = after.ended(tiny(settings), "temperature_scaling")
    world = oracle.World.of(tiny_config(settings))
    rows = [row for client in world.held[1] for row in client]
    logits = oracle.logits(found.model, world.x[rows]).detach()
    labels = [world.y[row] for row in rows]
    grid = np.exp(np.linspace(math.log(0.05), math.log(20.0), 201))
    losses = [literal(logits, labels, [list(range(10))] * len(labels), t) for t in grid]
    assert float(found.state["temperature"]) == pytest.approx(grid[int(np.argmin(losses))], rel=1e-9)
    assert 0 < int(np.argmin(losses)) < 200


def test_it_scales_the_head_that_a_stage_before_it_left(tiny: Any, after: Any, oracle: Any) -> None:
    few = {"options.ccvr.draws": 4, "options.ccvr.epochs": 2, "options.ccvr.use": "training", "partition.public": 2}
    both = after.ended(tiny({"strategy": ["ccvr", "temperature_scaling"], **few}), "temperature_scaling")
    alone = after.ended(tiny({"strategy": ["ccvr"], **few}), "ccvr")
    assert oracle.identical(both.model, alone.model)
    ratio = both.evaluated["head.weight"] * both.state["temperature"]
    torch.testing.assert_close(ratio, alone.model["head.weight"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "partition.public"),
        ({"partition.public": 2, "labels.public": False}, "partition.public"),
        ({"options.temperature_scaling.data": "clients", "federation.passes": "once"}, "seen once"),
        ({"partition.public": 2, "model.head": "nearest_mean"}, "can divide"),
    ],
)
def test_refusals(tiny: Any, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        tiny({"strategy": ["temperature_scaling"], **settings})


def test_images_seen_once_leave_the_servers_images(tiny: Any, after: Any) -> None:
    settings = {"strategy": ["temperature_scaling"], "partition.public": 2, "federation.passes": "once"}
    assert float(after.ended(tiny(settings), "temperature_scaling").state["temperature"]) > 0


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    found = tiny({"strategy": ["temperature_scaling"], "options.temperature_scaling.data": "clients", **hard})
    assert all(value is None or 0 <= value <= 1 for row in found.matrix for value in row)
    assert found.summary["status"] == "done"


@pytest.mark.parametrize(("key", "value"), [("low", 0.0), ("low", 2.0), ("high", 0.5), ("data", "test")])
def test_wrong_options(tiny: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["temperature_scaling"], f"options.temperature_scaling.{key}": value})
    assert "\n" not in str(caught.value)
    assert key.split("=")[0] in str(caught.value)


def test_the_grid_lies_between_the_bounds() -> None:
    grid = TemperatureScaling().options.grid()
    assert grid[[0, -1]].tolist() == pytest.approx([0.05, 20.0])
    assert grid[100].item() == pytest.approx(1.0)
