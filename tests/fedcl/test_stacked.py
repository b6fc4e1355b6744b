"""Clients trained as one stacked model against the same clients one by one, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]

CASES: dict[str, dict[str, Any]] = {
    "finetune": {},
    "finetune_masked": {"strategy": ["finetune_masked"]},
    "fedprox": {"strategy": ["fedprox"], "options.fedprox.mu": 0.5},
    "fedlwf": {"strategy": ["fedlwf"]},
    "fedewc": {"strategy": ["fedewc"]},
    "replay": {"strategy": ["replay"], "options.replay.budget": 640},
    "nearest_mean": {"strategy": ["nearest_mean"]},
    "supcon": {"strategy": ["supcon"], "data.augment": ["crop(1)", "rotation(10)"]},
    "weight_aligning": {"strategy": ["weight_aligning"], "model.head_bias": False},
    "whole stack": {"strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning"], "model.head_bias": False},
    "adam": {"optimiser.name": "adam", "optimiser.lr": 0.01},
    "adamw": {"optimiser.name": "adamw", "optimiser.lr": 0.01, "optimiser.weight_decay": 0.1},
    "clipping": {"optimiser.clip": 0.1},
    "dropout": {"model.dropout": 0.5},
    "a schedule over steps": {"optimiser.schedule": "cosine", "optimiser.per": "step"},
    "BatchNorm": {"model.norm": "batch", "federation.batch_min": 2},
    "local BatchNorm": {"model.norm": "batch", "model.batch_norm": "local", "federation.batch_min": 2},
    "steps": {"federation.epochs": None, "federation.steps": 5},
    "chunks": {"engine.chunk": 2},
    "empty clients": {"partition.min_size": 0, "partition.alpha": 0.1, "federation.clients": 6},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same(case: str, tiny: Tiny) -> None:
    common = {"partition.alpha": 0.4, **({} if case == "steps" else {"federation.epochs": 2}), **CASES[case]}
    alone = tiny({**common, "engine.path": "sequential"})
    together = tiny({**common, "engine.path": "stacked"})
    first, second = alone.model.state_dict(), together.model.state_dict()
    assert first.keys() == second.keys()
    for name, array in first.items():
        difference = (array.double() - second[name].double()).norm()
        assert difference <= 1e-8 * max(1.0, float(array.double().norm())), name
    assert alone.matrix == together.matrix
    for key in ("bytes_up", "bytes_down", "dropped_images", "empty_rounds"):
        assert alone.summary[key] == together.summary[key]


def test_one_step_agrees_to_the_last_bits(tiny: Tiny) -> None:
    common = {
        "federation.rounds": 1,
        "federation.epochs": None,
        "federation.steps": 1,
        "scenario.tasks": 1,
        "optimiser.momentum": 0.0,
    }
    alone = tiny({**common, "engine.path": "sequential"}).model.state_dict()
    together = tiny({**common, "engine.path": "stacked"}).model.state_dict()
    for name, array in alone.items():
        assert (array - together[name]).norm() <= 1e-12 * array.norm(), name


def test_a_stacked_run_repeats_itself(tiny: Tiny) -> None:
    settings = {"engine.path": "stacked", "strategy": ["fedlwf", "replay"]}
    first, second = tiny(settings).summary, tiny(settings).summary
    assert first["model_sha256"] == second["model_sha256"]
    assert first["state_sha256"] == second["state_sha256"]
    assert tiny({**settings, "seed": 1}).summary["model_sha256"] != first["model_sha256"]


def test_nan_names_the_client(tiny: Tiny) -> None:
    from fedcl.errors import RunFailed

    with pytest.raises(RunFailed, match=r"client \d+: the loss is not finite"):
        tiny({"engine.path": "stacked", "optimiser.lr": 1e200})
