"""What a few numbers, one a seed, allow to say: intervals of a mean, a paired rank test, Holm's correction, ranks.

Pure functions of sequences of finite numbers. Nothing here knows what a run is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
SAME = 1e-12
"""Numbers that differ by less than this share of the largest are equal: rounding alone must break no tie."""
TIED = 1e-9
"""The same for differences of numbers, of which rounding is a larger share: 0.9123 - 0.9122 has 12 digits, not 16."""


def mean_of(values: Sequence[float]) -> float:
    """The mean, summed without rounding.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"needs finite numbers, at least one; got {list(values)}")
    return math.fsum(values) / len(values)


def differences(first: Sequence[float], other: Sequence[float]) -> list[float]:
    """``first - other`` of matched pairs; values that are equal but for rounding differ by exactly 0.

    Raises:
        ValueError: different lengths, no pair, or a value that is not finite.

    >>> differences([0.1 + 0.2, 0.5], [0.3, 0.25])
    [0.0, 0.25]
    """
    if len(first) != len(other) or not first:
        raise ValueError(f"{len(first)} and {len(other)} values are not pairs")
    found = [0.0 if abs(a - b) <= SAME * max(abs(a), abs(b)) else a - b for a, b in zip(first, other, strict=True)]
    if not all(math.isfinite(d) for d in found):
        raise ValueError(f"differences must be finite: {found}")
    return found


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation, ``sqrt(sum (x - mean)^2 / (n - 1))``; None with fewer than two values.

    Raises:
        ValueError: as :func:`mean_of`.

    >>> deviation([0.5, 0.5, 0.8]), deviation([0.5])
    (0.17320508075688776, None)
    """
    mean, count = mean_of(values), len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else None


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of the mean, ``mean -+ t_{n-1, (1 + level) / 2} * sd / sqrt(n)``.

    Source: Student, The Probable Error of a Mean, Biometrika 1908. Exact for normal values.

    Args:
        values: (n,).
        level: coverage, in (0, 1).

    Returns:
        Its ends; None with fewer than two values.

    Raises:
        ValueError: as :func:`mean_of`.

    >>> low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    mean, spread = mean_of(values), deviation(values)
    if spread is None:
        return None
    half = _t_quantile(0.5 + level / 2, len(values) - 1) * spread / math.sqrt(len(values))
    return mean - half, mean + half


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean.

    The ``(1 - level) / 2`` and ``(1 + level) / 2`` quantiles of the means of resamples drawn with replacement. Source:
    Efron, Bootstrap Methods, Annals of Statistics 1979. It assumes no shape, and with few values it is too narrow.

    Args:
        values: (n,); which resamples are drawn depends on n alone, so equal values have equal intervals.
        level: coverage, in (0, 1).
        resamples: how many.

    Returns:
        Its ends; None with fewer than two values.

    Raises:
        ValueError: as :func:`mean_of`.

    >>> low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0])
    >>> 1.0 <= low < 2.0, 3.0 < high <= 4.0, bootstrap_interval([1.0])
    (True, True, None)
    """
    mean_of(values)
    if len(values) < 2:
        return None
    means = np.array(values, dtype=np.float64)[_draws(len(values), resamples)].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_t_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test, ``P(|T_{n-1}| >= |mean| sqrt(n) / sd)``; None where there is no spread.

    Source: as :func:`t_interval`, whose interval leaves 0 out exactly where this is below ``1 - level``.

    Raises:
        ValueError: as :func:`mean_of`.

    >>> round(paired_t_p([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    from scipy.special import stdtr

    mean, spread = mean_of(differences), deviation(differences)
    if not spread:
        return None
    return float(2 * stdtr(len(differences) - 1, -abs(mean) * math.sqrt(len(differences)) / spread))


def signed_rank_p(differences: Sequence[float]) -> float | None:
    """Two-sided exact p of Wilcoxon's signed rank test.

    The absolute differences are ranked (ties share their mean rank), W is the sum of the ranks of the positive ones,
    and ``p = min(1, 2 min(P(W <= w), P(W >= w)))`` over all 2^n signs. Zeros are left out, as Wilcoxon did. Source:
    Wilcoxon, Individual Comparisons by Ranking Methods, Biometrics 1945. With n differences, p is at least 2^(1 - n).

    Args:
        differences: (n,), of matched pairs.

    Returns:
        p in (0, 1]; None where every difference is 0.

    Raises:
        ValueError: as :func:`mean_of`.

    >>> signed_rank_p([0.3, 0.1, 0.4, 0.2, 0.6, 0.5]), signed_rank_p([0.0, 0.0])
    (0.03125, None)
    """
    mean_of(differences)
    values = np.array(differences, dtype=np.float64)
    values = values[np.abs(values) > TIED * np.abs(values).max()]
    if not len(values):
        return None
    sizes = _doubled_ranks(np.abs(values), TIED)
    weights = _signed_rank_law(tuple(sorted(sizes.tolist())))
    at = int(sizes[values > 0].sum())
    return float(min(1.0, 2 * min(weights[: at + 1].sum(), weights[at:].sum())))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family of tests, in the given order.

    Of m sorted p, ``adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))``: rejecting where it is at most alpha keeps
    the chance of any false rejection at most alpha, however the tests depend on each other. Source: Holm, A Simple
    Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 1979.

    Raises:
        ValueError: a p outside [0, 1].

    >>> holm([0.25, 0.0625, 0.125])
    [0.25, 0.1875, 0.25]
    """
    if not all(0 <= p <= 1 for p in ps):
        raise ValueError(f"p must be in [0, 1]; got {list(ps)}")
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for done, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - done) * ps[index]))
        adjusted[index] = largest
    return adjusted


def average_ranks(table: Sequence[Sequence[float]]) -> list[float]:
    """Mean rank of each column over the rows; 1 is the largest of a row, ties share their mean rank.

    Source: Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006, section 3.2.2.

    Args:
        table: (seeds, methods), at least one row.

    Raises:
        ValueError: no row, rows of different lengths, or a number that is not finite.

    >>> average_ranks([[0.9, 0.5, 0.5], [0.8, 0.7, 0.6]])
    [1.0, 2.25, 2.75]
    """
    values = np.array(table, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"needs rows of finite numbers, all of one length; got {list(table)}")
    ranks: Floats = np.stack([_doubled_ranks(-row, SAME) / 2 for row in values]).mean(axis=0)
    return [float(rank) for rank in ranks]


def constant(differences: Sequence[float]) -> bool:
    """Whether two or more differences are the same but for rounding.

    >>> constant([0.3 - 0.1, 0.2]), constant([0.2, 0.3]), constant([0.2])
    (True, False, False)
    """
    largest = max(map(abs, differences), default=0.0)
    return len(differences) > 1 and max(differences) - min(differences) <= TIED * largest


def _doubled_ranks(values: Floats, tied: float) -> npt.NDArray[np.int64]:
    """Twice the mean ranks from 1, which are integers; numbers within the share ``tied`` of the largest are ties."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    gap = tied * float(np.abs(values).max())
    group = np.concatenate([[0], np.cumsum(np.diff(ordered) > gap)])
    last = np.cumsum(np.bincount(group))
    first = np.concatenate([[1], last[:-1] + 1])
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = (first + last)[group]
    return ranks


@lru_cache(maxsize=256)
def _signed_rank_law(doubled: tuple[int, ...]) -> Floats:
    """P(2W = s), s = 0 .. sum: each rank is in the sum or not, with probability 1/2."""
    law = np.zeros(sum(doubled) + 1)
    law[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(law)
        shifted[rank:] = law[: len(law) - rank]
        law = (law + shifted) / 2
    law.flags.writeable = False
    return law


@lru_cache(maxsize=256)
def _t_quantile(share: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


@lru_cache(maxsize=16)
def _draws(count: int, resamples: int) -> npt.NDArray[np.int64]:
    """Which of ``count`` values each resample holds, (resamples, count)."""
    from fedcl.random import uniform

    drawn = (uniform(resamples * count, "bootstrap", count) * count).astype(np.int64).reshape(resamples, count)
    drawn.flags.writeable = False
    return drawn
