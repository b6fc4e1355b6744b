"""Slow clients on the simulated clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl.config import Config
from fedcl.local.order import plan
from fedcl.settings.schema import Federation
from fedcl.streams.stragglers import Pace, is_slow, local_steps, pace

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 9), st.integers(0, 4), st.booleans(), st.integers(1, 3), st.integers(0, 7),
    st.integers(0, 2),
)  # fmt: skip
def test_planned_steps(count: int, size: int, least: int, drop: bool, epochs: int, steps: int, repeats: int) -> None:
    config = Config()
    config.federation = Federation(
        batch_size=size, batch_min=least, drop_last=drop, epochs=None if steps else epochs, steps=steps or None
    )
    if repeats:
        config.federation = Federation(
            batch_size=size, batch_min=least, drop_last=drop, epochs=1, passes="once", repeats=repeats
        )
    assert local_steps(count, config.federation) == len(plan(count, config, ("a client",))[0])


def paced(policy: str, slowdown: float, sizes: dict[int, int], *slow: int) -> Pace:
    config = Config()
    config.federation = Federation(batch_size=1, epochs=1)
    config.time.straggler_policy, config.time.slowdown = policy, slowdown
    return pace(config, sizes, frozenset(slow))


def test_who_is_late_by_hand() -> None:
    """Clients of 10, 4 and 8 steps; the last two are three times slower: they need 12 and 24 of the 10 there are."""
    sizes = {0: 10, 1: 4, 2: 8}
    assert paced("wait", 3, sizes, 1, 2) == Pace(24)
    assert paced("drop", 3, sizes, 1, 2) == Pace(10, {1: 0, 2: 0})
    assert paced("partial", 3, sizes, 1, 2) == Pace(10, {1: 3, 2: 3})
    assert paced("drop", 2, sizes, 1, 2) == Pace(10, {2: 0})  # client 1 is done in 8
    assert paced("drop", 2, sizes, 1) == Pace(10)
    assert paced("drop", 4, {1: 4}, 1) == Pace(4, {1: 0})  # alone, and late all the same
    assert paced("partial", 100, sizes, 2) == Pace(100, {2: 1})  # one step it does, whatever it takes
    assert paced("wait", 3, sizes) == Pace(10)
    assert paced("partial", 3, {}, 0) == Pace(0)


def test_slow_clients_of_a_drawn_population_are_told_one_by_one() -> None:
    config = Config()
    config.time.stragglers = 0.3
    slow = [is_slow(config, client) for client in range(2000)]
    assert 500 < sum(slow) < 700
    assert slow == [is_slow(config, client) for client in range(2000)]


EQUAL = {
    "partition.name": "iid", "partition.min_size": 0, "federation.clients": 4, "time.stragglers": 0.5,
    "time.slowdown": 2.0, "federation.epochs": 2, "strategy": ["replay"],
}  # fmt: skip
"""All clients plan 4 steps (15 images a task, batches of 8, two epochs)."""


@pytest.mark.parametrize("path", ["stacked", "sequential"])
def test_policies_in_a_run(path: str, tiny: Tiny) -> None:
    settings = {**EQUAL, "engine.path": path}
    found = {policy: tiny({**settings, "time.straggler_policy": policy}) for policy in ("wait", "partial", "drop")}
    events = {
        policy: [e for e in map(json.loads, (run.folder / "events.jsonl").open()) if e["event"] == "round"]
        for policy, run in found.items()
    }
    assert [found[p].summary["simulated_seconds"] for p in found] == [4 * 8.0, 4 * 4.0, 4 * 4.0]
    assert [sum(e["steps"] for e in events[p]) for p in found] == [4 * 16, 4 * 12, 4 * 8]
    assert events["wait"][0]["stragglers"] == []
    slow = [client for client, _ in events["drop"][0]["stragglers"]]
    assert len(slow) == 2
    assert all(e["stragglers"] == [[client, 0] for client in slow] for e in events["drop"])
    assert all(e["stragglers"] == [[client, 2] for client in slow] for e in events["partial"])
    assert events["drop"][0]["idle_clients"] == slow
    # The model was sent to all, half of them sent one back.
    down, up = [events["drop"][0][key] / events["wait"][0][key] for key in ("bytes_down", "bytes_up")]
    assert (down, up) == (1.0, 0.5)
    assert found["wait"].summary["model_sha256"] == tiny({**settings, "time.stragglers": 0.0}).summary["model_sha256"]
    assert len({run.summary["model_sha256"] for run in found.values()}) == 3


def test_a_round_of_late_clients_changes_nothing(tiny: Tiny) -> None:
    run = tiny({**EQUAL, "time.stragglers": 1.0, "time.straggler_policy": "drop", "engine.path": "stacked"})
    assert run.summary["empty_rounds"] == 4
    events = [e for e in map(json.loads, (run.folder / "events.jsonl").open()) if e["event"] == "round"]
    assert [e["steps"] for e in events] == [0] * 4
