"""Flower's strategies that need more than models and weights: losses of the clients, a seed of the noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl.bridges.flower import FlowerAggregator
from fedcl.errors import RunFailed
from fedcl.federation import flower_internals as flower

SHAPES = {"encoder.weight": (3, 4), "scale": (), "none": (0, 2), "head.weight": (2, 3)}


def arrays(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Normal numbers of the shapes above."""
    source = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(shape, generator=source, dtype=torch.float64) for n, shape in SHAPES.items()}


def cohort(current: dict[str, Tensor], clients: int, scale: float = 0.1) -> list[dict[str, Tensor]]:
    """Models around the current one."""
    noises = [arrays(1 + client, scale) for client in range(clients)]
    return [{n: a + noise[n] for n, a in current.items()} for noise in noises]


def flat(values: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([v.numpy().ravel() for v in values.values()])


def qfedavg(x: np.ndarray, ws: np.ndarray, losses: np.ndarray, q: float, lr: float) -> np.ndarray:
    """Li et al. 2020, Algorithm 2: w - sum_k Delta_k / sum_k h_k; Flower adds 1e-10 to each loss."""
    top, bottom = np.zeros_like(x), 0.0
    for w, loss in zip(ws, losses + 1e-10, strict=True):
        delta = (x - w) / lr
        top += loss**q * delta
        bottom += q * loss ** (q - 1) * sum(d * d for d in delta) + loss**q / lr
    return x - top / bottom


def private_mean(x: np.ndarray, ws: np.ndarray, norm: float) -> np.ndarray:
    """McMahan et al. 2018, flat clipping: w + mean_k Delta_k min(1, S / ||Delta_k||), before the noise."""
    total = np.zeros_like(x)
    for w in ws:
        length = float(sum(d * d for d in w - x)) ** 0.5
        total += (w - x) * (norm / length if length > norm else 1.0)
    return x + total / len(ws)


@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("clients", [1, 3, 20])
def test_qfedavg_follows_the_paper(q: float, clients: int) -> None:
    current = arrays(0)
    updates = cohort(current, clients)
    losses = np.array([0.5 * c % 1.7 for c in range(clients)])  # the first is 0
    got, state = FlowerAggregator("qfedavg", {"q": q, "client_learning_rate": 0.3}).aggregate(
        current, updates, [1.0 + c for c in range(clients)], {}, 1, losses.tolist()
    )
    ws = np.stack([flat(u) for u in updates])
    np.testing.assert_allclose(flat(got), qfedavg(flat(current), ws, losses, q, 0.3), rtol=0, atol=1e-12)
    assert state == {}
    if q == 0:
        np.testing.assert_allclose(flat(got), ws.mean(axis=0), rtol=0, atol=1e-13)


def test_qfedavg_with_empty_clients_keeps_losses_with_their_clients() -> None:
    current = arrays(0)
    updates = cohort(current, 3)
    rule = FlowerAggregator("qfedavg", {"q": 1.0, "client_learning_rate": 0.1})
    got, _ = rule.aggregate(current, [updates[0], current, *updates[1:]], [1, 0, 1, 1], {}, 1, [0.5, 9.0, 1.0, 2.0])
    want, _ = rule.aggregate(current, updates, [1, 1, 1], {}, 1, [0.5, 1.0, 2.0])
    assert all(torch.equal(got[k], want[k]) for k in want)
    swapped, _ = rule.aggregate(current, updates, [1, 1, 1], {}, 1, [2.0, 1.0, 0.5])
    assert not torch.equal(swapped["scale"], want["scale"])
    for losses in (None, [1.0, -0.1, 1.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(RunFailed, match="QFedAvg needs each client's loss"):
            rule.aggregate(current, updates, [1, 1, 1], {}, 1, losses)


@pytest.mark.parametrize("clients", [1, 2, 20])
def test_the_private_mean_clips_each_update_and_adds_noise_of_the_right_size(clients: int) -> None:
    current = arrays(0)
    updates = [*cohort(current, clients - 1, scale=0.5), cohort(current, 1, scale=0.01)[0]]
    ws = np.stack([flat(u) for u in updates])
    clipped = private_mean(flat(current), ws, 1.0)
    plain = FlowerAggregator("dp_fedavg", {"noise_multiplier": 0.0, "clipping_norm": 1.0})
    got, state = plain.aggregate(current, updates, [1.0] * clients, {}, 1, seed=5)
    np.testing.assert_allclose(flat(got), clipped, rtol=0, atol=1e-13)
    assert state == {}
    rule = FlowerAggregator("dp_fedavg", {"noise_multiplier": 3.0, "clipping_norm": 1.0})
    noisy, _ = rule.aggregate(current, updates, [1.0] * clients, {}, 1, seed=2**40 + 5)
    drawn = np.random.RandomState(5)
    noise = np.concatenate([drawn.normal(0, 3.0 * 1.0 / clients, v.numel()) for v in current.values()])
    np.testing.assert_allclose(flat(noisy), clipped + noise, rtol=0, atol=1e-12)
    other, _ = rule.aggregate(current, updates, [1.0] * clients, {}, 1, seed=6)
    assert not torch.equal(other["scale"], noisy["scale"])
    with pytest.raises(RunFailed, match="needs a seed"):
        rule.aggregate(current, updates, [1.0] * clients, {}, 1)


def test_a_client_that_learnt_nothing_is_averaged_with_noise_like_the_others() -> None:
    """Flower divides the norm allowed by that of the update: with a plain float that is an error for 0."""
    current = arrays(0)
    moved = {k: v + 0.01 for k, v in current.items()}
    rule = FlowerAggregator("dp_fedavg", {"noise_multiplier": 0.0, "clipping_norm": 1.0})
    got, _ = rule.aggregate(current, [current, moved], [1.0, 1.0], {}, 1, seed=1)
    np.testing.assert_allclose(flat(got), flat(current) + 0.005, rtol=0, atol=1e-13)


def test_flowers_adaptive_clipping_runs_away_from_its_quantile() -> None:
    """Why it is left out: where all updates are clipped, Andrew et al. 2021 raise the norm; Flower lowers it."""
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg

    wrapper = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.0, 2, initial_clipping_norm=0.1)
    wrapper.current_arrays = flower.pack({"w": torch.zeros(3)})
    content = flower.RecordDict({"arrays": flower.pack({"w": torch.ones(3)})})
    content["metrics"] = flower.MetricRecord({"num-examples": 1.0})
    wrapper.aggregate_train(1, [flower.make_reply(content, node) for node in (2, 3)])
    assert wrapper.clipping_norm == pytest.approx(0.1 * np.exp(-0.2 * (1 - 0.5)))
    assert wrapper.clipping_norm < 0.1 < 0.1 * np.exp(-0.2 * (0 - 0.5))
