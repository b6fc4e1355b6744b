"""Heads that grow by 1, 7 and 2 classes, under every strategy of this package and every optimiser."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch

from fedcl import registry
from fedcl.records.checkpoint import load_newest
from fedcl.run import RunResult

Run = Callable[[Mapping[str, Any]], RunResult]

GROWING = {
    "scenario.base": 1, "scenario.increment": 7, "data.limit": 8, "partition.name": "iid",
    "partition.min_size": 0, "federation.rounds": 1, "engine.dtype": "float32", "optimiser.lr": 0.01,
    "model.projector_dim": 4,
}  # fmt: skip
"""Tasks of 1, 7 and 2 classes."""
STILL = {"optimiser.lr": 1e-300, "optimiser.momentum": 0.0, "engine.dtype": "float64"}
"""Steps that are too small to change a double."""


def names() -> list[str]:
    """Every strategy that the package itself registers."""
    from importlib.metadata import entry_points

    found = entry_points(group="fedcl.strategies")
    return sorted(point.name for point in found if point.value.startswith("fedcl."))


def arrays(result: RunResult) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint."""
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    return found.arrays


SOME = ("ditto", "fedewc", "finetune", "gpfl", "moon", "replay", "simsiam", "supcon")
"""Those that are run with every optimiser: with states, memories and modules of several kinds."""
IDLE = {"gdumb"}
"""Those that train nothing in a round of the stream."""


@pytest.mark.parametrize(
    ("name", "optimiser"), [(n, "sgd") for n in names()] + [(n, o) for n in SOME for o in ("adam", "adamw")]
)
def test_every_strategy_and_optimiser(tiny: Run, name: str, optimiser: str) -> None:
    needed = registry.load("strategies", name).tried_with
    result = tiny({"strategy": [name], "optimiser.name": optimiser, **GROWING, "model.width": 16, **needed})
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert [len(e["accuracy"]) for e in events if e["event"] == "task"] == [3, 3, 3]
    assert name in IDLE or all(e["steps"] > 0 for e in events if e["event"] == "round")
    assert result.summary["status"] == "done"
    assert all(v is not None and 0 <= v <= 1 for t, row in enumerate(result.matrix) for v in row[: t + 1])
    found = arrays(result)
    heads = [a for n, a in found.items() if n.startswith("model/head.") and a.dim()]
    assert heads
    assert all(len(a) == 10 for a in heads)
    assert all(bool(torch.isfinite(a).all()) for a in found.values() if a.is_floating_point())
    for key, array in found.items():
        model = key.split("/", 3)[-1] if key.startswith("strategy/") else ""
        if f"model/{model}" in found:  # state that is shaped like a parameter grows with it
            shape = found[f"model/{model}"].shape
            assert array.shape[array.dim() - len(shape) :] == shape


@pytest.mark.parametrize("name", ["finetune", "replay", "supcon", "joint"])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_class_starts_the_same_whenever_it_arrives(tiny: Run, oracle: ModuleType, name: str, optimiser: str) -> None:
    still = {**GROWING, **STILL, "strategy": [name], "optimiser.name": optimiser}
    schedules = [
        {"scenario.order": "natural"},
        {"scenario.order": "natural", "scenario.base": 3, "scenario.increment": 2},
        {"scenario.order": "given", "scenario.classes": list(range(9, -1, -1))},
        {"scenario.order": "natural", "model.head_allocate": "all"},
    ]
    models = [oracle.final(tiny({**still, **schedule})) for schedule in schedules]
    for n, array in models[0].items():
        per_class = n.startswith("head.")
        assert torch.equal(models[1][n], array)
        assert torch.equal(models[2][n].flip(0) if per_class else models[2][n], array)
        assert torch.equal(models[3][n], array)
    weight = models[0]["head.weight"]
    assert len({tuple(row) for row in weight.tolist()}) == 10


def test_rows_of_old_classes_are_trained_on_and_not_drawn_again(tiny: Run, oracle: ModuleType) -> None:
    first = {"data.limit": 8, "scenario.tasks": 1, "strategy": ["finetune"], "scenario.order": "natural"}
    two = {**first, "scenario.tasks": 2}
    drawn = oracle.final(tiny({**first, **STILL}))["head.weight"]
    both = tiny(two)
    base = torch.from_numpy(load_base(both))
    after = oracle.final(both)["head.weight"]
    assert base.shape == (5, 8)
    assert not torch.equal(base, drawn[:5])
    assert not torch.equal(after[:5], base)
    still = oracle.final(tiny({**two, **STILL}))["head.weight"]
    assert torch.equal(still, drawn)


def load_base(result: RunResult) -> Any:
    """The head's weight after the first task."""
    from safetensors.numpy import load_file

    return load_file(result.folder / "base.safetensors")["head.weight"]


@pytest.mark.parametrize("head", ["cosine", "nearest_mean"])
def test_other_heads_grow_too(tiny: Run, oracle: ModuleType, head: str) -> None:
    model = oracle.final(tiny({"strategy": ["finetune"], **GROWING, "model.head": head}))
    assert model["head.weight"].shape == (10, 8)
    assert all(bool(torch.isfinite(a).all()) for a in model.values())
