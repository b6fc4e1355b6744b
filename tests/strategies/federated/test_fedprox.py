"""FedProx against a literal loop, against finetune at mu = 0, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.federated.fedprox import FedProx


def _method(oracle: Any, mu: float) -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        distance = sum(((w[n] - local.received[n]) ** 2).sum() for n in w)
        return oracle.cross_entropy(oracle.logits(w, x), y, local.known) + mu / 2 * distance

    return oracle.Method(loss)


@pytest.mark.parametrize(
    "settings",
    [
        {"options.fedprox.mu": 1.0},
        {},
        {"options.fedprox.mu": 0.3, "federation.participation": 0.67, "federation.weighting": "uniform"},
    ],
    ids=["strong", "default", "sampled"],
)
def test_whole_run_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any]) -> None:
    settings = {"strategy": ["fedprox"], "seed": 4, **settings}
    expected = oracle.federated(tiny_config(settings), _method(oracle, settings.get("options.fedprox.mu", 0.01)))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_mu_zero_is_finetune_bit_for_bit(tiny: Any, oracle: Any) -> None:
    prox = oracle.final(tiny({"strategy": ["fedprox"], "options.fedprox.mu": 0.0}))
    plain = oracle.final(tiny({}))
    assert oracle.identical(prox, plain)
    assert not oracle.identical(oracle.final(tiny({"strategy": ["fedprox"]})), plain)


def test_term_and_gradient_at_mu(oracle: Any) -> None:
    received = oracle.model(3, 2, 2, seed=0)
    w = oracle.leaves(oracle.model(3, 2, 2, seed=1))
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [0], known=[0, 1], new=[0, 1], received=received)

    def term(mu: float) -> Any:
        return FedProx(FedProx.Options(mu=mu)).loss(step)["proximal"]

    literal = sum(float((w[n].detach() - received[n]).square().sum()) for n in w) / 2
    assert ((term(1e-3) - term(0.0)) / 1e-3).item() == pytest.approx(literal, rel=1e-12)
    gradient = oracle.gradient(term(0.7), w)
    assert all(torch.allclose(gradient[n], 0.7 * (w[n] - received[n]), atol=1e-12) for n in w)


def test_frozen_parameters_are_left_out(oracle: Any) -> None:
    received, w = oracle.model(3, 2, 2, seed=0), oracle.leaves(oracle.model(3, 2, 2, seed=1))
    w["encoder.1.weight"] = w["encoder.1.weight"].detach()
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [0], known=[0, 1], new=[0, 1], received=received)
    literal = sum(float((w[n].detach() - received[n]).square().sum()) for n in w if n != "encoder.1.weight") / 2
    assert FedProx(FedProx.Options(mu=1.0)).loss(step)["proximal"].item() == pytest.approx(literal)


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {"strategy": ["fedprox"], "options.fedprox.mu": 0.5, **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, oracle.federated(tiny_config(settings), _method(oracle, 0.5))) < 1e-10


@pytest.mark.parametrize("value", [-0.1, "much", True, None])
def test_wrong_mu(tiny_config: Any, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fedprox") as caught:
        build(tiny_config({"strategy": ["fedprox"], "options.fedprox.mu": value}))
    assert "mu" in str(caught.value)
    assert "\n" not in str(caught.value)
