"""Counts, means and scatter of features by class: what class means, covariances and Gram matrices are made of.

The state of a union of samples is the sum of the states of its parts, whoever holds them. Means and centred scatter are
kept, not raw sums of squares, so that nothing cancels when features lie far from the origin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.blocks.statistics import class_sums


def rounding(count: int) -> float:
    """How far a float64 mean of so many equal numbers may lie from them, relative to their size.

    What varies by no more does not vary at all: dividing by it would make numbers out of rounding.
    """
    return max(count, 64) * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """First and second moments of features (N, d) with labels; immutable, merged with ``+``; all float64.

    Attributes:
        counts: samples of each class, (C,) int64.
        means: class means, (C, d); zeros for a class without samples.
        within: ``sum_i (h_i - μ_y)(h_i - μ_y)ᵀ`` over all classes, (d, d).
        spread: ``sum_i ||h_i - μ_c||²`` of each class, (C,).

    >>> x, y = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> parts = ClassMoments.of(x[:1], y[:1], 2) + ClassMoments.of(x[1:], y[1:], 2)
    >>> parts.means.flatten().tolist(), parts.within.tolist(), parts.spread.tolist()
    ([1.0, 5.0], [[2.0]], [2.0, 0.0])
    """

    counts: Tensor
    means: Tensor
    within: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> ClassMoments:
        """Of features (N, d) with labels (N,) int64 in [0, C); N may be 0.

        Raises:
            ValueError: different lengths, or a label outside [0, C).
        """
        check_labels(features, labels, num_classes)
        x = features.to(torch.float64)
        sums, counts = class_sums([(x, labels)], lambda features: features, num_classes, x.shape[1])
        means = sums / counts.clamp(min=1)[:, None]
        away = x - means[labels]
        spread = x.new_zeros(num_classes).index_add(0, labels, away.square().sum(1))
        return cls(counts, means, away.T @ away, spread)

    def __add__(self, other: ClassMoments) -> ClassMoments:
        """Moments of the samples of both.

        Raises:
            ValueError: different numbers of classes or dimensions.
        """
        if self.means.shape != other.means.shape:
            raise ValueError(f"cannot add moments of {tuple(other.means.shape)} to {tuple(self.means.shape)}")
        counts = self.counts + other.counts
        share = other.counts.to(torch.float64) / counts.clamp(min=1)
        gap = other.means - self.means
        weight = self.counts * share
        return ClassMoments(
            counts,
            self.means + share[:, None] * gap,
            self.within + other.within + (weight[:, None] * gap).T @ gap,
            self.spread + other.spread + weight * gap.square().sum(1),
        )

    @property
    def present(self) -> Tensor:
        """(C,) bool: classes with samples."""
        return self.counts > 0

    @property
    def total(self) -> int:
        """Samples of all classes."""
        return int(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """Mean of all samples, (d,)."""
        return (self.counts[:, None] * self.means).sum(0) / max(self.total, 1)

    @property
    def constant(self) -> bool:
        """Whether all features are the same one, or there are none."""
        allowed = self.total * rounding(self.total) ** 2 * float(self.mean.square().sum())
        return float(self.scatter().trace()) <= allowed

    def scatter(self) -> Tensor:
        """``sum_i (h_i - μ)(h_i - μ)ᵀ`` about the mean of all samples, (d, d)."""
        away = self.means - self.mean
        return self.within + (self.counts[:, None] * away).T @ away


def check_labels(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raises ValueError unless there is one label in [0, C) for each row of features (N, d)."""
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features are (N, d) and labels (N,); got {tuple(features.shape)}, {tuple(labels.shape)}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(f"labels lie in [0, {num_classes}); got {int(labels.min())} to {int(labels.max())}")
