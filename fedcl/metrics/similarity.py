"""How far a representation moved: linear CKA, drift of features, error of stored prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.metrics.moments import rounding


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Counts, means and centred Gram matrices of two representations of the same images; merged with ``+``; float64.

    Attributes:
        count: images N.
        mean_x, mean_y: (d,) and (e,).
        xx, yy, xy: ``sum (x - mean_x)(x - mean_x)ᵀ`` (d, d), the same of y (e, e), and of both (d, e).

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 3.0], [4.0, 0.0]])
    >>> parts = PairMoments.of(x[:2], 5 - 2 * x[:2]) + PairMoments.of(x[2:], 5 - 2 * x[2:])
    >>> round(parts.cka(), 12)
    1.0
    """

    count: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> PairMoments:
        """Of features (N, d) and (N, e), row i of both from the same image; N may be 0.

        Raises:
            ValueError: not two matrices with the same number of rows.
        """
        _check_pairs(x, y)
        a, b = x.to(torch.float64), y.to(torch.float64)
        mean_a, mean_b = a.sum(0) / max(len(a), 1), b.sum(0) / max(len(b), 1)
        a, b = a - mean_a, b - mean_b
        return cls(len(a), mean_a, mean_b, a.T @ a, b.T @ b, a.T @ b)

    def __add__(self, other: PairMoments) -> PairMoments:
        """Moments of the images of both.

        Raises:
            ValueError: different dimensions.
        """
        if self.xy.shape != other.xy.shape:
            raise ValueError(f"cannot add moments of {tuple(other.xy.shape)} to {tuple(self.xy.shape)}")
        count = self.count + other.count
        share = other.count / max(count, 1)
        weight = self.count * share
        x, y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        return PairMoments(
            count, self.mean_x + share * x, self.mean_y + share * y,
            self.xx + other.xx + weight * torch.outer(x, x),
            self.yy + other.yy + weight * torch.outer(y, y),
            self.xy + other.xy + weight * torch.outer(x, y),
        )  # fmt: skip

    def cka(self) -> float | None:
        """Linear CKA, ``||XᵀY||_F² / (||XᵀX||_F ||YᵀY||_F)`` of the centred features, in [0, 1].

        None where either does not vary. Source: Kornblith et al., Similarity of Neural Network Representations
        Revisited, ICML 2019.
        """
        if not (_varies(self.xx, self.mean_x, self.count) and _varies(self.yy, self.mean_y, self.count)):
            return None
        return float(self.xy.square().sum()) / float(self.xx.norm() * self.yy.norm())


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear CKA of features (N, d) and (N, e) of the same images; see :meth:`PairMoments.cka`.

    >>> linear_cka(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[3.0], [1.0]]))
    1.0
    """
    if len(x) >= min(x.shape[-1], y.shape[-1]):
        return PairMoments.of(x, y).cka()
    _check_pairs(x, y)
    # ||XᵀY||_F² is the product of the Gram matrices of the images, which are smaller here than those of the dimensions.
    grams = []
    for features in (x.to(torch.float64), y.to(torch.float64)):
        mean = features.sum(0) / max(len(features), 1)
        grams.append((features - mean) @ (features - mean).T)
        if not _varies(grams[-1], mean, len(features)):
            return None
    one, two = grams
    return float((one * two).sum()) / float(one.norm() * two.norm())


def _varies(gram: Tensor, mean: Tensor, count: int) -> bool:
    """Whether centred features with this Gram matrix, of images or of dimensions, are more than rounding."""
    return float(gram.trace()) > count * rounding(count) ** 2 * float(mean.square().sum())


@dataclass(frozen=True)
class FeatureDrift:
    """Sums over images of how far their features moved; merged with ``+``.

    Attributes:
        count: images.
        distance: sum of ``||f_now - f_then||``, in the unit of the features.
        cosine: sum of the cosines of f_now and f_then; NaN as soon as one of them is zero and has no direction.

    >>> drift = FeatureDrift.of(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    >>> drift.mean_distance(), round(drift.mean_cosine(), 6)
    (4.0, 0.6)
    """

    count: int
    distance: float
    cosine: float

    @classmethod
    def of(cls, now: Tensor, then: Tensor) -> FeatureDrift:
        """Of features (N, d) of the same images at two times.

        Raises:
            ValueError: different shapes.
        """
        _check_pairs(now, then)
        a, b = now.to(torch.float64), then.to(torch.float64)
        cosines = (a / a.norm(dim=1, keepdim=True) * (b / b.norm(dim=1, keepdim=True))).sum()
        return cls(len(a), float((a - b).norm(dim=1).sum()), float(cosines))

    def __add__(self, other: FeatureDrift) -> FeatureDrift:
        """Sums over the images of both."""
        return FeatureDrift(self.count + other.count, self.distance + other.distance, self.cosine + other.cosine)

    def mean_distance(self) -> float | None:
        """``mean ||f_now - f_then||``; None without images."""
        return self.distance / self.count if self.count else None

    def mean_cosine(self) -> float | None:
        """Mean cosine of f_now and f_then; None without images, or where a feature has no direction."""
        return self.cosine / self.count if self.count and not math.isnan(self.cosine) else None


def prototype_error(stored: Tensor, true: Tensor) -> float | None:
    """``mean_c ||μ̂_c - μ_c||`` of stored prototypes and the class means they stand for, (K, d) each; None if K = 0.

    >>> prototype_error(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
    2.5
    """
    _check_pairs(stored, true)
    if not len(stored):
        return None
    return float((stored.to(torch.float64) - true.to(torch.float64)).norm(dim=1).mean())


def _check_pairs(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(f"two matrices with a row for each image are needed; got {tuple(x.shape)}, {tuple(y.shape)}")
