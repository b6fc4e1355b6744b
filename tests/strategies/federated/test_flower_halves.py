"""Flower's strategies with a half at the clients, in whole runs: literal loops, limits and edges."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.errors import RunFailed, UsageError
from fedcl.random import key
from fedcl.strategies.federated.flower_halves import HALVES, QFedAvg, own_loss, short

NAMES = [cls.name for cls in HALVES]
SAMPLED = {"federation.participation": 0.67, "federation.weighting": "uniform"}


def fair(oracle: Any, q: float, lr: float) -> Any:
    """Li et al. 2020, Algorithm 2, with Flower's 1e-10 beside each loss of the received model."""

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        top, bottom = {n: torch.zeros_like(a) for n, a in w.items()}, 0.0
        for o in outcomes:
            rows = local.world.held[local.task][o.client]
            labels = [local.world.y[i] for i in rows]
            own = float(oracle.cross_entropy(oracle.logits(w, local.world.x[rows]), labels, local.known)) + 1e-10
            delta = {n: (w[n] - o.trained[n]) / lr for n in w}
            norm = sum(float(d.square().sum()) for d in delta.values())
            top = {n: top[n] + own**q * delta[n] for n in w}
            bottom += q * own ** (q - 1) * norm + own**q / lr
        return {n: a - top[n] / bottom for n, a in w.items()}

    return oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known), join=join)


@pytest.mark.parametrize(("q", "more"), [(0.1, {}), (2.0, SAMPLED), (0.0, {})], ids=["default", "fair", "zero"])
def test_qfedavg_is_the_papers_algorithm(tiny: Any, tiny_config: Any, oracle: Any, q: float, more: Any) -> None:
    options = {"options.qfedavg.q": q, "options.qfedavg.client_learning_rate": 0.2}
    settings = {"strategy": ["qfedavg"], "seed": 4, "model.norm": "none", **options, **more}
    want = oracle.federated(tiny_config(settings), fair(oracle, q, 0.2))
    # A loss leaves a client with 24 binary digits.
    assert oracle.distance(oracle.final(tiny(settings)), want) < 1e-6


def test_qfedavg_with_q_0_is_averaging_of_equal_clients(tiny: Any, oracle: Any) -> None:
    zero = oracle.final(tiny({"strategy": ["qfedavg"], "options.qfedavg.q": 0.0}))
    alike = oracle.final(tiny({"federation.weighting": "uniform"}))
    assert oracle.distance(zero, alike) < 1e-10
    assert oracle.distance(oracle.final(tiny({"strategy": ["qfedavg"]})), alike) > 1e-4


def test_weights_are_short_so_that_their_sums_are_exact() -> None:
    weights = [short(0.1 * 1.7**k) for k in range(20)]
    assert math.fsum(weights) == sum(weights) == sum(reversed(weights))
    assert all(abs(short(v) - v) <= v * 2**-24 for v in (1e-300, 0.1, 2 / 3, 1e30))
    assert short(0.0) == 0.0


def test_a_client_without_labelled_images_has_no_loss() -> None:
    ctx: Any = SimpleNamespace(ids=torch.zeros(0, dtype=torch.int64), client=3)
    with pytest.raises(RunFailed, match="client 3 has no labelled images"):
        own_loss(ctx)
    with pytest.raises(RunFailed, match="qfedavg weighs"):
        QFedAvg().weight(ctx, 4, 1)


