"""Mergeable statistics of features: sums that clients send and the server adds up, exact over any partition.

Moments of a class are its count, its sum of features and its second moments, all in float64; the name of the second
moments says which they are: ``outer`` (C, d, d) of each class, ``squares`` (C, d) their diagonals, ``scatter`` (d, d)
of all classes together. Means and covariances are made of them at the server, after the clients' have been added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from .. import random
from ..errors import RunFailed

Form = Literal["full", "diagonal", "shared"]

SECOND_MOMENTS: Mapping[str, str] = {"full": "outer", "diagonal": "squares", "shared": "scatter"}
"""The array that holds the second moments, by form."""

MOMENT_SUMS: Mapping[str, Literal["sum"]] = {
    "counts": "sum", "sums": "sum", "outer": "sum", "squares": "sum", "scatter": "sum",
}  # fmt: skip
"""What a strategy that uploads moments declares as its ``reductions``."""


def class_sums(
    batches: Iterable[tuple[Tensor, Tensor]],
    features: Callable[[Tensor], Tensor],
    num_classes: int,
    dimension: int,
) -> tuple[Tensor, Tensor]:
    """Sums and counts of features by class, in float64.

    Args:
        batches: (images (B, ...), labels (B,) int64).
        features: images -> (B, d).
        num_classes: C.
        dimension: d.

    Returns:
        (C, d) float64 sums and (C,) int64 counts; both add up over clients.

    >>> x, y = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> sums, counts = class_sums([(x, y)], lambda x: x, 2, 1)
    >>> sums.flatten().tolist(), counts.tolist()
    ([4.0, 5.0], [2, 1])
    """
    sums: Tensor | None = None
    counts: Tensor | None = None
    for x, y in batches:
        found = features(x).to(torch.float64)
        if sums is None or counts is None:
            sums = torch.zeros(num_classes, dimension, dtype=torch.float64, device=found.device)
            counts = torch.zeros(num_classes, dtype=torch.int64, device=found.device)
        sums = sums.index_add(0, y, found)
        counts = counts + torch.bincount(y, minlength=num_classes)
    if sums is None or counts is None:
        return torch.zeros(num_classes, dimension, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.int64)
    return sums, counts


def class_moments(
    batches: Iterable[tuple[Tensor, Tensor]],
    features: Callable[[Tensor], Tensor],
    num_classes: int,
    dimension: int,
    form: Form = "full",
) -> dict[str, Tensor]:
    """Counts, sums and second moments of features by class; all of them add up over clients.

    Args:
        batches: (images (B, ...), labels (B,) int64).
        features: images -> (B, d).
        num_classes: C.
        dimension: d.
        form: ``full``, one matrix a class; ``diagonal``, its diagonal alone; ``shared``, one matrix for all classes.

    Returns:
        ``counts`` (C,) int64, ``sums`` (C, d) float64 and, float64, ``outer`` (C, d, d), ``squares`` (C, d) or
        ``scatter`` (d, d).

    >>> x, y = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> class_moments([(x, y)], lambda x: x, 2, 1)["outer"].flatten().tolist()
    [10.0, 25.0]
    """
    shape = {"full": (num_classes, dimension, dimension), "diagonal": (num_classes, dimension)}
    counts = torch.zeros(num_classes, dtype=torch.int64)
    sums = torch.zeros(num_classes, dimension, dtype=torch.float64)
    second = torch.zeros(shape.get(form, (dimension, dimension)), dtype=torch.float64)
    for x, y in batches:
        found = features(x).to(torch.float64)
        counts, sums, second = (a.to(found.device) for a in (counts, sums, second))
        counts += torch.bincount(y, minlength=num_classes)
        sums.index_add_(0, y, found)
        if form == "shared":
            second += found.mT @ found
        elif form == "diagonal":
            second.index_add_(0, y, found.square())
        else:
            for label in torch.unique(y).tolist():
                rows = found[y == label]
                second[label] += rows.mT @ rows
    return {"counts": counts, "sums": sums, SECOND_MOMENTS[form]: second}


def add_moments(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moments of two sets of images together; the one of fewer classes is padded. An empty mapping is no image.

    >>> add_moments({}, {"counts": torch.tensor([1])})
    {'counts': tensor([1])}
    """
    if not first or not second:
        return dict(first or second)
    classes = max(len(first["counts"]), len(second["counts"]))
    rows = {n: len(first[n]) if n == "scatter" else classes for n in first}
    return {n: widen(first[n], rows[n]) + widen(second[n], rows[n]) for n in first}


def class_means(moments: Mapping[str, Tensor]) -> Tensor:
    """(C, d) mean of each class; 0 where it has no image.

    >>> class_means({"counts": torch.tensor([2, 0]), "sums": torch.tensor([[4.0], [0.0]])}).tolist()
    [[2.0], [0.0]]
    """
    return moments["sums"] / moments["counts"].clamp(min=1)[:, None]


def class_covariances(moments: Mapping[str, Tensor]) -> Tensor:
    """Unbiased covariance of each class: (C, d, d) of ``outer``, or (C, d) variances of ``squares``.

    ``(sum f f^T - n mu mu^T) / (n - 1)``; 0 where a class has fewer than two images, whose spread is unknown.

    >>> moments = {"counts": torch.tensor([2]), "sums": torch.tensor([[4.0]]), "squares": torch.tensor([[10.0]])}
    >>> class_covariances(moments).tolist()
    [[2.0]]
    """
    counts, means = moments["counts"], class_means(moments)
    if "outer" in moments:
        centred = moments["outer"] - moments["sums"][:, :, None] * means[:, None, :]
    else:
        centred = moments["squares"] - moments["sums"] * means
    spread = centred / (counts - 1).clamp(min=1).view(-1, *[1] * (centred.dim() - 1))
    return torch.where((counts > 1).view(-1, *[1] * (centred.dim() - 1)), spread, 0.0)


