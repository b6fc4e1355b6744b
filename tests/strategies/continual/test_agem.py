"""A-GEM against literal loops and Avalanche's plugin, and what becomes of it at the edges."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.continual.agem import projected

IMAGE = 64
"""Bytes of a digit."""


def _literal(grads: Any, reference: Any) -> Any:
    """The projection, number by number."""
    pairs = [
        (float(a), float(b)) for n in grads for a, b in zip(grads[n].flatten(), reference[n].flatten(), strict=True)
    ]
    along = sum(a * b for a, b in pairs)
    if along >= 0:
        return grads
    length = sum(b * b for _, b in pairs)
    return {n: g - along / length * reference[n] for n, g in grads.items()}


def _gradients(oracle: Any, seed: int) -> tuple[Any, Any]:
    return oracle.model(3, 2, 3, seed=seed), oracle.model(3, 2, 3, seed=seed + 100)


def test_projection_equals_plain_loops(oracle: Any) -> None:
    met = set()
    for seed in range(6):
        grads, reference = _gradients(oracle, seed)
        found, expected = projected(grads, reference), _literal(grads, reference)
        assert oracle.distance(found, expected) < 1e-12
        along = sum(float((grads[n] * reference[n]).sum()) for n in grads)
        after = sum(float((found[n] * reference[n]).sum()) for n in grads)
        assert after == pytest.approx(max(along, 0.0), abs=1e-10)
        met.add(along < 0)
        assert oracle.identical(found, grads) == (along >= 0)
    assert met == {True, False}


def test_projection_equals_avalanches_plugin(oracle: Any) -> None:
    plugins = pytest.importorskip("avalanche.training.plugins")
    for seed in range(6):
        grads, reference = _gradients(oracle, seed)
        model = torch.nn.ParameterDict({n.replace(".", "_"): torch.nn.Parameter(g.clone()) for n, g in grads.items()})
        for name, gradient in grads.items():
            model[name.replace(".", "_")].grad = gradient.clone()
        names = {n.replace(".", "_"): r for n, r in reference.items()}
        plugin = plugins.AGEMPlugin(1, 1)
        plugin.buffers = [None]
        plugin.reference_gradients = torch.cat([names[n].flatten() for n, _ in model.named_parameters()])
        plugin.after_backward(SimpleNamespace(model=model, device="cpu"))
        found = projected(grads, reference)
        assert all(torch.allclose(model[n.replace(".", "_")].grad, a, atol=1e-12) for n, a in found.items())


def test_a_reference_of_zeros_changes_nothing(oracle: Any) -> None:
    grads, reference = _gradients(oracle, 0)
    assert oracle.identical(projected(grads, {n: torch.zeros_like(r) for n, r in reference.items()}), grads)


@pytest.mark.parametrize("size", [256, 3])
def test_whole_run_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, rehearsal: Any, size: int) -> None:
    turned = []

    def gradient(w: Any, here: Any) -> Any:
        w = oracle.leaves(w)
        found = oracle.gradient(here.loss(w, here.stream), w)
        for draw in here.draws:
            reference = oracle.gradient(here.loss(w, draw), w)
            before, found = found, _literal(found, reference)
            turned.append(found is not before)
        return found

    settings = {
        "strategy": ["agem"], "options.agem.budget": 9 * IMAGE, "options.agem.batch_size": size, "scenario.tasks": 3,
    }  # fmt: skip
    model, _ = rehearsal.federated(oracle, tiny_config(settings), gradient, lambda known: 9, sizes=(size,))
    assert oracle.distance(oracle.final(tiny(settings)), model) < 1e-10
    assert set(turned) == {True, False}


def test_without_budget_it_is_finetune_bit_for_bit(tiny: Any, oracle: Any) -> None:
    nothing = oracle.final(tiny({"strategy": ["agem"], "options.agem.budget": 0}))
    assert oracle.identical(nothing, oracle.final(tiny({"strategy": ["finetune"]})))


def test_with_batchnorm_and_dropout_stacked_is_one_by_one(tiny: Any, oracle: Any) -> None:
    settings = {"model.norm": "batch", "model.dropout": 0.2, "federation.batch_min": 2, "strategy": ["agem"]}
    paths = [oracle.final(tiny({**settings, "engine.path": path})) for path in ("stacked", "sequential")]
    assert oracle.distance(*paths) < 1e-9


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["agem"], "federation.rounds": 1, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(("name", "value"), [("budget", -1), ("batch_size", -1), ("margin", 0.5)])
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.agem") as caught:
        build(tiny_config({"strategy": ["agem"], f"options.agem.{name}": value}))
    assert "\n" not in str(caught.value)
