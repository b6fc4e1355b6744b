"""Balanced softmax: it is the adjusted loss at tau = 1, and with global counts it knows all clients and tasks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.calibration.balanced_softmax import BalancedSoftmax


def prior(counts: list[int]) -> list[float]:
    floor = [max(c, 1) for c in counts]
    return [math.log(c / sum(floor)) for c in floor]


def test_it_is_logit_adjustment_at_one(tiny: Any, oracle: Any) -> None:
    ours = oracle.final(tiny({"strategy": ["balanced_softmax"]}))
    assert oracle.distance(ours, oracle.final(tiny({"strategy": ["logit_adjustment"]}))) < 1e-12
    assert oracle.distance(ours, oracle.final(tiny({}))) > 1e-4


@pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjustment"])
def test_global_counts_are_those_of_all_clients_and_tasks(tiny: Any, tiny_config: Any, oracle: Any, name: str) -> None:
    settings = {"strategy": [name], f"options.{name}.counts": "global"}

    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        rows = [i for held in local.world.held[: local.task + 1] for client in held for i in client]
        counts = [sum(local.world.y[i] == c for i in rows) for c in range(len(w["head.weight"]))]
        return oracle.cross_entropy(
            oracle.logits(w, x) + torch.tensor(prior(counts), dtype=torch.float64), y, local.known
        )

    expected = oracle.federated(tiny_config(settings), oracle.Method(loss))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_a_task_whose_images_nobody_in_reach_has_counts_none_of_them() -> None:
    method = BalancedSoftmax(BalancedSoftmax.Options(counts="global"))
    for state, counts in (({}, [0, 0]), ({"counts": torch.tensor([3])}, [3, 0])):
        server = SimpleNamespace(exchange=lambda f: {}, repeats=False, state=state, known=torch.ones(2).bool())
        assert method.begin_task(server)["counts"].tolist() == counts  # type: ignore[arg-type]


def test_counts_before_the_images_come_are_refused(tiny_config: Any) -> None:
    settings = {"options.balanced_softmax.counts": "global", "federation.passes": "once"}
    with pytest.raises(UsageError, match="nobody can count") as caught:
        build(tiny_config({"strategy": ["balanced_softmax"], **settings}))
    assert "\n" not in str(caught.value)
