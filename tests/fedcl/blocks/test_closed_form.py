"""Heads in closed form against explicit loops and inverses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedcl.blocks.closed_form import cosine_scores, discriminant_head
from fedcl.errors import RunFailed


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_cosines_are_literal_and_do_not_see_lengths() -> None:
    features, prototypes, counts = random(5, 3), random(4, 3), torch.tensor([1, 2, 0, 3])
    found = cosine_scores(features, prototypes, counts)
    for i, f in enumerate(features.tolist()):
        for c, p in enumerate(prototypes.tolist()):
            dot = sum(x * y for x, y in zip(f, p, strict=True))
            expected = dot / math.hypot(*f) / math.hypot(*p) if counts[c] else -math.inf
            assert float(found[i, c]) == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(cosine_scores(3 * features, prototypes * counts[:, None], counts), found)


def test_features_and_prototypes_of_zeros_are_no_nan() -> None:
    assert cosine_scores(torch.zeros(1, 2), torch.eye(2), torch.tensor([1, 1])).tolist() == [[0.0, 0.0]]
    assert cosine_scores(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([1])).tolist() == [[0.0]]


@pytest.mark.parametrize("images", [2, 30])
def test_the_discriminant_head_is_the_one_of_an_explicit_inverse(images: int) -> None:
    data, means = random(images, 6), random(4, 6)
    covariance = torch.cov(data.T)  # of rank 1 for two images
    weight, bias = discriminant_head(means, covariance, 0.3)
    inverse = torch.linalg.inv(covariance + 0.3 * torch.eye(6, dtype=torch.float64))
    for c in range(4):
        torch.testing.assert_close(weight[c], inverse @ means[c], rtol=0, atol=1e-10)
        torch.testing.assert_close(bias[c], -0.5 * means[c] @ inverse @ means[c], rtol=0, atol=1e-10)


def test_a_covariance_that_outgrew_the_identity_fails_in_one_line() -> None:
    spread = 1e20 * torch.ones(3, 3, dtype=torch.float64) - torch.eye(3, dtype=torch.float64)
    with pytest.raises(RunFailed, match=r"not positive definite with shrink=1: raise it.*optimiser\.lr") as caught:
        discriminant_head(random(2, 3), spread, 1.0)
    assert "\n" not in str(caught.value)


def test_without_spread_it_is_the_nearest_mean() -> None:
    features, means = random(20, 3), random(5, 3)
    weight, bias = discriminant_head(means, torch.zeros(3, 3, dtype=torch.float64), 2.0)
    nearest = torch.cdist(features, means).argmin(1)
    assert (features @ weight.T + bias).argmax(1).tolist() == nearest.tolist()