def within_covariance(moments: Mapping[str, Tensor]) -> Tensor:
    """Covariance shared by all classes, (d, d), or (d,) variances of ``squares``.

    ``(sum f f^T - sum_c n_c mu_c mu_c^T) / (N - C)`` over the C classes with an image; 0 where no class has two.
    """
    means, sums = class_means(moments), moments["sums"]
    freedom = moments["counts"].sum() - (moments["counts"] > 0).sum()
    between = (sums * means).sum(dim=0) if "squares" in moments else sums.mT @ means
    centred = _second(moments) - between
    return torch.where(freedom > 0, centred / freedom.clamp(min=1), 0.0)


def total_covariance(moments: Mapping[str, Tensor]) -> Tensor:
    """Unbiased covariance of all images around their common mean, (d, d), or (d,) variances of ``squares``.

    ``(sum f f^T - N m m^T) / (N - 1)``; 0 for fewer than two images.
    """
    count, total = moments["counts"].sum(), moments["sums"].sum(dim=0)
    mean = total / count.clamp(min=1)
    around = total * mean if "squares" in moments else torch.outer(total, mean)
    return torch.where(count > 1, (_second(moments) - around) / (count - 1).clamp(min=1), 0.0)


def _second(moments: Mapping[str, Tensor]) -> Tensor:
    """Second moments of all classes together."""
    if "scatter" in moments:
        return moments["scatter"]
    return moments["outer" if "outer" in moments else "squares"].sum(dim=0)


def pool_gaussians(counts: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and unbiased covariance of a union from those of its K parts (Luo et al. 2021, CCVR).

    ``(sum_k (n_k - 1) S_k + sum_k n_k (mu_k - mu) (mu_k - mu)^T) / (n - 1)``, the paper's expression without its
    difference of large numbers.

    Args:
        counts: (K, ...) int64; a part of one image has no spread, and an empty one is left out.
        means: (K, ..., d) float64.
        covariances: (K, ..., d, d).

    Returns:
        (...) counts, (..., d) means (0 of nothing) and (..., d, d) covariances (0 of fewer than two images).

    >>> one = torch.zeros(2, 1, 1)
    >>> [a.flatten().tolist() for a in pool_gaussians(torch.tensor([1, 1]), torch.tensor([[1.0], [3.0]]), one)]
    [[2], [2.0], [2.0]]
    """
    count = counts.sum(dim=0)
    mean = (counts[..., None] * means).sum(dim=0) / count.clamp(min=1)[..., None]
    away = means - mean
    inside = ((counts - 1).clamp(min=0)[..., None, None] * covariances).sum(dim=0)
    between = (counts[..., None, None] * away[..., :, None] * away[..., None, :]).sum(dim=0)
    spread = (inside + between) / (count - 1).clamp(min=1)[..., None, None]
    return count, mean, torch.where((count > 1)[..., None, None], spread, 0.0)


def sample_gaussians(
    means: Tensor,
    covariances: Tensor,
    each: int,
    *name: object,
    jitter: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``each`` draws from every Gaussian, (C, each, d), drawn on the CPU: a pure function of ``name`` and c.

    Args:
        means: (C, d).
        covariances: (C, d, d), or (C, d) variances.
        each: draws a class.
        name: what the draws are for, see :func:`fedcl.random.key`.
        jitter: added to every variance: makes a covariance of fewer images than features positive definite.
        dtype: of the result; the draws are made in float64.

    Raises:
        RunFailed: a covariance that is not positive definite even with the jitter.
    """
    draws = []
    for c, (mean, spread) in enumerate(zip(means.double().cpu(), covariances.double().cpu(), strict=True)):
        generator = torch.Generator().manual_seed(random.key(*name, c) & (2**63 - 1))
        noise = torch.randn(each, len(mean), generator=generator, dtype=torch.float64)
        draws.append((mean + _coloured(noise, spread, jitter)).to(means.device, dtype))
    return torch.stack(draws) if draws else torch.zeros(0, each, means.shape[-1], dtype=dtype, device=means.device)


def _coloured(noise: Tensor, spread: Tensor, jitter: float) -> Tensor:
    """Standard normal rows (n, d) as rows of the given covariance (d, d) or variances (d,)."""
    if spread.dim() == 1:
        if bool((spread + jitter >= 0).all()):
            return noise * (spread + jitter).sqrt()
    else:
        factor, wrong = torch.linalg.cholesky_ex(spread + jitter * torch.eye(len(spread), dtype=spread.dtype))
        if not int(wrong):
            coloured: Tensor = noise @ factor.mT
            return coloured
    raise RunFailed(f"a covariance of features is not positive definite with jitter {jitter:g}: raise the jitter")


def widen(array: Tensor, rows: int) -> Tensor:
    """An array whose first axis is classes, padded with zeros to ``rows`` of them.

    >>> widen(torch.ones(1, 2), 2).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    missing = rows - len(array)
    return torch.cat([array, array.new_zeros(missing, *array.shape[1:])]) if missing > 0 else array
