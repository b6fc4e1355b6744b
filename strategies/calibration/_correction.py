"""Two numbers that correct the scores of new classes, fitted to sums over images that may lie anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedcl.step import Arrays


class Correction(nn.Module):
    """``alpha_c o_c + beta_c``, which leaves the scores of a class alone until its increment is corrected."""

    class_axis: ClassVar[Mapping[str, int]] = {"alpha": 0, "beta": 0}
    fixed: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(0))
        self.beta = nn.Parameter(torch.zeros(0))

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`fedcl.models.heads.ClassArrays`."""
        return torch.full((len(class_ids),), 1.0 if array == "alpha" else 0.0)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return self.alpha * logits + self.beta


def correction_sums(
    logits: Tensor, labels: Tensor, classes: Tensor, new: Tensor, weights: Tensor, point: Tensor
) -> Arrays:
    """The weighted cross entropy of corrected scores, summed over images, with its slope and curvature in the point.

    Scores are ``alpha o_c + beta`` for new classes and ``o_c`` for the others (Wu et al. 2019).

    Args:
        logits: (n, C), n may be 0.
        labels: (n,) int64, each in ``classes``.
        classes, new: (C,) bool, what the softmax runs over and which of it is corrected.
        weights: (C,) float64, of an image by its class.
        point: (2,) float64, alpha and beta.

    Returns:
        ``loss`` (), ``slope`` (2,) and ``curvature`` (2, 2), float64.

    >>> two, point = torch.tensor([True, True]), torch.tensor([1.0, 0.0], dtype=torch.float64)
    >>> ones = torch.ones(2, dtype=torch.float64)
    >>> correction_sums(torch.zeros(1, 2), torch.tensor([0]), two, ~two, ones, point)["slope"].tolist()
    [0.0, 0.0]
    """
    scores = logits.double()
    inner = torch.stack([torch.where(new, scores, 0.0), new.double().expand_as(scores)], dim=-1)
    corrected = torch.where(new, point[0] * scores + point[1], scores)
    logs = torch.where(classes, corrected, torch.finfo(torch.float64).min).log_softmax(dim=-1)
    rows, weight = torch.arange(len(labels), device=labels.device), weights[labels]
    mean = torch.einsum("nc,nci->ni", logs.exp(), inner)
    second = torch.einsum("nc,nci,ncj->nij", logs.exp(), inner, inner) - mean[:, :, None] * mean[:, None, :]
    return {
        "loss": -(weight * logs[rows, labels]).sum(),
        "slope": weight @ (mean - inner[rows, labels]),
        "curvature": (weight[:, None, None] * second).sum(dim=0),
    }


def best_correction(measure: Callable[[Tensor], Arrays], decay: float, steps: int) -> Tensor:
    """(alpha, beta) of the least ``loss + decay / 2 ((alpha - 1)^2 + beta^2)``, by damped Newton steps from (1, 0).

    The objective is convex, and a step that would raise it is not taken.

    Args:
        measure: :func:`correction_sums` at a point, over all images.
        steps: most points to measure after the first.
    """
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def objective(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found, away = measure(point), point - start
        pull = decay * torch.eye(2, dtype=torch.float64)
        value = found["loss"] + decay / 2 * away.square().sum()
        return value, found["slope"] + decay * away, found["curvature"] + pull

    point, damping = start, 1e-3
    value, slope, curvature = objective(point)
    for _ in range(steps):
        if float(slope.abs().max()) < 1e-10:
            break
        # Damping stays above 0: without a pull the curvature vanishes where all images are classified right.
        tried = point - torch.linalg.solve(curvature + damping * torch.eye(2, dtype=torch.float64), slope)
        found = objective(tried)
        better = bool(found[0] <= value)
        if better:
            point, (value, slope, curvature) = tried, found
        damping = max(damping / 10, 1e-6) if better else damping * 10
    return point


def class_weights(counts: Tensor) -> Tensor:
    """(C,) float64 that make a weighted sum over images the mean over classes of the means within them.

    >>> class_weights(torch.tensor([4, 0, 1])).tolist()
    [0.125, 0.0, 0.5]
    """
    return torch.where(counts > 0, 1.0 / (counts.clamp(min=1).double() * (counts > 0).sum()), 0.0)
