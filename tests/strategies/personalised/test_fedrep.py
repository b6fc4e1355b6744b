"""FedRep against a literal loop of its two parts, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError


def is_head(name: str) -> bool:
    return name.startswith("head.")


def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, passes: Any, private_heads: Any, kept: Any
) -> None:
    settings = {"strategy": ["fedrep"], "seed": 3, "options.fedrep.head_epochs": 2, "options.fedrep.body_epochs": 1}
    world = oracle.World.of(tiny_config(settings))

    def body(name: str) -> bool:
        return not is_head(name)

    def train(client: int, task: int, start: Any, loss: Any, round_: int) -> Any:
        first = passes(world, client, task, start, loss, round_=round_, epochs=2, only=is_head)
        return passes(world, client, task, first, loss, round_=round_, place=1, only=body)

    w, heads = private_heads(world, train)
    result = tiny(settings)
    found = oracle.final(result)
    encoder = {n: a for n, a in found.items() if not is_head(n)}
    assert oracle.distance(encoder, {n: w[n] for n in encoder}) < 1e-10
    own = kept(result, "private/")
    assert {c: set(arrays) for c, arrays in own.items()} == {c: {"head.weight", "head.bias"} for c in own}
    for client, arrays in own.items():
        assert oracle.distance(arrays, heads[client]) < 1e-10
    assert not torch.allclose(own[0]["head.weight"], own[1]["head.weight"])


def test_clients_are_judged_by_their_own_heads(tiny: Any) -> None:
    settings = {
        "partition.test": "same_mix", "data.limit": 60, "partition.alpha": 0.1, "scenario.tasks": 1,
        "federation.epochs": 4,
    }  # fmt: skip
    summary = tiny({"strategy": ["fedrep"], **settings}).summary
    assert summary["personal"]["average_accuracy"]["weighted_mean"] > summary["average_accuracy"]


@pytest.mark.parametrize(
    ("key", "value", "says"), [("head_epochs", -1, "at least 0"), ("private", [], "must name a module")]
)
def test_wrong_options(tiny_config: Any, key: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        build(tiny_config({"strategy": ["fedrep"], f"options.fedrep.{key}": value}))
    assert "\n" not in str(caught.value)
