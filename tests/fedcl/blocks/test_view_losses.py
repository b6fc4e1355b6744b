"""Losses between views against sums over single numbers, and against lightly where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.view_losses import (
    barlow_twins,
    between_views,
    cross_correlation,
    decoupled_contrastive,
    negative_cosine,
    vicreg,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def drawn(rows: int, seed: int = 0, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())


def yeh(one: Tensor, other: Tensor, temperature: float, sigma: float | None) -> Tensor:
    """Decoupled contrastive loss, anchor by anchor: all rows of other images repel, its other view attracts."""
    z, n = torch.cat([one, other]), len(one)
    total = torch.zeros((), dtype=z.dtype)
    for i in range(2 * n):
        other_view = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k not in (i, other_view)]
        below = torch.stack([torch.exp(cosine(z[i], z[k]) / temperature) for k in others]).sum()
        weight = 1.0
        if sigma is not None:
            scaled = [math.exp(float(cosine(z[k], z[k + n]).detach()) / sigma) for k in range(n)]
            weight = 2 - scaled[i % n] / (sum(scaled) / n)
        total = total - weight * cosine(z[i], z[other_view]) / temperature + torch.log(below)
    return total / (2 * n)


def zbontar(one: Tensor, other: Tensor, redundancy: float) -> Tensor:
    """Barlow Twins, entry by entry of the correlation matrix."""
    n, width = one.shape
    total = torch.zeros((), dtype=one.dtype)
    for i in range(width):
        for j in range(width):
            a, b = one[:, i], other[:, j]
            mean_a, mean_b = sum(a) / n, sum(b) / n
            spread_a = sum((v - mean_a) ** 2 for v in a) / n + 1e-5
            spread_b = sum((v - mean_b) ** 2 for v in b) / n + 1e-5
            together = sum((a[k] - mean_a) * (b[k] - mean_b) for k in range(n)) / n
            c = together / torch.sqrt(spread_a * spread_b)
            total = total + ((c - 1) ** 2 if i == j else redundancy * c**2)
    return total


def bardes(one: Tensor, other: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """VICReg with its three terms as sums."""
    n, width = one.shape
    invariance = torch.stack([(one[k, i] - other[k, i]) ** 2 for k in range(n) for i in range(width)]).mean()
    variance, covariance = torch.zeros((), dtype=one.dtype), torch.zeros((), dtype=one.dtype)
    for z in (one, other):
        mean = [z[:, i].sum() / n for i in range(width)]
        for i in range(width):
            for j in range(width):
                entry = torch.stack([(z[k, i] - mean[i]) * (z[k, j] - mean[j]) for k in range(n)]).sum() / (n - 1)
                if i == j:
                    deviation = torch.sqrt(entry + 1e-4)
                    variance = variance + (1 - deviation if deviation < 1 else 0 * deviation) / width / 2
                else:
                    covariance = covariance + entry**2 / width
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


def equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


ORACLES: dict[str, tuple[Loss, Loss]] = {
    "dcl": (lambda a, b: decoupled_contrastive(a, b, 0.3), lambda a, b: yeh(a, b, 0.3, None)),
    "dclw": (lambda a, b: decoupled_contrastive(a, b, 0.3, 0.5), lambda a, b: yeh(a, b, 0.3, 0.5)),
    "barlow": (lambda a, b: barlow_twins(a, b, 0.02), lambda a, b: zbontar(a, b, 0.02)),
    "vicreg": (lambda a, b: vicreg(a, b, 3.0, 5.0, 2.0), lambda a, b: bardes(a, b, (3.0, 5.0, 2.0))),
}


@pytest.mark.parametrize("images", [2, 3, 7])
@pytest.mark.parametrize("name", ORACLES)
def test_value_and_gradient_are_the_papers(name: str, images: int) -> None:
    ours, theirs = ORACLES[name]
    # Below 1 and above 1: both sides of VICReg's hinge.
    one = (drawn(images, 1).detach() * torch.tensor([0.3, 0.5, 1.0, 2.0, 3.0])).requires_grad_()
    other = drawn(images, 2)
    equal(ours(one, other), theirs(one, other), [one, other])


REFERENCE: dict[str, tuple[Loss, str, dict[str, Any]]] = {
    "dcl": (lambda a, b: decoupled_contrastive(a, b, 0.2), "DCLLoss", {"temperature": 0.2}),
    "dclw": (lambda a, b: decoupled_contrastive(a, b, 0.2, 0.7), "DCLWLoss", {"temperature": 0.2, "sigma": 0.7}),
    "barlow": (barlow_twins, "BarlowTwinsLoss", {}),
    "vicreg": (vicreg, "VICRegLoss", {}),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("name", REFERENCE)
def test_value_and_gradient_are_lightlys(name: str) -> None:
    losses = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    ours, theirs, arguments = REFERENCE[name]
    one, other = drawn(9, 3), drawn(9, 4)
    equal(ours(one, other), getattr(losses, theirs)(**arguments)(one, other), [one, other])


def test_negative_cosine_is_the_mean_of_both_directions_of_lightlys() -> None:
    losses = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    q, z, cosines = drawn(8, 1), drawn(8, 2), losses.NegativeCosineSimilarity()
    theirs = 0.5 * (cosines(q[:4], z[4:].detach()) + cosines(q[4:], z[:4].detach()))
    equal(negative_cosine(q, z, 2), theirs, [q])


@pytest.mark.parametrize("views", [2, 3])
def test_negative_cosine_pair_by_pair(views: int) -> None:
    q, z = drawn(4 * views, 1), drawn(4 * views, 2)
    order = list(permutations(range(views), 2))
    expected = torch.stack([-cosine(q[4 * i + k], z[4 * j + k].detach()) for i, j in order for k in range(4)]).mean()
    ours = negative_cosine(q, z, views)
    (missing,) = torch.autograd.grad(ours, z, allow_unused=True)
    assert missing is None
    equal(negative_cosine(q, z, views), expected, [q])


def test_one_view_has_no_other_to_predict() -> None:
    q = drawn(3)
    loss = negative_cosine(q, drawn(3, 1), 1)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, q)[0].any()


def test_more_views_are_the_mean_over_their_pairs() -> None:
    z = drawn(12, 5)
    blocks = z.reshape(4, 3, 5)
    expected = torch.stack([zbontar(blocks[i], blocks[j], 0.1) for i, j in combinations(range(4), 2)]).mean()
    equal(between_views(z, 4, lambda a, b: barlow_twins(a, b, 0.1)), expected, [z])


@pytest.mark.parametrize("name", ORACLES)
def test_no_order_of_the_views_is_preferred(name: str) -> None:
    ours, one, other = ORACLES[name][0], drawn(4, 1), drawn(4, 2)
    torch.testing.assert_close(ours(one, other), ours(other, one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "views"), [(4, 1), (2, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize("name", ORACLES)
def test_without_a_second_image_or_view_it_is_exactly_zero(name: str, rows: int, views: int) -> None:
    z = drawn(rows)
    loss = between_views(z, views, ORACLES[name][0])
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_collapsed_embeddings_have_a_finite_loss_and_gradient(name: str, value: float) -> None:
    z = torch.full((6, 5), value, dtype=torch.float64, requires_grad=True)
    loss = between_views(z, 2, ORACLES[name][0])
    assert math.isfinite(loss.item())
    assert loss.item() != 0
    assert bool(torch.isfinite(torch.autograd.grad(loss, z)[0]).all())


def test_a_constant_dimension_correlates_with_none() -> None:
    z = drawn(6).detach() * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    found = cross_correlation(z, z)
    assert not found[1].any()
    assert not found[:, 1].any()


@pytest.mark.parametrize("name", [*ORACLES, "cosine"])
def test_stacked_clients_are_the_same_as_one_by_one(name: str) -> None:
    def loss(z: Tensor) -> Tensor:
        return negative_cosine(z, z, 2) if name == "cosine" else between_views(z, 2, ORACLES[name][0])

    z = torch.stack([drawn(8, seed).detach() for seed in range(3)])
    together = torch.func.vmap(torch.func.grad_and_value(loss))(z)
    for k in range(3):
        gradient, value = torch.func.grad_and_value(loss)(z[k])
        torch.testing.assert_close(together[1][k], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together[0][k], gradient, rtol=1e-11, atol=1e-12)
