"""How features may move and how they have moved: the empirical feature matrix and what is measured with it.

The matrix of Magistri et al. (2024, Elastic Feature Consolidation) says how much the class probabilities change when a
feature does. All sums over images are float64 and add up over clients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def feature_matrix(probabilities: Tensor, weight: Tensor) -> Tensor:
    """Sum over images of the empirical feature matrix of a linear head, (d, d) float64, positive semidefinite.

    ``sum_x sum_c p_c J_c^T J_c`` with J (C, d) the derivative of the log-probabilities by the feature, in closed form
    ``J = (I - 1 p^T) W`` and so ``sum_x W^T (diag(p) - p p^T) W``.

    Args:
        probabilities: (B, C), each row adding up to 1.
        weight: (C, d) rows of the head.

    >>> feature_matrix(torch.tensor([[0.5, 0.5]]), torch.tensor([[2.0], [0.0]])).tolist()
    [[1.0]]
    """
    p, w = probabilities.to(torch.float64), weight.to(torch.float64)
    mean = p @ w
    return (w.mT * p.sum(dim=0)) @ w - mean.mT @ mean


def elastic(features: Tensor, anchor: Tensor, matrix: Tensor, weight: float, damping: float) -> Tensor:
    """``mean_x (f - f*)^T (lambda E + eta I) (f - f*)``.

    Args:
        features: (B, d) f.
        anchor: (B, d) f* of the same images by the earlier model; its gradient is stopped.
        matrix: (d, d) E, symmetric.
        weight, damping: lambda and eta.

    >>> elastic(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[2.0]]), 1.0, 0.5).item()
    10.0
    """
    moved = features - anchor.detach()
    return (weight * ((moved @ matrix) * moved).sum(dim=1) + damping * moved.square().sum(dim=1)).mean()


def nearness(features: Tensor, means: Tensor, matrix: Tensor) -> Tensor:
    """``-(f - p_c)^T E (f - p_c)``, (B, C): how near each feature is to each mean, in float64; 0 is nearest.

    Args:
        features: (B, d).
        means: (C, d).
        matrix: (d, d) E, symmetric and positive semidefinite.

    >>> nearness(torch.tensor([[3.0]]), torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0]])).tolist()
    [[-8.0, 0.0]]
    """
    f, p, e = (a.to(torch.float64) for a in (features, means, matrix))
    return 2 * f @ e @ p.mT - ((f @ e) * f).sum(dim=1, keepdim=True) - ((p @ e) * p).sum(dim=1)


def drift_sums(
    before: Tensor, after: Tensor, means: Tensor, matrix: Tensor, lowest: Tensor, highest: Tensor, width: float
) -> tuple[Tensor, Tensor]:
    """What moves the means with the features around them: ``sum_j w_cj (f_j - f*_j)`` (C, d) and ``sum_j w_cj`` (C,).

    ``w_cj = exp(D_cj / (2 sigma^2))`` with D the :func:`nearness` brought to [0, 1] by its extremes over all images and
    classes. All images weigh the same where the extremes are equal. What lies beyond the extremes, as they may be those
    of other clients, weighs as much as they do.

    Args:
        before, after: (B, d) features f* and f of the same images by the earlier and the present model.
        lowest, highest: scalars, the extremes.
        width: sigma.
    """
    near = nearness(before, means, matrix)
    spread = highest - lowest
    scaled = torch.where(spread > 0, (near - lowest) / torch.where(spread > 0, spread, 1.0), 0.0).clamp(0, 1)
    weights = torch.exp(scaled / (2 * width**2))
    return weights.mT @ (after.to(torch.float64) - before.to(torch.float64)), weights.sum(dim=0)


def class_slots(classes: Tensor, numbers: Tensor) -> Tensor:
    """(n,) int64: a class of the mask for each number in [0, 1), all as likely; classes below the first where none is.

    >>> class_slots(torch.tensor([False, True, True]), torch.tensor([0.1, 0.9])).tolist()
    [1, 2]
    """
    # A sort in place of an index of the true ones: its shape does not depend on the mask.
    order = torch.argsort(~classes, stable=True)
    count = classes.sum()
    return order[torch.minimum((numbers * count).long(), (count - 1).clamp(min=0))]


def drawn_features(means: Tensor, factors: Tensor, noise: Tensor) -> Tensor:
    """Draws (n, d) of Gaussians: ``mu + L e`` with ``L L^T`` the covariance.

    Args:
        means: (n, d).
        factors: (n, d, d) lower triangles L.
        noise: (n, d) standard normal e.
    """
    return means + (factors @ noise[..., None])[..., 0]
