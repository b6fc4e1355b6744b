"""The infinite schedule: its phases, its rate in a run, and the annealed branch that the next task does not see."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.optimiser.infinite_lr import InfiniteLR, Shape

FLAT = {"options.infinite_lr.warmup": 0, "options.infinite_lr.cooldown": 0, "options.infinite_lr.anneal": 0}


def test_phases_follow_one_another() -> None:
    shape = Shape(warmup=3, cooldown=5, constant=0.4, anneal=0, least=0.1)
    found = [shape.factor(n, 1000) for n in range(12)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    for k in range(5):
        assert found[3 + k] == pytest.approx(0.4 + 0.3 * (1 + math.cos(math.pi * k / 5)))
    assert found[8:] == [0.4] * 4
    assert all(a >= b for a, b in itertools.pairwise(found[2:]))
    annealed = Shape(0, 0, 0.4, anneal=4, least=0.1)
    assert [annealed.factor(9, left) for left in (4, 3, 2, 1)] == pytest.approx(
        [0.4 * 0.25 ** (k / 4) for k in (1, 2, 3, 4)]
    )


def test_constant_one_is_plain_training(tiny: Any, oracle: Any) -> None:
    plain = oracle.final(tiny({}))
    ours = tiny({"strategy": ["infinite_lr"], **FLAT, "options.infinite_lr.constant": 1.0})
    assert oracle.distance(oracle.final(ours), plain) < 1e-12


def test_the_constant_rate_is_that_part_of_the_largest(tiny: Any, oracle: Any) -> None:
    slow = oracle.final(tiny({"optimiser.lr": 0.025}))
    ours = tiny({"strategy": ["infinite_lr"], **FLAT, "options.infinite_lr.constant": 0.25, "optimiser.lr": 0.1})
    assert oracle.distance(oracle.final(ours), slow) < 1e-12


def test_the_next_task_goes_on_from_before_the_annealing(tiny: Any, oracle: Any) -> None:
    settings = {**FLAT, "options.infinite_lr.constant": 1.0, "federation.rounds": 3}
    one_task = {"scenario.tasks": 1}
    annealed = {**settings, "options.infinite_lr.anneal": 1, "options.infinite_lr.least": 0.1}
    found = oracle.final(tiny({"strategy": ["infinite_lr"], **annealed, **one_task}))
    two_rounds = oracle.final(tiny({**one_task, "federation.rounds": 2}))
    assert oracle.distance(found, two_rounds) < 1e-12
    accuracy = [
        tiny(
            {"strategy": ["infinite_lr"], "data.limit": 60, **annealed, **one_task, "options.infinite_lr.least": least}
        )
        for least in (1.0, 0.1)
    ]
    plain = tiny({"data.limit": 60, **one_task, "federation.rounds": 3})
    assert accuracy[0].summary["average_accuracy"] == plain.summary["average_accuracy"]


def test_what_stages_before_it_made_of_the_annealed_branch_is_evaluated() -> None:
    now, before, calibrated = ({"w": torch.tensor(v)} for v in (2.0, 1.0, 3.0))
    server: Any = SimpleNamespace(state={"model/w": before["w"]}, arrays=now, evaluated=calibrated, rounds=3)
    finished, state = InfiniteLR(InfiniteLR.Options()).finish_task(server)
    assert finished.arrays == before
    assert finished.evaluate == calibrated
    assert state == {}


def test_a_task_of_annealing_alone_still_goes_on(tiny: Any, oracle: Any) -> None:
    settings = {**FLAT, "options.infinite_lr.anneal": 5, "options.infinite_lr.constant": 1.0}
    one = oracle.final(tiny({"strategy": ["infinite_lr"], **settings, "scenario.tasks": 1}))
    start = oracle.final(tiny({"scenario.tasks": 1, "optimiser.lr": 1e-9}))
    assert oracle.distance(one, start) > 1e-4


@pytest.mark.parametrize(("key", "value"), [("warmup", -1), ("constant", 0.0), ("constant", 1.5), ("least", 0.9)])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.infinite_lr"):
        build(tiny_config({"strategy": ["infinite_lr"], f"options.infinite_lr.{key}": value}))
