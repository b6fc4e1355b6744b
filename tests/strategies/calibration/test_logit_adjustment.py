"""Logit adjustment: the loss against a literal loop, whose counts it knows, scores after training, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError


def prior(counts: list[int]) -> list[float]:
    floor = [max(c, 1) for c in counts]
    return [math.log(c / sum(floor)) for c in floor]


def counted(local: Any) -> list[int]:
    rows = local.world.held[local.task][local.client]
    return [sum(local.world.y[i] == c for i in rows) for c in range(len(local.received["head.weight"]))]


@pytest.mark.parametrize(
    ("settings", "tau"),
    [
        ({"strategy": ["logit_adjustment"]}, 1.0),
        ({"strategy": ["logit_adjustment"], "options.logit_adjustment.tau": 0.4}, 0.4),
        ({"strategy": ["logit_adjustment"], "options.logit_adjustment.tau": 0.0}, 0.0),
    ],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], tau: float
) -> None:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        shift = torch.tensor(prior(counted(local)), dtype=torch.float64)
        return oracle.cross_entropy(oracle.logits(w, x) + tau * shift, y, local.known)

    expected = oracle.federated(tiny_config(settings), oracle.Method(loss))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10
    plain = oracle.final(tiny({}))
    assert (oracle.distance(oracle.final(tiny(settings)), plain) < 1e-12) == (tau == 0.0)


def test_post_hoc_changes_scores_and_not_training(tiny: Any, oracle: Any) -> None:
    tailed = {"scenario.name": "long_tailed", "scenario.imbalance": 10, "data.limit": 60}
    settings = {"strategy": ["logit_adjustment"], "options.logit_adjustment.mode": "post_hoc",
                "options.logit_adjustment.counts": "global", **tailed}  # fmt: skip
    plain = tiny(tailed)
    ours = tiny(settings)
    assert oracle.identical(oracle.final(ours), oracle.final(plain))
    huge = tiny({**settings, "options.logit_adjustment.tau": 50.0})
    assert huge.summary["average_accuracy"] != plain.summary["average_accuracy"]


def test_post_hoc_leaves_the_loss_to_another(tiny: Any, oracle: Any) -> None:
    settings = {"options.logit_adjustment.mode": "post_hoc", "options.logit_adjustment.counts": "global"}
    ours, alone = tiny({**settings, "strategy": ["fedlwf", "logit_adjustment"]}), tiny({"strategy": ["fedlwf"]})
    assert oracle.identical(oracle.final(ours), oracle.final(alone))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"options.logit_adjustment.mode": "post_hoc"}, "has no counts of its own"),
        ({"options.logit_adjustment.tau": -1.0}, "tau"),
        ({"strategy": ["fedlwf", "logit_adjustment"]}, "both define task_loss"),
        (
            {
                "strategy": ["logit_adjustment", "nearest_mean"],
                "options.logit_adjustment.mode": "post_hoc",
                "options.logit_adjustment.counts": "global",
            },
            "both define predict",
        ),
    ],
)
def test_what_cannot_be_is_refused(tiny_config: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        build(tiny_config({"strategy": ["logit_adjustment"], **settings}))
    assert "\n" not in str(caught.value)
