"""FedDyn against a literal loop of the paper's algorithm, and what its terms are at hand-made steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcl.blocks.updates import under
from fedcl.build import build
from fedcl.check.lab import read
from fedcl.errors import UsageError
from fedcl.strategies.federated.feddyn import FedDyn, distance


def padded(w: Any, arrays: Any) -> Any:
    """Arrays of an earlier width of the head, with zeros for new rows."""
    out = {n: torch.zeros_like(a) for n, a in w.items()}
    for n, a in arrays.items():
        out[n][: len(a)] = a
    return out


def _method(oracle: Any, alpha: float, clients: int = 3, norm: str = "squared") -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        linear = padded(local.received, local.memory.get(local.client, {}))
        squared = sum(((w[n] - local.received[n]) ** 2).sum() for n in w)
        # At the first step the root has no gradient; the term is left out there.
        size = squared if norm == "squared" else squared**0.5 if float(squared) else 0.0
        value = oracle.cross_entropy(oracle.logits(w, x), y, local.known) - sum((linear[n] * w[n]).sum() for n in w)
        return value + alpha / 2 * size

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        if not outcomes:
            return w
        server, new = padded(w, local.memory.get("server", {})), {}
        for o in outcomes:
            linear = padded(w, local.memory.get(o.client, {}))
            local.memory[o.client] = {n: linear[n] - alpha * (o.trained[n] - w[n]) for n in w}
        for n in w:
            server[n] = server[n] - alpha * sum(o.trained[n] - w[n] for o in outcomes) / clients
            new[n] = sum(o.trained[n] for o in outcomes) / len(outcomes) - server[n] / alpha
        local.memory["server"] = server
        return new

    return oracle.Method(loss, join=join)


@pytest.mark.parametrize(
    ("settings", "norm"),
    [
        ({"scenario.tasks": 3}, "squared"),
        ({"options.feddyn.alpha": 0.1, "federation.participation": 0.67, "federation.rounds": 4}, "squared"),
        ({"options.feddyn.alpha": 0.5, "options.feddyn.norm": "plain"}, "plain"),
    ],
    ids=["default", "sampled", "plain norm"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], norm: str
) -> None:
    settings = {"strategy": ["feddyn"], "seed": 4, **settings}
    method = _method(oracle, settings.get("options.feddyn.alpha", 0.01), norm=norm)
    expected = oracle.federated(tiny_config(settings), method)
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-9


def test_terms_and_gradients(oracle: Any) -> None:
    received, w = oracle.model(3, 2, 2, seed=0), oracle.leaves(oracle.model(3, 2, 2, seed=1))
    linear = oracle.model(3, 2, 2, seed=2)
    x = torch.ones(1, 2, dtype=torch.float64)
    step = oracle.step(w, x, [0], known=[0, 1], new=[0, 1], received=received)
    step = replace(step, carried={f"linear/{n}": a for n, a in linear.items()})
    for norm in ("squared", "plain"):
        terms = FedDyn(FedDyn.Options(alpha=0.3, norm=norm)).loss(step)
        found = oracle.gradient(sum(terms.values()), w)
        length = sum(float((w[n].detach() - received[n]).square().sum()) for n in w) ** 0.5
        for n in w:
            pull = 0.3 * (w[n].detach() - received[n]) / (1.0 if norm == "squared" else 2 * length)
            torch.testing.assert_close(found[n], pull - linear[n], rtol=0, atol=1e-12)


def test_the_plain_norm_has_no_gradient_where_it_starts(oracle: Any) -> None:
    w = oracle.leaves(oracle.model(3, 2, 2, seed=0))
    anchor = {n: a.detach() for n, a in w.items()}
    assert all(not g.any() for g in oracle.gradient(distance(w, anchor), w).values())
    one = {n: a.detach()[None] for n, a in w.items()}
    stacked = torch.func.vmap(torch.func.grad(lambda p: distance(p, anchor)))(one)
    assert all(not g.any() for g in stacked.values())


def test_clients_count_the_same(tiny: Any, oracle: Any) -> None:
    one, other = (
        oracle.final(tiny({"strategy": ["feddyn"], "federation.weighting": weighting}))
        for weighting in ("samples", "uniform")
    )
    assert oracle.identical(one, other)


def test_a_small_alpha_in_the_first_round_doubles_the_mean_change(tiny: Any, oracle: Any) -> None:
    """h / alpha is then minus the mean change of all clients, which the server adds to the mean."""
    once = {"federation.rounds": 1, "scenario.tasks": 1, "federation.weighting": "uniform"}
    ours = oracle.final(tiny({"strategy": ["feddyn"], "options.feddyn.alpha": 1e-9, **once}))
    plain = oracle.final(tiny(once))
    start = oracle.final(tiny({**once, "optimiser.lr": 1e-300}))
    for n in plain:
        torch.testing.assert_close(ours[n], start[n] + 2 * (plain[n] - start[n]), rtol=0, atol=1e-6)


def test_stacked_is_one_by_one(tiny: Any, oracle: Any) -> None:
    settings = {"strategy": ["feddyn"], "model.norm": "batch", "federation.batch_min": 2, "federation.rounds": 3}
    one, other = (oracle.final(tiny({**settings, "engine.path": path})) for path in ("sequential", "stacked"))
    assert oracle.distance(one, other) < 1e-8


def test_private_parameters_have_no_linear_term(tiny: Any) -> None:
    ended = read(tiny({"strategy": ["feddyn", "fedper"], "federation.rounds": 2}).folder)
    shared = {"linear/encoder.1.weight", "linear/encoder.1.bias"}
    assert len(ended.clients) == 3
    assert all(set(under(arrays, "feddyn")) == shared for arrays in ended.clients.values())
    assert set(under(ended.server, "strategy/feddyn")) == shared


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {"strategy": ["feddyn"], **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    method = _method(oracle, 0.01, settings.get("federation.clients", 3))
    assert oracle.distance(found, oracle.federated(tiny_config(settings), method)) < 1e-9


@pytest.mark.parametrize(("key", "value"), [("alpha", 0.0), ("alpha", -1.0), ("alpha", float("inf")), ("norm", "l1")])
def test_wrong_options(tiny_config: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=r"options\.feddyn") as caught:
        build(tiny_config({"strategy": ["feddyn"], f"options.feddyn.{key}": value}))
    assert "\n" not in str(caught.value)
