"""Differences between matched runs: the paired t interval, and its verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .inference import differences, mean_of, t_interval


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference with its interval.

    Attributes:
        mean: of the differences, in the unit of the values.
        low, high: the interval's ends; None with fewer than two pairs.
        pairs: how many differences.
        verdict: ``gained`` (the interval is above 0), ``lost`` (below 0), ``not shown`` (it covers 0, or there
            is none), ``identical`` (every difference is exactly 0).
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int
    verdict: str


def paired_difference(method: Sequence[float], ablation: Sequence[float], level: float = 0.95) -> PairedDifference:
    """The mean of ``method - ablation`` over matched seeds with its Student t interval.

    Args:
        method, ablation: values of the same seeds in the same order, at least one.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: different lengths, no pair, or a value that is not finite.

    >>> d = paired_difference([0.5, 0.7, 0.6], [0.4, 0.5, 0.3])
    >>> round(d.mean, 3), round(d.low, 3), round(d.high, 3), d.verdict
    (0.2, -0.048, 0.448, 'not shown')
    """
    gaps = differences(method, ablation)
    count, mean = len(gaps), mean_of(gaps)
    if all(gap == 0 for gap in gaps):
        return PairedDifference(0.0, 0.0, 0.0, count, "identical")
    ends = t_interval(gaps, level)
    if ends is None:
        return PairedDifference(mean, None, None, count, "not shown")
    low, high = ends
    verdict = "gained" if low > 0 else "lost" if high < 0 else "not shown"
    return PairedDifference(mean, low, high, count, verdict)
