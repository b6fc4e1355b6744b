"""FedNova: effective steps against a simulated optimiser, whole runs against a literal loop, equal steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.federated.fednova import effective_steps


def simulated(steps: int, momentum: float, proximal: float) -> float:
    """The way of an optimiser with rate 1 whose gradient is always 1, from 0."""
    place, velocity = 0.0, 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1.0 - proximal * place
        place += velocity
    return place


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(("momentum", "proximal"), [(0.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.0, 0.01), (0.0, 1.0)])
def test_effective_steps_are_those_of_a_constant_gradient(steps: int, momentum: float, proximal: float) -> None:
    found = effective_steps(torch.tensor(steps, dtype=torch.float64), momentum, proximal)
    assert found.item() == pytest.approx(simulated(steps, momentum, proximal), rel=1e-10)


def _method(oracle: Any, momentum: float, mu: float = 0.0) -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        value = oracle.cross_entropy(oracle.logits(w, x), y, local.known)
        return value + mu / 2 * sum(((w[n] - local.received[n]) ** 2).sum() for n in w)

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        lr, total = local.world.config.optimiser.lr, sum(o.weight for o in outcomes)
        if not outcomes:
            return w
        a = {o.client: simulated(o.steps, momentum, lr * mu) for o in outcomes}
        effective = sum(o.weight / total * a[o.client] for o in outcomes)
        out = {}
        for n in w:
            direction = sum(o.weight / total * (w[n] - o.trained[n]) / (lr * a[o.client]) for o in outcomes)
            out[n] = w[n] - lr * effective * direction
        return out

    return oracle.Method(loss, join=join)


@pytest.mark.parametrize(
    ("settings", "mu"),
    [
        ({"scenario.tasks": 3, "federation.epochs": 2}, 0.0),
        (
            {"optimiser.momentum": 0.0, "options.fednova.momentum": 0.0, "federation.participation": 0.67,
             "federation.weighting": "uniform", "federation.rounds": 3},
            0.0,
        ),
        (
            {"strategy": ["fednova", "fedprox"], "optimiser.momentum": 0.0, "options.fednova.momentum": 0.0,
             "options.fedprox.mu": 0.5, "options.fednova.proximal": 0.05},
            0.5,
        ),
    ],
    ids=["momentum", "plain", "proximal"],
)  # fmt: skip
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], mu: float
) -> None:
    settings = {"strategy": ["fednova"], "seed": 4, **settings}
    method = _method(oracle, settings.get("optimiser.momentum", 0.9), mu)
    expected = oracle.federated(tiny_config(settings), method)
    found = oracle.final(tiny(settings))
    assert oracle.distance(found, expected) < 1e-10
    method.join = oracle.mean  # clients take different numbers of steps, so that averaging ends elsewhere
    assert oracle.distance(found, oracle.federated(tiny_config(settings), method)) > 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equal_steps_are_averaging(tiny: Any, oracle: Any, momentum: float) -> None:
    equal = {"federation.steps": 3, "federation.epochs": None, "optimiser.momentum": momentum}
    ours = oracle.final(tiny({"strategy": ["fednova"], "options.fednova.momentum": momentum, **equal}))
    assert oracle.distance(ours, oracle.final(tiny(equal))) < 1e-12


def test_private_parts_stay_at_their_client(tiny: Any, oracle: Any) -> None:
    equal = {"federation.steps": 3, "federation.epochs": None}
    ours = oracle.final(tiny({"strategy": ["fedper", "fednova"], **equal}))
    assert oracle.distance(ours, oracle.final(tiny({"strategy": ["fedper"], **equal}))) < 1e-12


def test_statistics_of_batch_norm_are_averaged(tiny: Any, oracle: Any) -> None:
    common = {"model.norm": "batch", "federation.batch_min": 2, "scenario.tasks": 1, "federation.rounds": 1}
    ours, plain = oracle.final(tiny({"strategy": ["fednova"], **common})), oracle.final(tiny(common))
    for name in (n for n in plain if "running" in n):
        torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=1e-12)
    assert oracle.distance(ours, plain) > 1e-4


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {"strategy": ["fednova"], **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, oracle.federated(tiny_config(settings), _method(oracle, 0.9))) < 1e-9


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"optimiser.name": "adam"}, "optimiser.name"),
        ({"optimiser.nesterov": True}, "optimiser.nesterov"),
        ({"optimiser.schedule": "cosine", "optimiser.per": "step"}, "optimiser.per"),
        ({"optimiser.momentum": 0.5}, "options.fednova.momentum"),
        ({"strategy": ["fednova", "fedprox"], "optimiser.momentum": 0.0, "options.fednova.momentum": 0.0},
         "options.fednova.proximal"),
        ({"optimiser.momentum": 0.0, "options.fednova.momentum": 0.0, "options.fednova.proximal": 0.1},
         "options.fednova.proximal"),
        ({"strategy": ["fednova", "fedprox"], "optimiser.momentum": 0.0, "options.fednova.momentum": 0.0,
          "options.fedprox.mu": 0.5, "options.fednova.proximal": 0.05, "optimiser.schedule": "cosine"},
         "optimiser.schedule"),
        ({"options.fednova.proximal": 0.1}, "options.fednova"),
        ({"options.fednova.momentum": 1.0}, "options.fednova"),
    ],
)  # fmt: skip
def test_what_has_no_effective_steps_is_refused(tiny_config: Any, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key.replace(".", r"\.")) as caught:
        build(tiny_config({"strategy": ["fednova"], **settings}))
    assert "\n" not in str(caught.value)
