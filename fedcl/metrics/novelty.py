"""How well scores tell classes that a model knows from classes that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def max_softmax(logits: Tensor, known: Tensor) -> Tensor:
    """The largest softmax probability over the known classes, (N,) float64: high for images of known classes.

    Source: Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples, ICLR 2017.

    Args:
        logits: (N, C).
        known: (C,) bool mask, at least one class.

    >>> max_softmax(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([True, True, False])).tolist()
    [0.5]
    """
    return logits.to(torch.float64)[:, known].softmax(dim=1).amax(dim=1)


def negative_energy(logits: Tensor, known: Tensor, temperature: float = 1.0) -> Tensor:
    """``T log sum_c exp(o_c / T)`` over the known classes, (N,) float64: high for images of known classes.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020, eq. 4 with its sign turned.

    >>> round(negative_energy(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([True, True, False])).item(), 4)
    0.6931
    """
    return temperature * (logits.to(torch.float64)[:, known] / temperature).logsumexp(dim=1)


def auroc(known: Tensor, unknown: Tensor) -> float | None:
    """Area under the ROC curve: how often a known image scores higher than an unknown one, ties count half.

    Args:
        known, unknown: scores of images of known and of unknown classes, (N,) and (M,); high means known.

    Returns None where one of them is empty.

    >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    if not len(known) or not len(unknown):
        return None
    order = unknown.sort().values
    below = torch.searchsorted(order, known.contiguous(), right=False)
    upto = torch.searchsorted(order, known.contiguous(), right=True)
    return float((below + upto).sum()) / (2 * len(known) * len(unknown))


def fpr_at_tpr(known: Tensor, unknown: Tensor, tpr: float = 0.95) -> float | None:
    """Share of unknown images taken for known where at least ``tpr`` of the known ones are, at the best threshold.

    A score at the threshold counts as known. Arguments as in :func:`auroc`, ``tpr`` in (0, 1].

    >>> fpr_at_tpr(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.5]), tpr=0.75)
    0.0
    """
    if not len(known) or not len(unknown):
        return None
    # The largest threshold that keeps enough of the known ones; in whole numbers, so that 0.95 of 20 is 19.
    kept = -int(-round(tpr * 1e9) * len(known) // 10**9)
    threshold = known.sort(descending=True).values[kept - 1]
    return float((unknown >= threshold).to(torch.float64).mean())
