"""FedLwF against a literal loop, against finetune_masked at weight 0, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.continual.fedlwf import FedLwF


def _method(oracle: Any, weight: float = 3.0, temperature: float = 2.0, task: str = "new") -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        scores = oracle.logits(w, x)
        value = oracle.cross_entropy(scores, y, local.new if task == "new" else local.known)
        if local.previous is None:
            return value
        teacher = oracle.logits(local.previous, x)
        return value + weight * oracle.soft_cross_entropy(scores, teacher, local.old, temperature)

    return oracle.Method(loss)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"scenario.tasks": 3, "model.head_bias": False}, {"weight": 1.5, "temperature": 0.7}),
        ({"federation.weighting": "uniform", "federation.participation": 0.67}, {"task": "known"}),
        ({"model.head_allocate": "all"}, {}),
    ],
    ids=["default", "three tasks", "known", "whole head"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {
        "strategy": ["fedlwf"],
        "seed": 5,
        **settings,
        **{f"options.fedlwf.{n}": v for n, v in options.items()},
    }
    expected = oracle.federated(tiny_config(settings), _method(oracle, **options))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_weight_zero_is_finetune_masked_bit_for_bit(tiny: Any, oracle: Any) -> None:
    zero = oracle.final(tiny({"strategy": ["fedlwf"], "options.fedlwf.weight": 0.0}))
    masked = oracle.final(tiny({"strategy": ["finetune_masked"]}))
    assert oracle.identical(zero, masked)
    assert oracle.distance(oracle.final(tiny({"strategy": ["fedlwf"]})), masked) > 1e-3


def test_term_and_its_gradient(oracle: Any) -> None:
    w, previous = oracle.leaves(oracle.model(3, 2, 5, seed=0)), oracle.leaves(oracle.model(3, 2, 3, seed=1))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = oracle.step(w, x, [3, 4, 3, 3], known=[0, 1, 2, 3, 4], new=[3, 4], previous=previous)

    def term(weight: float) -> Any:
        return FedLwF(FedLwF.Options(weight=weight)).loss(step)["distillation"]

    teacher = oracle.logits(previous, x).detach()
    literal = oracle.soft_cross_entropy(oracle.logits(w, x), teacher, [0, 1, 2], 2.0)
    slope = (term(1e-3) - term(0.0)) / 1e-3
    assert slope.item() == pytest.approx(literal.item(), rel=1e-10)
    expected, found = oracle.gradient(literal, w), oracle.gradient(slope, w)
    assert all(torch.allclose(found[n], expected[n], atol=1e-10) for n in w)
    assert not expected["head.weight"][3:].any()
    assert all(not g.any() for g in oracle.gradient(term(1.0), previous).values()), "the teacher is not trained"


def test_no_term_in_the_first_task(oracle: Any) -> None:
    w = oracle.model(3, 2, 2, seed=0)
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [0], known=[0, 1], new=[0, 1], task=0)
    assert FedLwF().loss(step) == {}


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {"strategy": ["fedlwf"], **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, oracle.federated(tiny_config(settings), _method(oracle))) < 1e-10


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1), ("weight", "x"), ("temperature", 0), ("temperature", -2.0), ("task", "old"), ("w", 1)],
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fedlwf") as caught:
        build(tiny_config({"strategy": ["fedlwf"], f"options.fedlwf.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
