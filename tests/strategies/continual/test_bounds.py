"""Joint is a plain centralised loop; cumulative is federated averaging over everything held so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.build import build
from fedcl.config import Config
from fedcl.run import RunResult

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]
EMPTY = {"federation.clients": 6, "partition.min_size": 0, "partition.alpha": 0.1}


def so_far(held: list[list[list[int]]], task: int, clients: list[int]) -> list[int]:
    """The rows of ``clients`` in the tasks up to ``task``, ascending, each once."""
    return sorted({row for t in range(task + 1) for k in clients for row in held[t][k]})


def plain(oracle: ModuleType) -> Any:
    """Cross entropy over all known classes, as a method of the oracle."""
    return oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known))


@pytest.mark.parametrize("overrides", [{"scenario.tasks": 3}, EMPTY])
def test_joint_is_a_centralised_loop(tiny_config: Configure, oracle: ModuleType, overrides: dict[str, Any]) -> None:
    from fedcl.run import run

    result = run(tiny_config({"strategy": ["joint"], **overrides}))
    config = tiny_config(overrides)
    world = oracle.World.of(config)
    everyone = list(range(config.federation.clients))
    alone = replace(config, federation=replace(config.federation, clients=1, participation=1.0))
    central = replace(world, config=alone, held=[[so_far(world.held, t, everyone)] for t in range(len(world.held))])
    model = oracle.federated(alone, plain(oracle), central)
    assert oracle.distance(oracle.final(result), model) < 1e-10


@pytest.mark.parametrize("overrides", [{"scenario.tasks": 3}, EMPTY])
def test_cumulative_is_federated_averaging_over_all_held_so_far(
    tiny_config: Configure, oracle: ModuleType, overrides: dict[str, Any]
) -> None:
    from fedcl.run import run

    config = tiny_config({"strategy": ["cumulative"], **overrides})
    world = oracle.World.of(tiny_config(overrides))
    clients = range(config.federation.clients)
    held = [[so_far(world.held, t, [k]) for k in clients] for t in range(len(world.held))]
    rows = build(config).split.train
    assert [[ids.tolist() for ids in task] for task in rows] == held
    model = oracle.federated(config, plain(oracle), replace(world, held=held))
    assert oracle.distance(oracle.final(run(config)), model) < 1e-10


def test_with_one_client_cumulative_is_joint(tiny: Run, oracle: ModuleType) -> None:
    # Both give client 0 the same rows in ascending order, so even the orders of batches agree: no tolerance.
    one = {"federation.clients": 1, "scenario.tasks": 3}
    joint, cumulative = tiny({"strategy": ["joint"], **one}), tiny({"strategy": ["cumulative"], **one})
    assert oracle.identical(oracle.final(joint), oracle.final(cumulative))
    assert joint.matrix == cumulative.matrix


def test_in_the_first_task_cumulative_is_finetune(tiny: Run, oracle: ModuleType) -> None:
    one_task = {"scenario.tasks": 1}
    cumulative = tiny({"strategy": ["cumulative"], **one_task})
    assert oracle.identical(oracle.final(cumulative), oracle.final(tiny(one_task)))
    assert not oracle.identical(oracle.final(tiny({"strategy": ["cumulative"]})), oracle.final(tiny({})))


def test_joint_does_not_depend_on_how_the_images_were_split(tiny: Run, oracle: ModuleType) -> None:
    models = [
        oracle.final(tiny({"strategy": ["joint"], "partition.min_size": 0, **how}))
        for how in ({"federation.clients": 2}, {"federation.clients": 7, "partition.alpha": 0.1})
    ]
    assert oracle.identical(*models)


def test_an_image_of_several_tasks_stands_once() -> None:
    from fedcl.strategies.continual.bounds import Cumulative, Joint

    split = [
        [np.array([3, 1]), np.array([2], dtype=np.int64)],
        [np.array([1, 4]), np.array([], dtype=np.int64)],
    ]
    assert [[ids.tolist() for ids in t] for t in Cumulative().arrange(split)] == [
        [[1, 3], [2]],
        [[1, 3, 4], [2]],
    ]
    assert [[ids.tolist() for ids in t] for t in Joint().arrange(split)] == [[[1, 2, 3]], [[1, 2, 3, 4]]]
    assert split[0][0].tolist() == [3, 1]


def test_no_image_at_all_in_a_task() -> None:
    from fedcl.strategies.continual.bounds import Cumulative, Joint

    nothing = [[np.array([], dtype=np.int64)]]
    for bound in (Cumulative(), Joint()):
        (rows,) = bound.arrange(nothing)[0]
        assert rows.shape == (0,)
        assert rows.dtype == np.int64


def test_a_pooled_run_has_no_bytes_and_no_personal_test_sets(tiny: Run) -> None:
    result = tiny({"strategy": ["joint"], "partition.test": "same_mix"})
    assert result.summary["bytes_up"] is None
    assert result.summary["personal"] is None
    assert result.summary["num_clients"] == 1


@pytest.mark.parametrize("bound", ["joint", "cumulative"])
@pytest.mark.parametrize(
    "odd",
    [
        {"federation.batch_size": 1},
        {"data.limit": 1, "partition.min_size": 0},
        {"scenario.tasks": 10, **EMPTY},
    ],
    ids=["batch of one", "one sample a class", "one class a task, empty clients"],
)
def test_odd_input(tiny: Run, oracle: ModuleType, bound: str, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": [bound], "federation.rounds": 1, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())
