"""Ditto: the global track is plain averaging, the personal one a literal proximal loop."""

from __future__ import annotations

from typing import Any

import pytest

from fedcl.build import build
from fedcl.errors import UsageError


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_personal_models_equal_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, passes: Any, averaged: Any, kept: Any, weight: float
) -> None:
    settings = {"strategy": ["ditto"], "seed": 5, "options.ditto.weight": weight, "options.ditto.epochs": 2}
    world = oracle.World.of(tiny_config(settings))
    w, own = world.start, {}
    for task, known in enumerate(world.known):
        w = oracle.grown(w, world, len(known))
        for round_ in range(2):
            models = []
            for client, rows in enumerate(world.held[task]):
                if not rows:
                    continue

                def plain(model: Any, x: Any, y: Any, known: Any = known) -> Any:
                    return oracle.cross_entropy(oracle.logits(model, x), y, known)

                def near(model: Any, x: Any, y: Any, known: Any = known, received: Any = w) -> Any:
                    far = sum(((model[n] - received[n]) ** 2).sum() for n in model)
                    return plain(model, x, y, known) + weight / 2 * far

                models.append((float(len(rows)), passes(world, client, task, w, plain, round_=round_)))
                start = oracle.grown(own.get(client, w), world, len(known))
                own[client] = passes(world, client, task, start, near, round_=round_, epochs=2, place=1)
            w = averaged(w, models)
    result = tiny(settings)
    assert oracle.distance(oracle.final(result), w) < 1e-10
    found = kept(result, "ditto/personal/")
    assert found.keys() == own.keys()
    for client, arrays in found.items():
        # A client that sat out the last task has not grown its model yet.
        width = len(arrays["head.weight"])
        assert oracle.distance(arrays, {n: a[:width] if "head" in n else a for n, a in own[client].items()}) < 1e-10


def test_the_global_model_is_that_of_plain_averaging(tiny: Any, oracle: Any) -> None:
    assert oracle.identical(oracle.final(tiny({"strategy": ["ditto"]})), oracle.final(tiny({})))
    stacked = {"engine.path": "stacked"}
    alone = {"engine.path": "sequential"}
    ours = [oracle.final(tiny({"strategy": ["ditto"], **path})) for path in (stacked, alone)]
    assert oracle.distance(*ours) < 1e-10


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("scaffold", {"optimiser.momentum": 0.0}),
        ("fednova", {}),
        ("switch_ema", {"options.switch_ema.momentum": 0.3}),
    ],
)
def test_what_others_carry_through_the_global_track_does_not_go_on_in_the_personal_one(
    tiny: Any, oracle: Any, name: str, settings: dict[str, Any]
) -> None:
    alone = oracle.final(tiny({"strategy": [name], **settings}))
    stacked = oracle.final(tiny({"strategy": ["ditto", name], "options.ditto.epochs": 3, **settings}))
    assert oracle.identical(stacked, alone)


def test_the_term_pulls_personal_models_to_the_global_one(tiny: Any, oracle: Any, kept: Any) -> None:
    def far(weight: float) -> float:
        result = tiny({"strategy": ["ditto"], "options.ditto.weight": weight})
        whole = oracle.final(result)
        return max(
            float((a - whole[n]).norm())
            for arrays in kept(result, "ditto/personal/").values()
            for n, a in arrays.items()
        )

    assert far(5.0) < far(0.0)


def test_clients_are_tested_with_their_personal_models(tiny: Any) -> None:
    settings = {"partition.test": "same_mix", "data.limit": 60, "partition.alpha": 0.1, "scenario.tasks": 1}
    plain = tiny(settings).summary
    ours = tiny({"strategy": ["ditto"], "options.ditto.weight": 0.0, "options.ditto.epochs": 5, **settings}).summary
    assert ours["average_accuracy"] == plain["average_accuracy"]
    assert ours["personal"]["average_accuracy"] != plain["personal"]["average_accuracy"]


@pytest.mark.parametrize(("key", "value"), [("weight", -1.0), ("epochs", -1), ("weight", "much")])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.ditto"):
        build(tiny_config({"strategy": ["ditto"], f"options.ditto.{key}": value}))
