"""Bytes: the meter's rules one by one, then whole tiny runs counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl.federation.bytes import ByteMeter, Group, nbytes, nfloats, written

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]

A = {"w": torch.zeros(3, 2), "n": torch.zeros((), dtype=torch.int64)}  # 24 + 8 bytes
B = {"v": torch.zeros(5, dtype=torch.float64)}  # 40 bytes


def test_nbytes() -> None:
    assert nbytes(A) == 32
    assert nbytes({"u": torch.zeros(3, dtype=torch.bfloat16), "e": torch.zeros(0)}) == 6
    assert (nfloats(A), nfloats(B), nfloats({"u": torch.zeros(3, dtype=torch.bfloat16)})) == (6, 5, 3)


def test_each_client_pays_once_within_a_scope() -> None:
    meter = ByteMeter()
    assert meter.charge_down([Group("x", "task:0", A)], [0, 1]) == 64
    assert meter.charge_down([Group("x", "task:0", A)], [1, 2]) == 32  # client 1 holds it
    assert meter.charge_down([Group("x", "task:1", A)], [1, 2]) == 64
    assert meter.down == 160


@pytest.mark.parametrize(("scopes", "charges"), [(["run"] * 3, 1), (["call:1", "call:2", "call:3"], 3)])
def test_run_and_round_scopes(scopes: list[str], charges: int) -> None:
    meter = ByteMeter()
    for scope in scopes:
        meter.charge_down([Group("x", scope, B)], [4])
    assert meter.down == 40 * charges


def test_groups_have_scopes_of_their_own() -> None:
    meter = ByteMeter()
    meter.charge_down([Group("x", "run", A), Group("y", "round:0", B)], [0])
    assert meter.charge_down([Group("x", "run", A), Group("y", "round:1", B)], [0]) == 40


def test_the_same_tensor_twice_in_a_message_is_charged_once() -> None:
    meter = ByteMeter()
    assert meter.charge_down([Group("model", "model:1", A), Group("previous", "task:1", dict(A))], [0, 1]) == 64
    # An equal tensor that is another one is charged.
    assert ByteMeter().charge_down([Group("model", "m", A), Group("previous", "t", {"w": A["w"].clone()})], [0]) == 56
    assert meter.floats_down == 2 * 6


def test_what_was_counted_stays_as_it_was() -> None:
    meter = ByteMeter()
    meter.charge_down([Group("x", "run", A), Group("y", "task:0", B)], [7, 3])
    before = meter.state()
    meter.charge_down([Group("x", "run", A), Group("y", "task:1", B)], [5, 3])
    meter.charge_up(9)
    assert written(before) == {
        "up": 0, "down": 144, "floats_up": 0, "floats_down": 22, "asked": 0.0,
        "held": {"x": ["run", [3, 7]], "y": ["task:0", [3, 7]]},
    }  # fmt: skip
    # A run that goes on from it, in this process or from a checkpoint, charges as the first one did.
    for state in (before, json.loads(json.dumps(written(before)))):
        again = ByteMeter.restore(state)
        assert again.charge_down([Group("x", "run", A), Group("y", "task:1", B)], [5, 3]) == 32 + 80
        again.charge_up(9)
        assert written(again.state()) == written(meter.state())


def test_a_twin_is_free_only_for_clients_that_get_the_first_in_this_message() -> None:
    meter = ByteMeter()
    meter.charge_down([Group("model", "m", A)], [0])
    # Client 0 holds `model` already and is charged for `previous`; client 1 gets both at the price of one.
    assert meter.charge_down([Group("model", "m", A), Group("previous", "t", dict(A))], [0, 1]) == 32 + 32


def test_state_round_trip_goes_on_as_before() -> None:
    meter = ByteMeter()
    meter.charge_down([Group("x", "task:0", A)], [3, 1])
    meter.charge_up(7, 2)
    again = ByteMeter.restore(meter.state())
    for one in (meter, again):
        assert one.charge_down([Group("x", "task:0", A)], [1, 2]) == 32
    assert again.state() == meter.state()
    assert (again.up, again.floats_up) == (7, 2)
    assert meter.since({"up": 3, "down": 8, "floats_up": 2, "floats_down": 0}) == {
        "bytes_up": 4, "bytes_down": meter.down - 8, "floats_up": 0, "floats_down": meter.floats_down,
    }  # fmt: skip


# whole runs: 3 clients that all hold images, 2 tasks of 5 classes, 2 rounds, an mlp 64-8 in float64

ENCODER = (64 * 8 + 8) * 8
TASKS, ROUNDS, CLIENTS = 2, 2, 3


def head(classes: int) -> int:
    return (8 * classes + classes) * 8


def model(classes: int) -> int:
    return ENCODER + head(classes)


TRAINING = CLIENTS * ROUNDS * (model(5) + model(10))


def bytes_of(tiny: Tiny, overrides: Mapping[str, Any]) -> tuple[int, int]:
    summary = tiny(overrides).summary
    assert [sum(c) for c in zip(*summary["bytes_per_task"], strict=True)] == [
        summary["bytes_up"],
        summary["bytes_down"],
    ]
    return summary["bytes_up"], summary["bytes_down"]


def test_finetune_by_hand(tiny: Tiny) -> None:
    assert bytes_of(tiny, {"strategy": ["finetune"]}) == (TRAINING, TRAINING)


def test_participation_by_hand(tiny: Tiny) -> None:
    one = ROUNDS * (model(5) + model(10))  # round(0.34 * 3) = 1 client a round
    assert bytes_of(tiny, {"federation.participation": 0.34}) == (one, one)


def test_teacher_is_charged_once_a_task_and_client(tiny: Tiny) -> None:
    """In the first round of a task its encoder is the broadcast one: only its head comes on top."""
    assert bytes_of(tiny, {"strategy": ["fedlwf"]}) == (TRAINING, TRAINING + CLIENTS * head(5))


def test_teacher_is_charged_in_full_to_a_client_that_comes_later(tiny: Tiny) -> None:
    result = tiny(
        {
            "strategy": ["fedlwf"],
            "federation.participation": 0.34,
            "federation.rounds": 6,
            "scenario.tasks": 2,
        }
    )
    from fedcl import random as counter

    down, seen = 6 * (model(5) + model(10)), set()
    for round_ in range(6):
        (client,) = counter.sample(3, 1, 0, "cohort", 1, round_)
        if client not in seen:
            down += head(5) if round_ == 0 else model(5)
        seen.add(client)
    assert len(seen) > 1
    assert result.summary["bytes_down"] == down


def test_nearest_mean_by_hand(tiny: Tiny) -> None:
    """At each task's end the model goes down once more and sums (C, 8) and counts (C,) come up, both 8 bytes each."""
    extra_down = CLIENTS * (model(5) + model(10))
    extra_up = CLIENTS * sum(c * 8 * 8 + c * 8 for c in (5, 10))
    assert bytes_of(tiny, {"strategy": ["nearest_mean"]}) == (TRAINING + extra_up, TRAINING + extra_down)


