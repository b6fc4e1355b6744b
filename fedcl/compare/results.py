"""What a comparison holds: plain values, which every rendering reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..records.runs import Broken
from .groups import Method
from .metric import Metric

Verdict = Literal["identical", "ahead", "behind", "higher", "lower", "constant", "not shown", "no pairs"]


@dataclass(frozen=True)
class Estimate:
    """One metric of one method over its seeds, in the unit of the metric; None where it is undefined.

    Attributes:
        seeds: where the metric is defined.
        undefined: seeds where it is null or not finite.
        mean, deviation: over the seeds; the sample standard deviation.
        low, high: Student's interval of the mean.
        bootstrap_low, bootstrap_high: the percentile bootstrap's.
        rank: mean rank among the methods, 1 the best, over the seeds that all of them have; None where no direction is
            better.
    """

    seeds: tuple[int, ...]
    undefined: tuple[int, ...]
    mean: float | None = None
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    rank: float | None = None

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.seeds)


@dataclass(frozen=True)
class Pair:
    """Two methods in one metric over the seeds that both have.

    Attributes:
        metric: its key.
        first, other: labels.
        seeds: matched, where the metric is defined for both.
        mean: of ``first - other``; None without seeds.
        low, high: the paired t interval; None with one seed.
        bootstrap_low, bootstrap_high: the percentile bootstrap's of the mean difference.
        p: of Wilcoxon's signed rank test, two-sided and exact; None under six pairs and where all pairs are equal.
        holm_p: adjusted for all tests of this metric.
        t_p: of the paired t test, for information; None wherever ``p`` is.
        verdict: ``ahead`` and ``behind`` (``higher`` and ``lower`` where no direction is better), ``not shown``,
            ``identical`` (equal at every seed), ``constant`` (the same difference at each of fewer than six seeds, so
            that there is no interval), ``no pairs``.
        words: the verdict as a sentence.
    """

    metric: str
    first: str
    other: str
    seeds: tuple[int, ...]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    p: float | None = None
    holm_p: float | None = None
    t_p: float | None = None
    verdict: Verdict = "no pairs"
    words: str = ""


@dataclass(frozen=True)
class Comparison:
    """What ``fedcl compare`` found.

    Attributes:
        metrics: in the order asked for.
        methods: best first in the first metric.
        estimates: metric key -> label -> estimate.
        pairs: by metric; each method against the baseline, or all pairs.
        baseline: its label, or None.
        level: of all intervals; a difference is shown where Holm's p is at most one less this.
        protocol: what the runs have in common, key -> value.
        protocols_differ: key -> distinct values, where runs of different protocols were compared nevertheless.
        notes: what a reader must know, one line each.
        left_out: folders that took no part, and why.
    """

    metrics: tuple[Metric, ...]
    methods: tuple[Method, ...]
    estimates: Mapping[str, Mapping[str, Estimate]]
    pairs: tuple[Pair, ...]
    baseline: str | None
    level: float
    protocol: Mapping[str, Any]
    protocols_differ: Mapping[str, list[Any]]
    notes: tuple[str, ...]
    left_out: tuple[Broken, ...]

    def pairs_of(self, metric: str) -> list[Pair]:
        """The pairs of one metric."""
        return [pair for pair in self.pairs if pair.metric == metric]

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "level": self.level, "baseline": self.baseline, "metrics": [asdict(metric) for metric in self.metrics],
            "methods": [
                {
                    "label": method.label, "strategy": list(next(iter(method.runs.values())).strategy),
                    "settings": dict(method.settings), "seeds": list(method.seeds),
                    "folders": [str(run.folder) for run in method.runs.values()],
                    "values": {
                        metric.key: {"n": self.estimates[metric.key][method.label].n,
                                     **asdict(self.estimates[metric.key][method.label])}
                        for metric in self.metrics
                    },
                }
                for method in self.methods
            ],
            "pairs": [asdict(pair) for pair in self.pairs], "protocols_differ": dict(self.protocols_differ),
            "notes": list(self.notes),
            "left_out": [{"folder": str(run.folder), "why": run.why} for run in self.left_out],
        }  # fmt: skip
