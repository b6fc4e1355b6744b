"""The feature matrix against autograd's Jacobians; drift of means and draws against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedcl.blocks.feature_drift import class_slots, drawn_features, drift_sums, elastic, feature_matrix, nearness


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_matrix(features: Tensor, weight: Tensor) -> Tensor:
    """Sum of p_c J_c J_c^T over images and classes, with J of autograd."""
    total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for f in features:
        jacobian = torch.autograd.functional.jacobian(lambda f: torch.log_softmax(weight @ f, 0), f)
        p = torch.softmax(weight @ f, 0)
        for c in range(len(weight)):
            total += p[c] * torch.outer(jacobian[c], jacobian[c])
    return total


@pytest.mark.parametrize("classes", [1, 2, 4, 9])
def test_the_feature_matrix_is_that_of_autograds_jacobians(classes: int) -> None:
    features, weight = normal(7, 6), normal(classes, 6, seed=1)
    found = feature_matrix((features @ weight.T).softmax(1), weight)
    torch.testing.assert_close(found, literal_matrix(features, weight), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(found)
    assert values.min() > -1e-12
    assert int((values > 1e-10).sum()) == min(6, classes - 1)


def test_feature_matrices_add_up_and_leave_out_what_is_not_known() -> None:
    features, weight = normal(7, 6), normal(5, 6, seed=1)
    p = (features @ weight[:3].T).softmax(1)
    whole = feature_matrix(p, weight[:3])
    parts = feature_matrix(p[:2], weight[:3]) + feature_matrix(p[2:], weight[:3])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    padded = torch.cat([p, torch.zeros(7, 2, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(feature_matrix(padded, weight), whole, rtol=0, atol=1e-12)


def test_the_elastic_term_and_its_gradients() -> None:
    features, anchor = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    root = normal(3, 3, seed=2)
    matrix = root @ root.T
    found = elastic(features, anchor, matrix, 10.0, 0.1)
    total = 0.0
    for f, old in zip(features, anchor, strict=True):
        moved = f - old
        for i in range(3):
            total = total + 0.1 * moved[i] ** 2 / 4
            for j in range(3):
                total = total + 10.0 * moved[i] * matrix[i, j] * moved[j] / 4
    torch.testing.assert_close(found, total, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(found, features)
    expected = 2 * (features - anchor) @ (10.0 * matrix + 0.1 * torch.eye(3, dtype=torch.float64)) / 4
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(elastic(features, anchor, matrix, 10.0, 0.1), anchor)
    by_weight = (elastic(features, anchor, matrix, 1e-3, 0.0) - elastic(features, anchor, matrix, 0.0, 0.0)) / 1e-3
    torch.testing.assert_close(by_weight, elastic(features, anchor, matrix, 1.0, 0.0), rtol=1e-10, atol=0)


def test_the_drift_of_means_is_the_literal_one() -> None:
    before, after, means = normal(9, 4), normal(9, 4, seed=1), normal(3, 4, seed=2)
    root = normal(4, 2, seed=3)
    matrix, width = root @ root.T, 0.7
    near = [[-float((f - p) @ matrix @ (f - p)) for p in means] for f in before]
    torch.testing.assert_close(nearness(before, means, matrix), torch.tensor(near, dtype=torch.float64))
    low, high = min(map(min, near)), max(map(max, near))
    sums = torch.zeros(3, 4, dtype=torch.float64)
    weights = torch.zeros(3, dtype=torch.float64)
    for j in range(9):
        for c in range(3):
            w = math.exp((near[j][c] - low) / (high - low) / (2 * width**2))
            weights[c] += w
            sums[c] += w * (after[j] - before[j])
    bounds = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    found = drift_sums(before, after, means, matrix, *bounds, width)
    torch.testing.assert_close(found, (sums, weights), rtol=1e-10, atol=1e-10)
    first = drift_sums(before[:5], after[:5], means, matrix, *bounds, width)
    rest = drift_sums(before[5:], after[5:], means, matrix, *bounds, width)
    torch.testing.assert_close((first[0] + rest[0], first[1] + rest[1]), found, rtol=1e-12, atol=1e-12)


def test_features_beyond_the_extremes_weigh_as_much_as_they_do() -> None:
    before, means = torch.tensor([[0.0], [10.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    low, high = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(-0.999, dtype=torch.float64)
    sums, weights = drift_sums(before, before + 1, means, matrix, low, high, 0.2)
    torch.testing.assert_close(weights, torch.tensor([math.exp(12.5) + 1], dtype=torch.float64))
    torch.testing.assert_close(sums / weights[:, None], torch.ones(1, 1, dtype=torch.float64))


def test_features_as_near_as_each_other_move_a_mean_alike() -> None:
    before, after = normal(5, 2), normal(5, 2, seed=1)
    matrix, same = torch.zeros(2, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    sums, weights = drift_sums(before, after, normal(1, 2, seed=2), matrix, same, same, 0.2)
    torch.testing.assert_close(sums / weights[:, None], (after - before).mean(0, keepdim=True))
    assert weights.tolist() == [5.0]


def test_class_slots_are_even_over_the_mask() -> None:
    mask = torch.tensor([False, True, False, True, True])
    numbers = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(class_slots(mask, numbers), minlength=5).tolist()
    assert counts[0] == counts[2] == 0
    assert all(900 < counts[c] < 1100 for c in (1, 3, 4))
    assert class_slots(mask, torch.tensor([0.0, 0.999999999])).tolist() == [1, 4]
    masks = torch.stack([mask, ~mask])
    stacked = torch.vmap(class_slots)(masks, numbers[:20].reshape(2, 10))
    assert torch.equal(stacked[1], class_slots(~mask, numbers[10:20]))


def test_draws_have_the_means_and_covariances() -> None:
    root = normal(3, 3)
    factor = torch.linalg.cholesky(root @ root.T)
    mean = normal(3, seed=1)
    noise = normal(20000, 3, seed=2)
    drawn = drawn_features(mean.expand(20000, 3), factor.expand(20000, 3, 3), noise)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.T.cov(), root @ root.T, rtol=0, atol=0.15)
    torch.testing.assert_close(drawn[7], mean + factor @ noise[7], rtol=0, atol=1e-12)
