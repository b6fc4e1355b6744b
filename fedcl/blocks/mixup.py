"""Mixup (Zhang et al. 2018): two images as one, how much of each, and the cross entropy with the labels of both."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 4096


@lru_cache(maxsize=16)
def _quantiles(alpha: float) -> npt.NDArray[np.float64]:
    """Quantiles of Beta(alpha, alpha) on an even grid, no tensor: one made inside a transform must not outlive it."""
    from scipy.special import betaincinv

    return np.asarray(betaincinv(alpha, alpha, np.linspace(0.0, 1.0, _STEPS + 1)))


def beta_quantile(uniform: Tensor, alpha: float) -> Tensor:
    """Uniform numbers in (0, 1) made Beta(alpha, alpha), by a table: within 1e-6 for alpha from 0.1 to 1.

    Args:
        uniform: of any shape.
        alpha: above 0.

    >>> beta_quantile(torch.tensor([0.25, 0.5]), 1.0)
    tensor([0.2500, 0.5000])
    """
    table = torch.from_numpy(_quantiles(alpha)).to(uniform.device)
    place = uniform.to(torch.float64) * _STEPS
    below = place.floor().clamp(max=_STEPS - 1)
    low, high = table[below.long()], table[below.long() + 1]
    return (low + (place - below) * (high - low)).to(uniform.dtype)


def mixed(images: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """``(1 - share) images[first] + share images[second]``.

    Args:
        images: (N, ...).
        first, second: (M,) int64 rows.
        share: (M,) in [0, 1].

    >>> mixed(torch.tensor([[0.0], [4.0]]), torch.tensor([0]), torch.tensor([1]), torch.tensor([0.25]))
    tensor([[1.]])
    """
    weight = share.to(images.dtype).view(-1, *[1] * (images.dim() - 1))
    return (1 - weight) * images[first] + weight * images[second]


def mixed_cross_entropy(
    logits: Tensor, labels: tuple[Tensor, Tensor], share: Tensor, classes: tuple[Tensor, Tensor]
) -> Tensor:
    """Mean of ``(1 - share) CE(y_a) + share CE(y_b)``, each softmax over its ``classes`` only.

    Args:
        logits: (B, C).
        labels: of the first and of the second images, (B,) int64 each.
        share: (B,) of the second images.
        classes: for the first and for the second labels, (C,) or (B, C) bool.

    >>> both, half = torch.tensor([True, True]), torch.tensor([0.5])
    >>> y = (torch.tensor([0]), torch.tensor([1]))
    >>> round(mixed_cross_entropy(torch.zeros(1, 2), y, half, (both, both)).item(), 4)
    0.6931
    """
    lowest = torch.finfo(logits.dtype).min
    first, second = (
        F.cross_entropy(torch.where(mask, logits, lowest), label, reduction="none")
        for mask, label in zip(classes, labels, strict=True)
    )
    weight = share.to(logits.dtype)
    return ((1 - weight) * first + weight * second).mean()
