"""The verdict on a pair as one sentence."""

from __future__ import annotations

from .metric import Metric
from .results import Pair

TOO_FEW = "too few seeds for a rank test"


def say(metric: Metric, pair: Pair, level: float, same_models: bool) -> str:
    """The sentence for a judged pair.

    Args:
        metric: of the pair.
        pair: with its verdict.
        level: of its interval.
        same_models: whether both have the same final model at every matched seed.

    >>> from .metric import metric_of
    >>> pair = Pair("average_accuracy", "A", "B", tuple(range(8)), 0.031, 0.012, 0.05, p=0.016, holm_p=0.016,
    ...             verdict="ahead")
    >>> say(metric_of("average_accuracy"), pair, 0.95, False)
    'A is ahead of B by 3.1 points (95 % interval 1.2 to 5.0, 8 seeds, Holm p = 0.016)'
    """
    first, other, seeds = pair.first, pair.other, len(pair.seeds)
    each = f"at each of {seeds} seeds" if seeds > 1 else "at the one matched seed"
    if pair.mean is None:
        return f"{first} and {other}: no seed has this number for both"
    if pair.verdict == "identical":
        if same_models:
            return f"{first} and {other} are identical: the same final model {each}"
        return f"{first} and {other} are identical in this number {each}; their models differ"
    if pair.verdict == "constant":
        lead, rest = (first, other) if pair.mean > 0 else (other, first)
        return (
            f"{lead} is higher than {rest} by {metric.amount(abs(pair.mean))}, the same {each}: without any spread "
            f"there is no interval; {TOO_FEW}"
        )
    if pair.verdict == "not shown":
        found = evidence(metric, pair, level)
        return f"{first} and {other} are not shown to differ (difference {metric.amount(pair.mean)}, {found})"
    lead, rest = (first, other) if pair.verdict in ("ahead", "higher") else (other, first)
    gap = metric.amount(abs(pair.mean))
    found = evidence(metric, pair, level, 1 if pair.mean > 0 else -1)
    if metric.better is None:
        return f"{lead} is higher than {rest} by {gap} ({found})"
    if metric.better == "lower":
        return f"{lead} is ahead of {rest} with {gap} less ({found})"
    return f"{lead} is ahead of {rest} by {gap} ({found})"


def evidence(metric: Metric, pair: Pair, level: float, sign: int = 1) -> str:
    """Interval, seeds and p.

    Args:
        metric: of the pair.
        pair: with seeds.
        level: of its interval.
        sign: -1 tells the interval of ``other - first``.
    """
    parts = []
    if pair.low is not None and pair.high is not None:
        low, high = (pair.low, pair.high) if sign > 0 else (-pair.high, -pair.low)
        parts.append(f"{100 * level:g} % interval {metric.number(low)} to {metric.number(high)}")
    else:
        parts.append("no interval of one seed" if len(pair.seeds) == 1 else "no spread, so no interval")
    if len(pair.seeds) > 1:
        parts.append(f"{len(pair.seeds)} seeds")
    if pair.holm_p is None:
        return f"{', '.join(parts)}; {TOO_FEW}"
    return ", ".join([*parts, f"Holm p {p_text(pair.holm_p)}"])


def p_text(p: float | None) -> str:
    """A p for people.

    >>> p_text(0.0156), p_text(0.00002), p_text(1.0), p_text(None)
    ('= 0.016', '< 0.001', '= 1', '-')
    """
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
