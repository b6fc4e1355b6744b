"""Losses between two views of the same images, on embeddings (N, d) of each: row i of both is image i.

:func:`between_views` takes one of them to the blocks of a batch. A batch without a second image or a second view has
nothing that these losses could compare: there it is exactly 0, with gradient 0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


def between_views(embeddings: Tensor, views: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of a loss over all pairs of views; 0 with fewer than two views or two images.

    Args:
        embeddings: (B, d), the views following each other as blocks of B / views rows.
        loss: of the embeddings (N, d) of two views, symmetric.

    >>> between_views(torch.tensor([[1.0], [3.0], [2.0], [3.0]]), 2, lambda a, b: (a - b).abs().sum()).item()
    1.0
    """
    blocks = embeddings.reshape(views, -1, embeddings.shape[-1]).unbind(0)
    if views < 2 or len(blocks[0]) < 2:
        return embeddings.sum() * 0.0
    return torch.stack([loss(one, other) for one, other in combinations(blocks, 2)]).mean()


def decoupled_contrastive(one: Tensor, other: Tensor, temperature: float = 0.1, sigma: float | None = None) -> Tensor:
    """DCL (Yeh et al. 2022): the positive is not in the denominator.

    Mean over both views of all images i of ``-w_i s_ii / T + log sum_{k != i} (exp(s_ik / T) + exp(t_ik / T))``, s the
    cosines to the other view, t those within the view. ``w_i = 1``, or with ``sigma`` (DCLW) the negative von
    Mises-Fisher weight ``2 - exp(s_ii / sigma) / mean_k exp(s_kk / sigma)`` without gradient.

    Args:
        one, other: (N, d), N at least 2; normalised here.

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(decoupled_contrastive(z, z, 1.0).item(), 4)
    -0.3069
    """
    one, other = F.normalize(one, dim=-1), F.normalize(other, dim=-1)
    itself = torch.eye(len(one), dtype=torch.bool, device=one.device).repeat(1, 2)
    positive = (one * other).sum(dim=-1)
    weight = torch.ones_like(positive)
    if sigma is not None:
        weight = 2 - len(one) * (positive.detach() / sigma).softmax(dim=0)

    def repulsion(anchors: Tensor, others: Tensor) -> Tensor:
        scores = anchors @ torch.cat([others, anchors]).mT / temperature
        return torch.where(itself, torch.finfo(scores.dtype).min, scores).logsumexp(dim=1)

    return (0.5 * (repulsion(one, other) + repulsion(other, one)) - weight * positive / temperature).mean()


def cross_correlation(one: Tensor, other: Tensor, eps: float = 1e-5) -> Tensor:
    """(d, d) correlations over the batch between the dimensions of two views (Zbontar et al. 2021, Barlow Twins).

    Args:
        eps: added to the variances (divided by N), as BatchNorm does: a constant dimension correlates with none.

    >>> z = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    >>> cross_correlation(z, -z).round(decimals=4)
    tensor([[-1.,  0.],
            [ 0.,  0.]])
    """

    def standardised(z: Tensor) -> Tensor:
        return (z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + eps).sqrt()

    return standardised(one).mT @ standardised(other) / len(one)


def off_diagonal(matrix: Tensor) -> Tensor:
    """A square matrix (d, d) with 0 on its diagonal."""
    return matrix * ~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)


def barlow_twins(one: Tensor, other: Tensor, redundancy: float = 5e-3) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021): ``sum_l (C_ll - 1)^2 + redundancy sum_{l != m} C_lm^2``.

    C is the :func:`cross_correlation`; the embeddings are not normalised to length 1.

    Args:
        one, other: (N, d), N at least 2.

    >>> z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    >>> round(barlow_twins(z, z, 0.5).item(), 3)
    1.0
    """
    correlation = cross_correlation(one, other)
    return (correlation.diagonal() - 1).square().sum() + redundancy * off_diagonal(correlation).square().sum()


def variance_hinge(z: Tensor, eps: float = 1e-4) -> Tensor:
    """``mean_l max(0, 1 - sqrt(Var z_l + eps))`` (Bardes et al. 2022, VICReg), the variance divided by N - 1.

    >>> round(variance_hinge(torch.tensor([[0.0, 3.0], [0.0, 1.0]]), 0.01).item(), 3)
    0.45
    """
    return F.relu(1 - (z.var(dim=0) + eps).sqrt()).mean()


def covariance_penalty(z: Tensor) -> Tensor:
    """``1/d sum_{l != m} Cov(z)_lm^2`` (Bardes et al. 2022, VICReg), the covariance divided by N - 1.

    >>> covariance_penalty(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item()
    4.0
    """
    centred = z - z.mean(dim=0)
    return off_diagonal(centred.mT @ centred / (len(z) - 1)).square().sum() / z.shape[-1]


def vicreg(
    one: Tensor, other: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """VICReg (Bardes et al. 2022), with the factors of the released code.

    ``invariance mean (a - b)^2 + variance (v(a) + v(b)) / 2 + covariance (c(a) + c(b))``, v the
    :func:`variance_hinge`, c the :func:`covariance_penalty`, the mean over images and dimensions.

    Args:
        one, other: (N, d), N at least 2; not normalised.

    >>> z = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    >>> round(vicreg(z, z, 25.0, 2.0, 1.0).item(), 3)
    0.99
    """
    distance = (one - other).square().mean()
    spread = 0.5 * (variance_hinge(one) + variance_hinge(other))
    together = covariance_penalty(one) + covariance_penalty(other)
    return invariance * distance + variance * spread + covariance * together


def negative_cosine(predictions: Tensor, targets: Tensor, views: int) -> Tensor:
    """``-cos(q_i, z_j)``, mean over images and over all ordered pairs of different views i and j.

    With two views that is SimSiam's ``-1/2 cos(q_1, z_2) - 1/2 cos(q_2, z_1)`` (Chen and He 2021, equation 2). One view
    alone gives exactly 0.

    Args:
        predictions: (B, d), the views following each other as blocks of B / views rows.
        targets: (B, d), likewise; their gradient is stopped.

    >>> q, z = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    >>> round(negative_cosine(q, z, 2).item(), 4)
    -0.8536
    """
    if views < 2:
        return predictions.sum() * 0.0
    shape = (views, -1, predictions.shape[-1])
    q, z = F.normalize(predictions, dim=-1).reshape(shape), F.normalize(targets.detach(), dim=-1).reshape(shape)
    # The sum over all j less the one with j = i.
    return -((q * z.sum(dim=0)).sum(dim=-1) - (q * z).sum(dim=-1)).mean() / (views - 1)
