"""The shape of a feature space: the hypersphere, neural collapse, its spectrum, units that do nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.metrics.moments import ClassMoments, rounding

_ROWS = 1024


def alignment(features: Tensor, positives: Tensor) -> float | None:
    """``mean ||ẑ - ẑ⁺||²`` over positive pairs (N, d) and (N, d), in [0, 4].

    None without pairs, or where a feature is zero and has no direction.

    Source: Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere, ICML 2020, with their α = 2.

    >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    2.0
    """
    if not len(features) or _aimless(features) or _aimless(positives):
        return None
    gaps = F.normalize(features.to(torch.float64), dim=1) - F.normalize(positives.to(torch.float64), dim=1)
    return float(gaps.square().sum(1).mean())


def _aimless(features: Tensor) -> bool:
    return not bool((features != 0).any(dim=1).all())


def uniformity(features: Tensor, t: float = 2.0) -> float | None:
    """``log mean_{i≠j} exp(-t ||ẑ_i - ẑ_j||²)`` of features (N, d), at most 0.

    None with fewer than two, or where a feature is zero and has no direction.

    Source: as :func:`alignment`, with their t = 2. The lower, the more evenly the features cover the sphere.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-5.0, 0.0]])), 6)
    -8.0
    """
    count = len(features)
    if count < 2 or _aimless(features):
        return None
    unit = F.normalize(features, dim=1)
    own = torch.arange(count, device=unit.device)
    total = 0.0
    for rows in torch.split(own, _ROWS):
        distances = (2.0 - 2.0 * (unit[rows] @ unit.T)).clamp_(min=0.0)
        kernel = distances.mul_(-t).exp_()
        kernel[torch.arange(len(rows), device=unit.device), rows] = 0.0
        total += float(kernel.sum(dtype=torch.float64))
    return math.log(total / (count * (count - 1))) if total > 0 else None


def tolerance(unit_moments: ClassMoments) -> float | None:
    """Mean cosine of two images of one class, ``E[ẑ_i·ẑ_j | y_i = y_j, i ≠ j]``.

    None if no class has two images, or where a feature is zero and has no direction. Over same-class pairs the
    alignment is ``2 - 2 tolerance``. Source: Wang and Liu, Understanding the Behaviour of Contrastive Loss, CVPR 2021.

    Args:
        unit_moments: of features of unit length.

    >>> z = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), dim=1)
    >>> round(tolerance(ClassMoments.of(z, torch.tensor([0, 0, 1]), 2)), 4)
    0.7071
    """
    counts = unit_moments.counts.to(torch.float64)
    pairs = float((counts * (counts - 1)).sum())
    # ||sum z||² = n²||μ||² counts every pair twice and every image with itself once: n||μ||² + spread = n.
    squares = counts.square() * unit_moments.means.square().sum(1)
    itself = counts * unit_moments.means.square().sum(1) + unit_moments.spread
    if not pairs or bool((itself < counts - 0.5).any()):
        return None
    return float((squares - itself).sum()) / pairs


def neural_collapse(moments: ClassMoments, weight: Tensor | None = None) -> dict[str, float | None]:
    """NC1 to NC3 and CDNV of training features; every class with samples counts alike in the means.

    With K classes, ``M`` the class means less their mean (K, d), Σ_W the within-class covariance over all samples,
    Σ_B = MᵀM / K and ``E = (I - 11ᵀ/K) / sqrt(K-1)``, the Gram matrix of a simplex of norm 1:

    - ``nc1`` = tr(Σ_W Σ_B⁺) / K, within-class variability against between-class;
    - ``nc2_norms`` = std / mean of ||M_c||, and ``nc2_angles`` = mean over c ≠ c' of |cos(M_c, M_c') + 1/(K-1)|;
    - ``nc2_weight`` = ||WWᵀ/||WWᵀ||_F - E||_F and ``nc3`` = ||WMᵀ/||WMᵀ||_F - E||_F, the head's own simplex and its
      self-duality with the means;
    - ``cdnv`` = mean over pairs of (Var_c + Var_c') / (2 ||μ_c - μ_c'||²).

    All are 0 when collapse is complete. None with one class; where all class means are the same, and the angles and
    cdnv where two of the points they compare are; nc1 where no class has two images and cdnv where one class has not,
    as nothing varies within it; those of the head without one. Sources: Papyan et al., PNAS 2020 (NC1, NC2); Zhu et
    al., A Geometric Analysis of Neural Collapse, NeurIPS 2021 (forms with E); Galanti et al., On the Role of Neural
    Collapse in Transfer Learning, ICLR 2022 (CDNV).

    Args:
        moments: of the training features.
        weight: rows of the head, (C, d), or None.

    >>> found = neural_collapse(ClassMoments.of(torch.eye(3), torch.arange(3), 3), torch.eye(3))
    >>> round(found["nc2_angles"], 6), found["nc1"]
    (0.0, None)
    """
    names = ("nc1", "nc2_norms", "nc2_angles", "nc2_weight", "nc3", "cdnv")
    found: dict[str, float | None] = dict.fromkeys(names)
    present = moments.present
    classes = int(present.sum())
    means = moments.means[present]
    centred = means - means.mean(0) if classes else means
    norms = centred.norm(dim=1)
    smallest = rounding(moments.total) * float(means.norm())
    if classes < 2 or not float(norms.max()) > smallest:
        return found
    counts = moments.counts[present]
    if int(counts.max()) > 1:
        _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
        # Centred means of K classes span at most K - 1 directions; what is left in a further one is rounding.
        kept = (singular > singular[0] * max(centred.shape) * torch.finfo(torch.float64).eps) & (singular > smallest)
        kept[classes - 1 :] = False
        spread_along = ((axes[kept] @ moments.within) * axes[kept]).sum(1) / moments.total
        found["nc1"] = float((spread_along / singular[kept].square()).sum())
    found["nc2_norms"] = float(norms.std(correction=0) / norms.mean())
    apart = ~torch.eye(classes, dtype=torch.bool, device=means.device)
    if float(norms.min()) > smallest:
        cosines = (centred @ centred.T) / torch.outer(norms, norms)
        found["nc2_angles"] = float((cosines[apart] + 1.0 / (classes - 1)).abs().mean())
    if weight is not None:
        rows = weight.to(torch.float64)[present]
        found["nc2_weight"] = _from_simplex(rows @ rows.T)
        found["nc3"] = _from_simplex(rows @ centred.T)
    variance = moments.spread[present] / counts
    gaps = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square()[apart]
    if int(counts.min()) > 1 and bool((gaps > smallest**2).all()):
        found["cdnv"] = float(((variance[:, None] + variance)[apart] / (2.0 * gaps)).mean())
    return found


def _from_simplex(gram: Tensor) -> float | None:
    count, size = len(gram), float(gram.norm())
    if not size > 0:
        return None
    simplex = torch.eye(count, dtype=gram.dtype, device=gram.device) - 1.0 / count
    return float((gram / size - simplex / math.sqrt(count - 1)).norm())


def disagreement(predictions: Tensor, nearest: Tensor) -> float | None:
    """NC4: share of the images (N,) which the head and the nearest class mean put into different classes.

    >>> disagreement(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    0.25
    """
    return float((predictions != nearest).to(torch.float64).mean()) if len(predictions) else None


def spectrum(scatter: Tensor) -> Tensor:
    """Eigenvalues of a covariance or scatter matrix (d, d), largest first, as shares of their sum; (d,) float64.

    All zero where nothing varies.

    >>> spectrum(torch.diag(torch.tensor([1.0, 3.0]))).tolist()
    [0.75, 0.25]
    """
    values = torch.linalg.eigvalsh(scatter.to(torch.float64)).flip(0).clamp(min=0.0)
    total = values.sum()
    return values / total if total > 0 else torch.zeros_like(values)


def spectrum_metrics(shares: Tensor) -> dict[str, float | None]:
    """What the shares λ of :func:`spectrum` say about how many directions are used; None where nothing varies.

    - ``effective_rank`` = exp(-sum_k p_k log p_k), p the singular values sqrt(λ) over their sum (Roy and Vetterli,
      EUSIPCO 2007; Garrido et al., RankMe, ICML 2023, here of centred features);
    - ``participation_ratio`` = (sum λ)² / sum λ²; ``stable_rank`` = sum λ / max λ;
    - ``top_1``, ``top_5``, ``top_10``: share of the variance in the first directions.

    >>> found = spectrum_metrics(torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64))
    >>> round(found["effective_rank"], 9), found["participation_ratio"], found["top_1"]
    (2.0, 2.0, 0.5)
    """
    names = ("effective_rank", "participation_ratio", "stable_rank", "top_1", "top_5", "top_10")
    if not float(shares.sum()) > 0:
        return dict.fromkeys(names)
    p = shares.sqrt()
    p = p[p > 0] / p.sum()
    values = [(-(p * p.log()).sum()).exp(), 1.0 / shares.square().sum(), 1.0 / shares[0]]
    values += [shares[:count].sum() for count in (1, 5, 10)]
    return {name: float(value) for name, value in zip(names, values, strict=True)}


@dataclass(frozen=True, eq=False)
class UnitActivity:
    """Sums of absolute activations, merged with ``+``.

    Attributes:
        count: images.
        total: ``sum_i |h_ik|`` of each unit, (d,) float64.

    >>> activity = UnitActivity.of(torch.tensor([[0.0, 2.0], [0.0, 4.0]]))
    >>> activity.dormant(), activity.scores().tolist()
    (0.5, [0.0, 2.0])
    """

    count: int
    total: Tensor

    @classmethod
    def of(cls, activations: Tensor) -> UnitActivity:
        """Of activations (N, d); maps of more axes are averaged over all axes after the second first."""
        size = activations.to(torch.float64).abs()
        return cls(len(size), (size.flatten(2).mean(2) if size.dim() > 2 else size).sum(0))

    def __add__(self, other: UnitActivity) -> UnitActivity:
        """Sums over the images of both.

        Raises:
            ValueError: different numbers of units.
        """
        if self.total.shape != other.total.shape:
            raise ValueError(f"cannot add {len(other.total)} units to {len(self.total)}")
        return UnitActivity(self.count + other.count, self.total + other.total)

    def scores(self) -> Tensor:
        """Mean |h| of each unit over the mean of all units, (d,); zeros where every unit is silent."""
        mean = self.total.mean()
        return self.total / mean if mean > 0 else torch.zeros_like(self.total)

    def dormant(self, threshold: float = 0.0) -> float | None:
        """Share of the units whose score is at most ``threshold``; None without images.

        Source: Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, ICML 2023.
        """
        return float((self.scores() <= threshold).to(torch.float64).mean()) if self.count else None