def test_fedewc_by_hand(tiny: Tiny) -> None:
    """At each task's end the model goes down and the Fisher information comes up; both, the anchor's encoder being the
    broadcast one, go down once in task 2, as wide as its head."""
    extra_up = CLIENTS * (model(5) + model(10))
    extra_down = CLIENTS * (model(5) + model(10)) + CLIENTS * (model(10) + head(10))
    assert bytes_of(tiny, {"strategy": ["fedewc"]}) == (TRAINING + extra_up, TRAINING + extra_down)


def test_empty_clients_upload_nothing(tiny: Tiny) -> None:
    overrides = {"partition.alpha": 0.02, "partition.min_size": 0, "federation.clients": 8}
    result = tiny(overrides)
    events = [e for e in _events(result) if e["event"] == "round"]
    up = sum((e["clients"] - len(e["empty_clients"])) * model(5 * (e["task"] + 1)) for e in events)
    assert any(e["empty_clients"] for e in events)
    assert result.summary["bytes_up"] == up
    assert result.summary["bytes_down"] == 8 * ROUNDS * (model(5) + model(10))


def test_frozen_batch_norm_buffers_do_not_come_up(tiny: Tiny) -> None:
    run = {"model.norm": "batch", "federation.rounds": 1, "scenario.tasks": 1, "federation.batch_min": 2}
    average = tiny({**run, "name": "a"}).summary["bytes_up"]
    frozen = tiny({**run, "name": "f", "model.batch_norm": "frozen"}).summary["bytes_up"]
    local = tiny({**run, "name": "l", "model.batch_norm": "local"}).summary
    assert average - frozen == CLIENTS * (8 + 8 + 1) * 8  # running mean and variance, and a count
    assert local["bytes_down"] == frozen  # they never come down, but their mean is needed to evaluate the global model
    assert local["bytes_up"] == average


def test_centralised_bound_has_no_bytes(tiny: Tiny) -> None:
    summary = tiny({"strategy": ["joint"]}).summary
    assert summary["bytes_up"] is None
    assert summary["bytes_down"] is None
    assert {"bytes_up", "bytes_down"} <= set(summary["undefined"])


def _events(result: RunResult) -> list[dict[str, Any]]:
    from fedcl.records.runfolder import RunFolder

    return RunFolder.view(result.folder).events()
