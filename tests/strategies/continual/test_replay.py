"""Replay against a literal loop, and what its memory may and may not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.run import RunResult

IMAGE = 64
"""Bytes of a digit."""

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]


def gradient(w: Any, here: Any) -> Any:
    """Of one cross entropy over the stream's batch and the memory's."""
    w = here.oracle.leaves(w)
    return here.oracle.gradient(here.loss(w, [*here.stream, *(row for draw in here.draws for row in draw)]), w)


def memories(result: RunResult, clients: int) -> list[dict[str, torch.Tensor]]:
    """The last state of record of each client."""
    store = ClientStore(result.folder / "clients", 0)
    return [store.get(k, 10**6) for k in range(clients)]


@pytest.mark.parametrize(
    ("policy", "images", "size"),
    [("reservoir", 7, 0), ("class_balanced", 7, 3), ("reservoir", 1000, 5), ("class_balanced", 1, 0)],
)
def test_equals_a_literal_loop(
    tiny_config: Configure, oracle: ModuleType, rehearsal: ModuleType, policy: str, images: int, size: int
) -> None:
    from fedcl.run import run

    overrides = {
        "strategy": ["replay"], "scenario.tasks": 3,
        "options.replay.budget": IMAGE * images + IMAGE - 1, "options.replay.policy": policy,
        "options.replay.batch_size": size, "partition.min_size": 0, "federation.epochs": 2,
    }  # fmt: skip
    config = tiny_config(overrides)
    result = run(config)
    model, memory = rehearsal.federated(oracle, config, gradient, lambda known: images, policy, (size,))
    assert oracle.distance(oracle.final(result), model) < 1e-10
    for state, rows in zip(memories(result, 3), memory.rows, strict=True):
        assert state["replay/ids"].tolist() == rows


def test_the_budget_is_never_exceeded_and_always_used(tiny_config: Configure) -> None:
    from fedcl.run import run

    config = tiny_config({"strategy": ["replay"], "options.replay.budget": 10 * IMAGE - 1})
    split = build(config).split
    for k, state in enumerate(memories(run(config), 3)):
        seen = sum(len(task[k]) for task in split.train)
        kept = state["replay/ids"]
        assert len(kept) == min(9, seen)
        assert len(set(kept.tolist())) == len(kept)
        assert set(kept.tolist()) <= set(np.concatenate([task[k] for task in split.train]).tolist())


def test_the_server_learns_only_how_many_images_are_stored(tiny: Run) -> None:
    result, plain = tiny({"strategy": ["replay"]}), tiny({"strategy": ["finetune"]})
    extra = result.summary["bytes_up"] - plain.summary["bytes_up"]
    assert extra == 2 * 3 * 8  # one int64 of each client after each task


def test_without_budget_it_is_finetune(tiny: Run, oracle: ModuleType) -> None:
    nothing = {"strategy": ["replay"], "options.replay.budget": 0}
    assert oracle.identical(oracle.final(tiny(nothing)), oracle.final(tiny({"strategy": ["finetune"]})))
    assert not oracle.identical(
        oracle.final(tiny({"strategy": ["replay"]})), oracle.final(tiny({"strategy": ["finetune"]}))
    )


def test_an_image_that_is_seen_in_several_tasks_takes_one_place(tiny: Run) -> None:
    overrides = {"strategy": ["cumulative", "replay"], "options.replay.budget": 30 * IMAGE}
    for state in memories(tiny(overrides), 3):
        kept = state["replay/ids"]
        assert len(set(kept.tolist())) == len(kept) == len(state["replay/priority"])


def test_a_client_that_is_not_sampled_remembers_all_the_same(tiny: Run) -> None:
    result = tiny({"strategy": ["replay"], "federation.participation": 0.34, "federation.rounds": 1})
    assert all(len(state["replay/ids"]) > 0 for state in memories(result, 3))


@pytest.mark.parametrize(
    "odd",
    [
        {"federation.batch_size": 1},
        {"federation.clients": 12, "partition.min_size": 0, "partition.alpha": 0.05, "data.limit": 4},
        {"data.limit": 1, "federation.clients": 2, "partition.min_size": 0},
        {"scenario.tasks": 10, "partition.min_size": 0},
    ],
    ids=["batch of one", "empty clients", "one sample a class", "one class a task"],
)
@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any], policy: str) -> None:
    result = tiny({"strategy": ["replay"], "options.replay.policy": policy, "federation.rounds": 1, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize("name", ["replay", "icarl"])
def test_a_budget_below_one_image_is_refused_and_not_run_without_memory(tiny: Run, name: str) -> None:
    with pytest.raises(UsageError, match=rf"options\.{name}\.budget={IMAGE - 1}: at least the {IMAGE} bytes") as caught:
        tiny({"strategy": [name], f"options.{name}.budget": IMAGE - 1, "federation.rounds": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("budget", -1), ("budget", "much"), ("batch_size", -1), ("policy", "herding"), ("size", 3)],
)
def test_wrong_options(tiny: Run, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["replay"], f"options.replay.{key}": value})
    assert "\n" not in str(caught.value)
    assert "options.replay" in str(caught.value)
