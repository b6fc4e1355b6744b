"""Two methods over their matched seeds: interval, rank test, Holm's correction, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..metrics import inference
from ..metrics.paired import paired_difference
from .groups import Method
from .metric import Metric
from .results import Pair, Verdict
from .words import say

LEVEL = 0.95
RANK_TEST = 6
"""Pairs from which a rank test can reject at 0.05, see :func:`smallest_p`."""

Values = Mapping[str, Mapping[int, float]]
"""Label -> seed -> value."""


def smallest_p(pairs: int) -> float:
    """The smallest p that a signed rank test of so many pairs can have.

    >>> smallest_p(5), smallest_p(6)
    (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - pairs))


def judged_pairs(
    metric: Metric, sides: Sequence[tuple[str, str]], values: Values, methods: Mapping[str, Method]
) -> list[Pair]:
    """The pairs of one metric, a family whose p are adjusted together.

    Args:
        metric: which.
        sides: labels (first, other) of each pair.
        values: of the metric, where it is defined.
        methods: by label.
    """
    measured = [measure(metric.key, first, other, values) for first, other in sides]
    adjusted = iter(inference.holm([pair.p for pair in measured if pair.p is not None]))
    corrected = [pair if pair.p is None else replace(pair, holm_p=next(adjusted)) for pair in measured]
    judged = [replace(pair, verdict=verdict(metric, pair)) for pair in corrected]
    return [replace(pair, words=say(metric, pair, LEVEL, _same_models(pair, methods))) for pair in judged]


def measure(key: str, first: str, other: str, values: Values) -> Pair:
    """Everything about a pair but what depends on the other pairs."""
    seeds = tuple(sorted(values[first].keys() & values[other].keys()))
    if not seeds:
        return Pair(key, first, other, seeds)
    sides = [[values[label][seed] for seed in seeds] for label in (first, other)]
    found = paired_difference(sides[0], sides[1], LEVEL)
    differences = inference.differences(sides[0], sides[1])
    pair = Pair(key, first, other, seeds, found.mean)
    if found.verdict == "identical":
        return replace(pair, verdict="identical")
    if not inference.constant(differences):
        low, high = inference.bootstrap_interval(differences, LEVEL) or (None, None)
        pair = replace(pair, low=found.low, high=found.high, bootstrap_low=low, bootstrap_high=high)
    if len(seeds) < RANK_TEST:
        return pair
    return replace(pair, p=inference.signed_rank_p(differences), t_p=inference.paired_t_p(differences))


def verdict(metric: Metric, pair: Pair) -> Verdict:
    """What may be said of a pair whose p is adjusted.

    A difference is shown where the interval leaves out 0 and, from six pairs on, Holm's p is at most 0.05 too.
    """
    if pair.mean is None or pair.verdict == "identical":
        return pair.verdict
    if pair.low is None or pair.high is None:
        if len(pair.seeds) > 1 and pair.holm_p is None:
            return "constant"
        clear = len(pair.seeds) > 1
    else:
        clear = pair.low > 0 or pair.high < 0
    if not clear or (pair.holm_p is not None and pair.holm_p > 1 - LEVEL):
        return "not shown"
    if metric.better is None:
        return "higher" if pair.mean > 0 else "lower"
    return "ahead" if (pair.mean > 0) == (metric.better == "higher") else "behind"


def _same_models(pair: Pair, methods: Mapping[str, Method]) -> bool:
    first, other = (
        [methods[label].runs[seed].metric("model_sha256") for seed in pair.seeds] for label in (pair.first, pair.other)
    )
    return first == other and None not in first
