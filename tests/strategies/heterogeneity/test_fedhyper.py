"""FedHyper: every mode against a literal loop, the first round, and the bounds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.heterogeneity.fedhyper import FedHyper, client_factor, hypergradient

PLAIN = {"optimiser.momentum": 0.0}


def dot(one: Any, other: Any) -> float:
    """Over all parameters; rows of the head that one of them has not are 0 there."""
    return sum(float((a[: len(other[n])] * other[n][: len(a)]).sum()) for n, a in one.items() if n in other)


def wide(w: Any, arrays: Any) -> Any:
    out = {n: torch.zeros_like(a) for n, a in w.items()}
    for n, a in arrays.items():
        out[n][: len(a)] = a
    return out


def clip(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


def test_the_step_before_is_in_the_same_order_in_every_phase() -> None:
    """A phase that trains other parameters lists those first: the same step must give the same carried vector."""
    arrays = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0])}
    carried = {"factor": torch.ones(()), "last": torch.zeros(3)}
    paths = []
    for order in (["a", "b"], ["b", "a"]):
        step: Any = SimpleNamespace(params={n: torch.zeros_like(arrays[n]) for n in order}, carried=carried, down={})
        found = FedHyper(FedHyper.Options(mode="cl")).carry(step, {}, {n: arrays[n] for n in order})
        paths.append(found["last"].tolist())
    assert paths[0] == paths[1]
    assert sorted(paths[0]) == [1.0, 2.0, 3.0]


def _method(oracle: Any, mode: str, normalise: bool = False, cohort: int = 3) -> Any:
    """The rules in the order of the released loop; local rates are factors on gradients, the same without momentum."""

    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        return oracle.cross_entropy(oracle.logits(w, x), y, local.known)

    def edit(grads: Any, w: Any, local: Any) -> Any:
        memory = local.memory
        if mode == "sl":
            factor = clip(1.0 + memory.get("h", 0.0), 0.1, 10.0)
        elif mode in ("cl", "full"):
            walk = memory.setdefault("walk", {})
            if all(torch.equal(w[n], local.received[n]) for n in w):
                factor, last = 1.0, {}
            else:
                factor, last, before = walk[local.client]
                moved = {n: w[n].detach() - before[n] for n in w}
                gamma = 1.0 + 0.1 * dot(moved, memory.get("delta", {})) / cohort + dot(moved, last)
                factor, last = clip(factor * min(1.1, gamma), 0.1, 10.0), moved
            walk[local.client] = factor, last, {n: a.detach().clone() for n, a in w.items()}
        else:
            factor = 1.0
        return {n: factor * g for n, g in grads.items()}

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        memory, mean = local.memory, oracle.mean(w, outcomes, local)
        delta = {n: mean[n] - w[n] for n in w}
        memory["delta"] = delta
        if mode == "cl" or not outcomes:
            return mean
        if "last" not in memory:
            memory.update(last=delta, h=0.0)
            return mean
        product, last = dot(memory["last"], delta), wide(w, memory["last"])
        h = memory["h"] + (1.0 / (1.0 + math.exp(-0.1 * product)) if normalise else product)
        h = memory["h"] = {"g": clip(h, -0.8, 4.0), "sl": h}.get(mode, clip(h, -0.2, 4.0))
        if mode == "sl":
            memory["last"] = delta
            return mean
        if mode == "g":
            memory["last"] = delta
            return {n: w[n] + (1.0 + h) * delta[n] for n in w}
        memory["last"] = {n: delta[n] + 0.9 * last[n] for n in w}
        return {n: w[n] + (1.0 + h) * delta[n] + 0.9 * h * last[n] for n in w}

    return oracle.Method(loss, edit=edit, join=join)


@pytest.mark.parametrize("mode", ["g", "gm", "sl", "cl", "full"])
@pytest.mark.parametrize("normalise", [False, True])
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, mode: str, normalise: bool
) -> None:
    if mode == "cl" and normalise:
        pytest.skip("nothing of cl is normalised")
    settings = {
        "strategy": ["fedhyper"], "seed": 4, "federation.rounds": 4, "options.fedhyper.mode": mode,
        "options.fedhyper.normalise": normalise, "optimiser.lr": 0.05, **PLAIN,
    }  # fmt: skip
    expected = oracle.federated(tiny_config(settings), _method(oracle, mode, normalise))
    found = oracle.final(tiny(settings))
    assert oracle.distance(found, expected) < 1e-10
    plain = {k: v for k, v in settings.items() if not k.startswith("options.")}
    assert oracle.distance(found, oracle.final(tiny({**plain, "strategy": ["finetune"]}))) > 1e-5


@pytest.mark.parametrize("mode", ["g", "gm", "sl"])
def test_first_round_is_averaging(tiny: Any, oracle: Any, mode: str) -> None:
    once = {"federation.rounds": 1, "scenario.tasks": 1}
    ours = oracle.final(tiny({"strategy": ["fedhyper"], "options.fedhyper.mode": mode, **once}))
    assert oracle.distance(ours, oracle.final(tiny(once))) < 1e-14


def test_client_factor_by_hand() -> None:
    def factor(b: float, to_global: float, to_last: float, clients: int) -> float:
        numbers = (torch.tensor(v, dtype=torch.float64) for v in (b, to_global, to_last, float(clients)))
        return float(client_factor(*numbers, 0.1, 10.0))

    assert factor(2.0, 4.0, -0.3, 10) == pytest.approx(2.0 * (1 + 0.04 - 0.3))
    assert factor(2.0, 0.0, 5.0, 1) == pytest.approx(2.2)  # grows by a tenth at most
    assert factor(9.9, 0.0, 5.0, 1) == 10.0
    assert factor(1.0, -50.0, 0.0, 1) == 0.1


def test_normalised_hypergradient_stays_below_one() -> None:
    values = [hypergradient(torch.tensor(v), True).item() for v in (-1e9, 0.0, 1e9)]
    assert values == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("mode", ["cl", "full", "sl"])
def test_stacked_is_one_by_one(tiny: Any, oracle: Any, mode: str) -> None:
    settings = {
        "strategy": ["fedhyper"], "options.fedhyper.mode": mode, "model.norm": "batch", "federation.batch_min": 2,
        "federation.rounds": 3,
    }  # fmt: skip
    one, other = (oracle.final(tiny({**settings, "engine.path": path})) for path in ("sequential", "stacked"))
    assert oracle.distance(one, other) < 1e-8


@pytest.mark.parametrize("mode", ["gm", "full"])
def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any], mode: str) -> None:
    found = oracle.final(
        tiny({"strategy": ["fedhyper"], "options.fedhyper.mode": mode, "federation.rounds": 3, **hard})
    )
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("key", "value"), [("lowest", 0.0), ("lowest", 2.0), ("highest", 0.5), ("highest", math.inf), ("mode", "momentum")]
)
def test_wrong_options(tiny_config: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=r"options\.fedhyper") as caught:
        build(tiny_config({"strategy": ["fedhyper"], f"options.fedhyper.{key}": value}))
    assert "\n" not in str(caught.value)
