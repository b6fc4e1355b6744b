"""MOON: the contrast against a literal loop, whole runs with each client's previous model, and averaging at mu = 0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import nearer_to_one
from fedcl.build import build
from fedcl.errors import UsageError

LINEAR = {"strategy": ["moon"], "model.projector": "linear", "model.projector_dim": 4}


def projected(w: Any, x: Tensor) -> Any:
    hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return (hidden * (hidden > 0)) @ w["projector.weight"].T + w["projector.bias"]


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other) / (one.square().sum().sqrt() * other.square().sum().sqrt())


def contrast(w: Any, received: Any, previous: Any, x: Tensor, temperature: float = 0.5) -> Tensor:
    """Image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for own, near, far in zip(projected(w, x), projected(received, x), projected(previous, x), strict=True):
        one, other = (torch.exp(cosine(own, z.detach()) / temperature) for z in (near, far))
        total = total - torch.log(one / (one + other))
    return total / len(x)


def _method(oracle: Any, mu: float, temperature: float = 0.5) -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        previous = local.memory.get(local.client, local.received)
        supervised = oracle.cross_entropy(oracle.logits(w, x), y, local.known)
        return supervised + mu * contrast(w, local.received, previous, x, temperature)

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        local.memory.update({o.client: o.trained for o in outcomes})
        return oracle.mean(w, outcomes, local)

    return oracle.Method(loss, join=join)


def test_pairs_by_hand() -> None:
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(2.0))) / 2
    assert nearer_to_one(near, far).item() == pytest.approx(expected)
    assert math.isfinite(nearer_to_one(torch.tensor([-1e4]), torch.tensor([1e4])).item())


@pytest.mark.parametrize(
    "settings",
    [
        {"scenario.tasks": 3},
        {"options.moon.mu": 5.0, "options.moon.temperature": 0.2, "federation.rounds": 3,
         "federation.clients": 5, "federation.participation": 0.6},
    ],
    ids=["default", "sampled"],
)  # fmt: skip
def test_whole_run_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any]) -> None:
    settings = {**LINEAR, "seed": 4, **settings}
    method = _method(oracle, settings.get("options.moon.mu", 1.0), settings.get("options.moon.temperature", 0.5))
    expected = oracle.federated(tiny_config(settings), method)
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_mu_zero_is_averaging(tiny: Any, oracle: Any) -> None:
    plain = oracle.final(tiny({**LINEAR, "strategy": ["finetune"]}))
    assert oracle.distance(oracle.final(tiny({**LINEAR, "options.moon.mu": 0.0})), plain) < 1e-12
    assert oracle.distance(oracle.final(tiny(LINEAR)), plain) > 1e-5


def test_first_round_has_no_contrast(tiny: Any, oracle: Any) -> None:
    once = {**LINEAR, "federation.rounds": 1, "scenario.tasks": 1}
    first = oracle.final(tiny({**once, "options.moon.mu": 10.0}))
    assert oracle.distance(first, oracle.final(tiny({**once, "strategy": ["finetune"]}))) < 1e-12


def test_one_client_is_centralised_training(tiny: Any, oracle: Any) -> None:
    """Its previous model is the received one in every round, and their contrast has no gradient."""
    alone = {**LINEAR, "federation.clients": 1, "scenario.tasks": 1}
    plain = oracle.final(tiny({**alone, "strategy": ["finetune"]}))
    assert oracle.distance(oracle.final(tiny({**alone, "options.moon.mu": 10.0})), plain) < 1e-12


def test_the_encoder_can_be_compared_instead(tiny: Any, oracle: Any) -> None:
    encoder = oracle.final(tiny({**LINEAR, "options.moon.representation": "encoder"}))
    projector = oracle.final(tiny(LINEAR))
    assert oracle.distance(encoder, projector) > 1e-6
    # The projector is then a layer that nothing trains.
    start = oracle.final(tiny({**LINEAR, "strategy": ["finetune"]}))
    assert torch.equal(encoder["projector.weight"], start["projector.weight"])
    assert not torch.equal(projector["projector.weight"], start["projector.weight"])


def test_a_model_without_projector_is_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="projector"):
        tiny({"strategy": ["moon"], "model.projector": "none"})


def test_stacked_first_and_later_rounds_are_those_one_by_one(tiny: Any, oracle: Any) -> None:
    """Clients with and without a previous model are in one stack."""
    settings = {**LINEAR, "federation.clients": 4, "federation.participation": 0.5, "federation.rounds": 4}
    one, other = (oracle.final(tiny({**settings, "engine.path": path})) for path in ("sequential", "stacked"))
    assert oracle.distance(one, other) < 1e-10


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({**LINEAR, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(("key", "value"), [("mu", -0.1), ("mu", math.inf), ("temperature", 0.0), ("tau", 1.0)])
def test_wrong_options(tiny_config: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=r"options\.moon") as caught:
        build(tiny_config({"strategy": ["moon"], f"options.moon.{key}": value}))
    assert "\n" not in str(caught.value)
