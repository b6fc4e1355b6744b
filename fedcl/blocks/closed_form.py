"""Heads that follow from statistics of features in closed form: nothing of them is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RunFailed


def cosine_scores(features: Tensor, prototypes: Tensor, counts: Tensor) -> Tensor:
    """Cosine of each feature with each prototype; -inf for a class without a sample.

    The length of a prototype plays no part, so sums of features do as well as their means.

    Args:
        features: (B, d); one of zeros has cosine 0 with all.
        prototypes: (C, d).
        counts: (C,) int64.

    >>> cosine_scores(torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0])).tolist()
    [[1.0, -inf]]
    """
    cosine = F.linear(F.normalize(features, dim=-1), F.normalize(prototypes, dim=-1))
    return torch.where(counts > 0, cosine, -torch.inf)


def discriminant_head(means: Tensor, covariance: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis with equal priors: ``w_c = A^-1 mu_c``, ``b_c = -1/2 mu_c A^-1 mu_c``.

    ``A`` is the covariance plus ``shrink`` times the identity, so that it is positive definite also where there are
    fewer images than features.

    Args:
        means: (C, d) of the classes.
        covariance: (d, d), symmetric.
        shrink: above 0.

    Returns:
        (C, d) weights and (C,) biases.

    Raises:
        RunFailed: ``A`` is not positive definite, as for features of an encoder that has diverged.

    >>> weight, bias = discriminant_head(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 1.0)
    >>> weight.tolist(), bias.tolist()
    ([[0.5]], [-0.5])
    """
    regular = covariance + shrink * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, wrong = torch.linalg.cholesky_ex(regular)
    if int(wrong):
        largest = float(covariance.abs().max())
        raise RunFailed(
            f"the covariance of the features, with entries up to {largest:.3g}, is not positive definite with "
            f"shrink={shrink:g}: raise it, or take a lower optimiser.lr"
        )
    weight = torch.cholesky_solve(means.mT, factor).mT
    return weight, -0.5 * (weight * means).sum(dim=1)
