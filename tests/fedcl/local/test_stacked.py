"""Clients trained as one stacked model against the same clients one by one, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]

CASES: dict[str, dict[str, Any]] = {
    "finetune": {"optimiser.clip": 0.1, "optimiser.schedule": "cosine", "optimiser.per": "step"},
    "whole stack": {
        "strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning", "replay"],
        "model.head_bias": False,
        "data.augment": ["crop(1)", "rotation(10)"],
    },
    "adamw": {"optimiser.name": "adamw", "optimiser.lr": 0.01, "optimiser.weight_decay": 0.1},
    "local BatchNorm": {"model.norm": "batch", "model.batch_norm": "local", "model.dropout": 0.5},
    "frozen BatchNorm": {"model.norm": "batch", "model.batch_norm": "frozen"},
    "steps": {"federation.epochs": None, "federation.steps": 5},
    "chunks": {"engine.chunk": 2},
    "empty clients": {"partition.min_size": 0, "partition.alpha": 0.1, "federation.clients": 6},
}
"""Whole runs; :mod:`test_parity` goes through all strategies, optimisers and networks."""


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


@pytest.mark.parametrize("strategy", ["finetune", "replay"])
def test_gradients_of_rounding_errors_are_no_reason_against_stacking(strategy: str, tiny: Tiny) -> None:
    """BatchNorm takes a bias before it away; Adam makes a whole step of what rounding leaves of its gradient."""
    settings = {"model.norm": "batch", "optimiser.name": "adamw", "optimiser.lr": 1.0, "federation.batch_size": 64,
                "strategy": [strategy], "engine.path": "stacked"}  # fmt: skip
    events = (tiny(settings).folder / "events.jsonl").read_text()
    assert '"event": "round"' in events
    assert '"event": "engine"' not in events


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
