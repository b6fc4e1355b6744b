"""The page that compares runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compare import Comparison, Method, compare_runs
from ..compare.groups import differing, shown
from ..compare.metric import DEFAULT, Metric
from ..compare.results import Estimate, Pair
from ..compare.words import p_text
from ..plots import KINDS
from ..plots.methods import methods_of
from ..records.runs import Broken, Found, Run, within
from .amounts import KEYS, Figure, key_figures
from .breakdowns import across
from .figures import Drawn, Picture, pictures_of
from .layout import Limits
from .parts import UNDEFINED, Cell, Column, Interval, Table, number, numbers, words

FURTHER = ("personal.average_accuracy.weighted_mean", "probes.linear.accuracy", "bytes_up")
"""Compared too where every run has them."""

NOT_TOLD = ("name", "seed", "output", "protocol")


@dataclass(frozen=True)
class Compared:
    """One metric: its estimates, the sentences of its pairs and their numbers."""

    metric: Metric
    title: str
    estimates: Table
    sentences: tuple[str, ...]
    pairs: Table | None


@dataclass(frozen=True)
class Member:
    """A run in short."""

    label: str
    seed: int
    folder: str
    figures: list[Figure]


@dataclass(frozen=True)
class ComparisonPage:
    """What ``comparison.html`` shows."""

    comparison: Comparison
    compared: tuple[Compared, ...]
    drawn: Drawn
    members: tuple[Member, ...]
    table: Table
    shared: tuple[tuple[str, str], ...]
    apart: Table | None
    methods: tuple[tuple[str, tuple[Run, ...]], ...]
    template: str = "comparison.html"

    @property
    def title(self) -> str:
        """Of the page."""
        return f"Comparison: {', '.join(method.label for method in self.comparison.methods[:4])}" + (
            f" and {len(self.comparison.methods) - 4} more" if len(self.comparison.methods) > 4 else ""
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know; what is said of several metrics alike is said once."""
        keys = [metric.key for metric in self.comparison.metrics]
        said: dict[str, list[str]] = {}
        for note in self.comparison.notes:
            key, _, rest = note.partition(": ")
            said.setdefault(rest if key in keys else note, []).extend([key] if key in keys else [])
        return [f"{', '.join(of)}: {rest}" if of else rest for rest, of in said.items()]

    @property
    def left_out(self) -> tuple[Broken, ...]:
        """Folders that took no part."""
        return self.comparison.left_out

    @property
    def runs(self) -> list[Run]:
        """All that take part."""
        return [run for _, seeds in self.methods for run in seeds]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All that are drawn."""
        return self.drawn.pictures

    def parts(self, limits: Limits) -> dict[str, object]:
        """What the template gets beside this page."""
        order = {method.label: place for place, method in enumerate(methods_of(self.runs))}
        methods = sorted(self.methods, key=lambda pair: order.get(pair[0], 0))
        choosers = [across(methods, what) for what in ("classes", "clients")]
        return {
            "choosers": [chooser for chooser in choosers if chooser],
            "table": self.table.cut(limits.rows, "the folders themselves"),
            "members": self.members[: limits.rows],
        }


def comparison_page(found: Found, across_protocols: bool) -> ComparisonPage:
    """The comparison of all runs.

    Raises:
        UsageError: they follow different protocols, and that was not asked for.
    """
    metrics = [key for key in DEFAULT if any(key in run.summary for run in found.runs)]
    metrics += [key for key in FURTHER if all(isinstance(run.metric(key), int | float) for run in found.runs)]
    comparison = compare_runs(found.runs, metrics, across_protocols=across_protocols, broken=found.broken)
    methods = tuple((method.label, tuple(method.runs.values())) for method in comparison.methods)
    runs = [run for _, seeds in methods for run in seeds]
    base = Path(os.path.commonpath([run.folder.resolve() for run in runs]))
    members = tuple(
        Member(label, run.seed, run.folder.resolve().relative_to(base).as_posix(), key_figures(run))
        for label, seeds in methods
        for run in seeds
    )
    return ComparisonPage(
        comparison, tuple(_compared(comparison, metric) for metric in comparison.metrics),
        pictures_of(runs, _kinds(comparison)), members, _runs_table(comparison, members),
        tuple((key, shown(value)) for key, value in sorted(comparison.protocol.items())), _apart(comparison), methods,
    )  # fmt: skip


def _kinds(comparison: Comparison) -> list[str]:
    stacks = [next(iter(method.runs.values())).label for method in comparison.methods]
    kinds = [kind.name for kind in KINDS.values() if kind.shows == "methods"]
    # A budget is varied where methods have the same stack.
    return kinds if len(set(stacks)) < len(stacks) else [kind for kind in kinds if kind != "memory"]


def _compared(comparison: Comparison, metric: Metric) -> Compared:
    name = metric.key.replace("_", "-").replace(".", "-")
    estimates = comparison.estimates[metric.key]
    direction = f"; {metric.better} is better" if metric.better else ""
    title = KEYS[metric.key][0] if metric.key in KEYS else metric.title
    unit = {"points": " (%)", "bytes": "", "seconds": " (s)", "": ""}[metric.unit]
    share = f"{100 * comparison.level:g} %"
    columns = (Column("Method", "text"), *numbers(["Seeds", f"Mean{unit}", f"s.d.{unit}"]),
               Column(f"{share} t interval"), Column(f"{share} bootstrap"), Column("Mean rank"))  # fmt: skip
    rows = tuple(_estimate_row(metric, method, estimates[method.label]) for method in comparison.methods)
    intervals = _intervals([estimates[method.label] for method in comparison.methods])
    pairs = comparison.pairs_of(metric.key)
    heading = f"{title}{unit}{direction}"
    return Compared(
        metric, heading, Table(f"mean-{name}", f"{heading}: methods", columns, rows, "", intervals),
        tuple(f"{pair.words}." for pair in pairs),
        _pair_table(comparison, metric, f"pairs-{name}", heading, pairs) if pairs else None,
    )  # fmt: skip


def _estimate_row(metric: Metric, method: Method, found: Estimate) -> tuple[Cell, ...]:
    rank = number(found.rank, 2)
    return (
        words(method.label), Cell(str(found.n), found.n), _amount(metric, found.mean), _amount(metric, found.deviation),
        _interval(metric, found.low, found.high), _interval(metric, found.bootstrap_low, found.bootstrap_high), rank,
    )  # fmt: skip


def _amount(metric: Metric, value: float | None) -> Cell:
    return Cell(UNDEFINED, None) if value is None else Cell(metric.number(value), value)


def _interval(metric: Metric, low: float | None, high: float | None) -> Cell:
    if low is None or high is None:
        return Cell(UNDEFINED, None)
    return Cell(f"{metric.number(low)} to {metric.number(high)}", (low + high) / 2)


def _intervals(estimates: Sequence[Estimate]) -> tuple[Interval, ...]:
    """Means and t intervals on one scale with some room at both ends."""
    values = [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]
    if not values or len(estimates) < 2:
        return ()
    least, width = min(values), (max(values) - min(values)) or 1.0

    def place(value: float | None) -> float | None:
        return None if value is None else round(4 + 92 * (value - least) / width, 2)

    return tuple(Interval(place(e.mean), place(e.low), place(e.high)) for e in estimates)


def _pair_table(comparison: Comparison, metric: Metric, name: str, heading: str, pairs: Sequence[Pair]) -> Table:
    share = f"{100 * comparison.level:g} %"
    columns = (
        Column("Method", "text"), Column("Against", "text"), Column("Matched seeds"), Column("Mean difference"),
        Column(f"{share} t interval"), Column(f"{share} bootstrap"), Column("p, signed rank"), Column("p, Holm"),
        Column("Verdict", "text"),
    )  # fmt: skip
    rows = tuple(
        (
            words(pair.first), words(pair.other), Cell(str(len(pair.seeds)), len(pair.seeds)),
            _amount(metric, pair.mean), _interval(metric, pair.low, pair.high),
            _interval(metric, pair.bootstrap_low, pair.bootstrap_high), _p(pair.p), _p(pair.holm_p),
            words("not shown to differ" if pair.verdict == "not shown" else pair.verdict),
        )
        for pair in pairs
    )  # fmt: skip
    return Table(name, f"{heading}: paired tests", columns, rows)


def _p(value: float | None) -> Cell:
    return Cell(UNDEFINED, None) if value is None else Cell(p_text(value).removeprefix("= "), value)


def _runs_table(comparison: Comparison, members: Sequence[Member]) -> Table:
    metrics = comparison.metrics
    runs = [run for method in comparison.methods for run in method.runs.values()]
    titles = [KEYS[m.key][0] + (" (%)" if m.unit == "points" else "") for m in metrics]
    rows = tuple(
        (words(member.label), Cell(str(member.seed), member.seed),
         *(_amount(metric, run.metric(metric.key)) for metric in metrics), words(member.folder))
        for member, run in zip(members, runs, strict=True)
    )  # fmt: skip
    columns = (Column("Method", "text"), *numbers(["Seed", *titles]), Column("Folder", "text"))
    return Table("runs", "What each run measured", columns, rows)


def _apart(comparison: Comparison) -> Table | None:
    """The settings in which methods or protocols differ."""
    firsts = [next(iter(method.runs.values())) for method in comparison.methods]
    apart = differing([_told(run) for run in firsts])
    if not apart:
        return None
    columns = (Column("Setting", "text"), *(Column(method.label, "text") for method in comparison.methods))
    rows = tuple((words(key), *(words(shown(run.settings.get(key))) for run in firsts)) for key in apart)
    return Table("apart", "Settings in which the methods differ", columns, rows)


def _told(run: Run) -> Mapping[str, Any]:
    return {key: value for key, value in run.settings.items() if not within(key, NOT_TOLD)}
