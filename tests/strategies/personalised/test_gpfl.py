"""GPFL: its parts against formulas written out, its arrays in a run, and what its options change."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.personalised.gpfl import GPFL, ConditionalValve, conditions, guidance, magnitude

EMBEDDINGS = "extra.gpfl.embeddings.weight"


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_conditions_are_means_over_classes_and_over_images() -> None:
    g, counts = random(4, 3), [5, 0, 2, 0]
    known = torch.tensor([True, True, True, False])
    whole, own = conditions(g, torch.tensor(counts), known)
    for i in range(3):
        assert whole[i].item() == pytest.approx(sum(float(g[c, i]) for c in range(3)) / 3)
        assert own[i].item() == pytest.approx(sum(n / 7 * float(g[c, i]) for c, n in enumerate(counts)))
    nobody = conditions(g, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool))
    assert not torch.cat(nobody).any()


def test_the_valve_is_its_formula() -> None:
    valve = ConditionalValve(3).double()
    z, v = random(2, 3), random(3, seed=1)

    def branch(linear: Any, norm: Any) -> list[float]:
        sums = [sum(float(linear.weight[i, j] * v[j]) for j in range(3)) + float(linear.bias[i]) for i in range(3)]
        out = [max(value, 0.0) for value in sums]
        mean = sum(out) / 3
        spread = math.sqrt(sum((o - mean) ** 2 for o in out) / 3 + norm.eps)
        return [(o - mean) / spread for o in out]

    gamma, beta = branch(valve.gamma[0], valve.gamma[2]), branch(valve.beta[0], valve.beta[2])
    found = valve(z, v)
    for b in range(2):
        for i in range(3):
            assert found[b, i].item() == pytest.approx(max(float(z[b, i]) * (gamma[i] + 1) + beta[i], 0.0), abs=1e-12)


def test_guidances_are_their_formulas() -> None:
    z, g, y = random(5, 3), random(4, 3, seed=1), [0, 2, 1, 0, 2]
    known = torch.tensor([True, True, True, False])
    total = 0.0
    for row, label in zip(z, y, strict=True):
        cosines = [float(row @ g[c]) / float(row.norm() * g[c].norm()) for c in range(3)]
        total -= math.log(math.exp(cosines[label]) / sum(math.exp(c) for c in cosines))
    assert guidance(z, g, torch.tensor(y), known).item() == pytest.approx(total / 5, rel=1e-12)
    squares = sum((float(z[b, i]) - float(g[label, i])) ** 2 for b, label in enumerate(y) for i in range(3))
    assert magnitude(z, g, torch.tensor(y)).item() == pytest.approx(math.sqrt(squares), rel=1e-12)
    at_rest = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(magnitude(at_rest, z, torch.arange(5)), at_rest)
    assert not slope.isnan().any()


def test_embeddings_and_valve_are_shared_and_the_head_is_not(tiny: Any, kept: Any, oracle: Any) -> None:
    result = tiny({"strategy": ["gpfl"]})
    found = oracle.final(result)
    assert found[EMBEDDINGS].shape == (10, 8)
    own = kept(result, "private/")
    assert all(set(arrays) == {"head.weight", "head.bias"} for arrays in own.values())
    assert not torch.equal(own[0]["head.weight"], own[1]["head.weight"])
    plain = tiny({}).summary["bytes_up"]
    valve = 2 * (8 * 8 + 8) + 4 * 8
    rows = 3 * 2 * 8  # clients, rounds, bytes of a number
    heads = rows * 9 * (5 + 10)
    assert result.summary["bytes_up"] == plain - heads + rows * (8 * (5 + 10) + 2 * valve)


def test_decay_acts_on_embeddings_and_valve_alone(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    once = {
        "strategy": ["gpfl"], "scenario.tasks": 1, "federation.rounds": 1, "federation.epochs": None,
        "federation.steps": 1, "optimiser.momentum": 0.0, "partition.name": "iid", "federation.clients": 1,
    }  # fmt: skip
    free, held = (oracle.final(tiny({**once, "options.gpfl.decay": decay})) for decay in (0.0, 0.5))
    experiment = build(tiny_config(once))
    node = experiment.node
    initial = {n: node.grown(n, a, 10, "initial") for n, a in experiment.initial.items()}
    for name, array in held.items():
        if name.startswith("extra.gpfl."):
            # w - lr (g + mu w) without momentum: both runs give back the initial value, w = (free - held) / (lr mu).
            first = (free[name] - array) / (0.1 * 0.5)
            assert torch.allclose(first, initial[name], atol=1e-6)
        else:
            assert torch.equal(array, free[name])
    assert not torch.equal(held[EMBEDDINGS], free[EMBEDDINGS])


def test_conditions_of_the_release_are_a_round_older(tiny: Any, oracle: Any) -> None:
    one = {"strategy": ["gpfl"], "scenario.tasks": 1, "federation.rounds": 1}
    ours, theirs = ({**one, "options.gpfl.conditions": c} for c in ("received", "released"))
    assert oracle.identical(oracle.final(tiny(ours)), oracle.final(tiny(theirs)))  # both are 0 in the first round
    later = {"federation.rounds": 3}
    assert not oracle.identical(oracle.final(tiny({**ours, **later})), oracle.final(tiny({**theirs, **later})))


@pytest.mark.parametrize(("which", "row"), [("received", [4.0, 8.0]), ("released", [40.0, 80.0])])
def test_a_client_predicts_under_the_condition_that_it_trains_under(which: Any, row: list[float]) -> None:
    given: list[Any] = []

    def apply(name: str, features: Any, condition: Any) -> Any:
        given.append(condition)
        return features

    g = torch.tensor([[4.0, 8.0], [0.0, 0.0]])
    predictor: Any = SimpleNamespace(
        arrays={EMBEDDINGS: g, "head.weight": torch.eye(2)}, known=torch.tensor([True, True]), client=3, apply=apply,
        forward=lambda x: SimpleNamespace(features=x), own={"counts": torch.tensor([5]), f"last/{EMBEDDINGS}": 10 * g},
    )  # fmt: skip
    GPFL(GPFL.Options(conditions=which)).predict(predictor, torch.zeros(1, 2))
    assert given[0].tolist() == row


def test_clients_are_judged_by_their_own_model(tiny: Any) -> None:
    settings = {"partition.test": "same_mix", "data.limit": 60, "partition.alpha": 0.1, "federation.epochs": 4}
    summary = tiny({"strategy": ["gpfl"], **settings}).summary
    assert summary["personal"]["average_accuracy"]["weighted_mean"] > summary["average_accuracy"]


@pytest.mark.parametrize(("key", "value"), [("weight", -1.0), ("decay", -0.1), ("conditions", "old")])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.gpfl"):
        build(tiny_config({"strategy": ["gpfl"], f"options.gpfl.{key}": value}))


@pytest.mark.parametrize(("key", "value"), [("model.head", "cosine"), ("model.feature_norm", "l2")])
def test_a_head_that_would_not_be_used_as_it_is_told_is_refused(tiny_config: Any, key: str, value: str) -> None:
    with pytest.raises(UsageError, match=key.replace(".", r"\.")):
        build(tiny_config({"strategy": ["gpfl"], key: value}))