@pytest.mark.parametrize(("noise", "norm"), [(0.0, 0.2), (0.5, 0.2), (0.0, 1e9)], ids=["clipped", "noisy", "unclipped"])
def test_dp_fedavg_is_the_clipped_mean_with_noise(
    tiny: Any, tiny_config: Any, oracle: Any, noise: float, norm: float
) -> None:
    options = {"options.dp_fedavg.noise_multiplier": noise, "options.dp_fedavg.clipping_norm": norm}
    settings = {"strategy": ["dp_fedavg"], "seed": 4, **options}
    rounds = iter([(task, round_) for task in range(2) for round_ in range(2)])
    lengths = []

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        total = {n: torch.zeros_like(a) for n, a in w.items()}
        for o in outcomes:
            change = {n: o.trained[n] - w[n] for n in w}
            length = math.sqrt(sum(float(d.square().sum()) for d in change.values()))
            lengths.append(length)
            total = {n: t + change[n] * min(1.0, norm / length) for n, t in total.items()}
        drawn = np.random.RandomState(key(4, "server", *next(rounds), "dp_fedavg", "noise") % 2**32)
        scale = noise * norm / len(outcomes)
        noises = {n: torch.from_numpy(drawn.normal(0.0, scale, tuple(a.shape))) for n, a in w.items()}
        return {n: a + total[n] / len(outcomes) + noises[n] for n, a in w.items()}

    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        return oracle.cross_entropy(oracle.logits(w, x), y, local.known)

    want = oracle.federated(tiny_config(settings), oracle.Method(loss, join=join))
    assert all(length < norm for length in lengths) is (norm > 1e3)
    assert oracle.distance(oracle.final(tiny(settings)), want) < 1e-9


def test_noise_differs_between_seeds_and_rounds_and_not_between_runs(tiny: Any, oracle: Any) -> None:
    still = {"strategy": ["dp_fedavg"], "optimiser.lr": 1e-12, "scenario.tasks": 1}
    one, again, other = (oracle.final(tiny({**still, "federation.rounds": 1, "seed": seed})) for seed in (4, 4, 5))
    assert oracle.identical(one, again)
    assert not oracle.identical(one, other)
    start, two = (oracle.final(tiny({**still, "seed": 4, **more})) for more in (
        {"federation.rounds": 1, "options.dp_fedavg.noise_multiplier": 0.0}, {"federation.rounds": 2}
    ))  # fmt: skip
    first, second = ({n: b[n] - a[n] for n in a} for a, b in ((start, one), (one, two)))
    assert oracle.distance(first, second) > 0.1


def test_flowers_fedprox_is_fedprox_under_flowers_mean(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        distance = sum(((w[n] - local.received[n]) ** 2).sum() for n in w)
        return oracle.cross_entropy(oracle.logits(w, x), y, local.known) + 0.7 / 2 * distance

    settings = {"strategy": ["flower_fedprox"], "options.flower_fedprox.proximal_mu": 0.7, **SAMPLED}
    got = oracle.final(tiny(settings))
    assert oracle.distance(got, oracle.federated(tiny_config(settings), oracle.Method(loss))) < 1e-10
    stack = {"strategy": ["fedprox", "flower_fedavg"], "options.fedprox.mu": 0.7, **SAMPLED}
    assert oracle.distance(got, oracle.final(tiny(stack))) < 1e-12
    off = oracle.final(tiny({**settings, "options.flower_fedprox.proximal_mu": 0.0}))
    assert oracle.identical(off, oracle.final(tiny({"strategy": ["flower_fedavg"], **SAMPLED})))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "odd",
    [
        {"federation.batch_size": 1, "scenario.base": 1, "scenario.increment": 9},
        {"data.limit": 1, "partition.name": "iid", "scenario.tasks": 1},
        {"federation.clients": 12, "partition.min_size": 0, "partition.alpha": 0.1, "model.norm": "batch",
         "federation.batch_min": 2},
    ],
    ids=["batch of one, a task of one class", "one sample a class", "empty clients"],
)  # fmt: skip
def test_odd_input(tiny: Any, oracle: Any, name: str, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": [name], "federation.rounds": 1, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())
    assert result.summary["status"] == "done"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("qfedavg", "q", -1.0),
        ("qfedavg", "q", 31.0),
        ("qfedavg", "client_learning_rate", 0.0),
        ("flower_fedprox", "proximal_mu", -0.1),
        ("dp_fedavg", "clipping_norm", 0.0),
        ("dp_fedavg", "noise_multiplier", -1.0),
    ],
)
def test_wrong_options(tiny: Any, name: str, option: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"options\.{name}\.{option}") as caught:
        tiny({"strategy": [name], f"options.{name}.{option}": value})
    assert "\n" not in str(caught.value)
