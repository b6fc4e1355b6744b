"""The comparison itself, as values: estimates of every method, tests of every pair. Rendering is elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..metrics import inference
from ..records.runs import Broken, Run, find_runs, within
from .groups import Method, differing, group, shown
from .metric import DEFAULT, Metric, metric_of, numbers_in
from .pairs import LEVEL, judged_pairs, smallest_p
from .results import Comparison, Estimate, Pair

IN_LABEL = ("strategy", "options", "plugins")
"""Settings of a method that its label tells of."""


def compare(
    paths: Sequence[Path],
    metrics: Sequence[str] = DEFAULT,
    by: Sequence[str] = (),
    baseline: str | None = None,
    across_protocols: bool = False,
) -> Comparison:
    """Compares the finished runs under some folders.

    Args:
        paths: as for :func:`fedcl.records.runs.find_runs`.
        metrics: dotted keys of ``summary.json``.
        by: settings that alone tell methods apart, see :func:`fedcl.compare.groups.group`.
        baseline: the label, stack or run name of the method that the others are tested against; None: all pairs.
        across_protocols: compare runs of different protocols too.

    Raises:
        UsageError: no finished run, different protocols, or an argument that names nothing.
    """
    found = find_runs(paths)
    if not found.runs:
        why = f"; {found.broken[0].folder}: {found.broken[0].why}" if found.broken else ""
        raise UsageError("DIR", " ".join(map(str, paths)), f"holds no finished run{why}")
    return compare_runs(found.runs, metrics, by, baseline, across_protocols, found.broken)


def compare_runs(
    runs: Sequence[Run],
    metrics: Sequence[str] = DEFAULT,
    by: Sequence[str] = (),
    baseline: str | None = None,
    across_protocols: bool = False,
    broken: Sequence[Broken] = (),
) -> Comparison:
    """:func:`compare` of runs that are read already; ``broken`` are listed in the result."""
    chosen = _metrics(metrics, runs)
    differ = differing([run.protocol for run in runs]) | _other_test_images(runs)
    if differ and not across_protocols:
        raise _refusal(runs, differ)
    methods, again = group(runs, by, across_protocols)
    base = _baseline(baseline, methods) if baseline is not None else None
    values = {metric.key: {method.label: _values(metric, method) for method in methods} for metric in chosen}
    estimates = {metric.key: _estimates(metric, methods, values[metric.key]) for metric in chosen}
    methods = _best_first(chosen[0], methods, estimates[chosen[0].key])
    labels = [method.label for method in methods]
    sides = [(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :]]
    if base is not None:
        sides = [(label, base) for label in labels if label != base]
    by_label = {method.label: method for method in methods}
    pairs = [pair for m in chosen for pair in judged_pairs(m, sides, values[m.key], by_label)]
    protocol = {key: value for key, value in runs[0].protocol.items() if key not in differ}
    notes = _notes(chosen, methods, estimates, pairs, differ)
    return Comparison(
        tuple(chosen), tuple(methods), estimates, tuple(pairs), base, LEVEL, protocol, differ, tuple(notes),
        tuple(sorted([*broken, *again], key=lambda run: run.folder)),
    )  # fmt: skip


def _refusal(runs: Sequence[Run], differ: Mapping[str, list[Any]]) -> UsageError:
    def places(key: str, values: list[Any]) -> str:
        first = {shown(value): next((r for r in runs if r.protocol.get(key) == value), None) for value in values}
        return " | ".join(f"{value} in {run.folder}" if run else value for value, run in first.items())

    listed = "; ".join(f"{key} ({places(key, values)})" for key, values in differ.items())
    allowed = f"these runs follow different protocols: {listed}. --across-protocols compares them nevertheless"
    return UsageError("DIR", os.path.commonpath([run.folder for run in runs]), allowed)


def _best_first(metric: Metric, methods: Sequence[Method], estimates: Mapping[str, Estimate]) -> list[Method]:
    sign = -1 if metric.better == "lower" else 1

    def place(method: Method) -> tuple[bool, float]:
        mean = estimates[method.label].mean
        return mean is None, -sign * (mean or 0.0)

    return sorted(methods, key=place)


def _metrics(keys: Sequence[str], runs: Sequence[Run]) -> list[Metric]:
    there = list(dict.fromkeys(key for run in runs for key in numbers_in(run.summary)))
    for key in keys:
        unset = any(key in run.summary and run.summary[key] is None for run in runs)
        if key not in there and not unset:
            allowed = f"must be a number in summary.json of these runs: {', '.join(there)}"
            raise UsageError("--metric", key, allowed, there)
    if not keys:
        raise UsageError("--metric", "", "must name at least one number in summary.json", there)
    return [metric_of(key) for key in dict.fromkeys(keys)]


def _other_test_images(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Runs of one seed whose test sets differ in size: the same settings met other data."""
    by_seed: dict[int, list[Any]] = {}
    for run in runs:
        counts = run.summary.get("test_counts")
        known = by_seed.setdefault(run.seed, [])
        if counts is not None and counts not in known:
            known.append(counts)
    return {f"test_counts of seed {seed}": counts for seed, counts in by_seed.items() if len(counts) > 1}


def _baseline(wanted: str, methods: Sequence[Method]) -> str:
    def named(method: Method) -> set[str]:
        runs = list(method.runs.values())
        return {runs[0].label, *({runs[0].name} if len({run.name for run in runs}) == 1 else ())}

    labels = [method.label for method in methods]
    if wanted in labels:
        return wanted
    meant = [method.label for method in methods if wanted in named(method)]
    if len(meant) == 1:
        return meant[0]
    several = f"; {' and '.join(meant)} are meant" if meant else ""
    raise UsageError("--baseline", wanted, f"must be one of these methods: {'; '.join(labels)}{several}", labels)


def _values(metric: Metric, method: Method) -> dict[int, float]:
    """Seed -> value, where it is a finite number."""
    found = {seed: run.metric(metric.key) for seed, run in method.runs.items()}
    return {
        seed: float(value)
        for seed, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _estimates(
    metric: Metric, methods: Sequence[Method], values: Mapping[str, Mapping[int, float]]
) -> dict[str, Estimate]:
    ranked = [label for label, found in values.items() if found]
    shared = sorted(set.intersection(*(set(values[label]) for label in ranked))) if len(ranked) > 1 else []
    ranks: dict[str, float] = {}
    if shared and metric.better is not None:
        sign = -1 if metric.better == "lower" else 1
        table = [[sign * values[label][seed] for label in ranked] for seed in shared]
        ranks = dict(zip(ranked, inference.average_ranks(table), strict=True))
    found = {}
    for method in methods:
        own = values[method.label]
        numbers = list(own.values())
        estimate = Estimate(tuple(own), tuple(seed for seed in method.seeds if seed not in own))
        if numbers:
            low, high = inference.t_interval(numbers, LEVEL) or (None, None)
            boot_low, boot_high = inference.bootstrap_interval(numbers, LEVEL) or (None, None)
            estimate = replace(
                estimate, mean=inference.mean_of(numbers), deviation=inference.deviation(numbers), low=low, high=high,
                bootstrap_low=boot_low, bootstrap_high=boot_high, rank=ranks.get(method.label),
            )  # fmt: skip
        found[method.label] = estimate
    return found


def _notes(
    metrics: Sequence[Metric],
    methods: Sequence[Method],
    estimates: Mapping[str, Mapping[str, Estimate]],
    pairs: Sequence[Pair],
    differ: Mapping[str, list[Any]],
) -> list[str]:
    notes = []
    firsts = [next(iter(method.runs.values())) for method in methods]
    if differ:
        listed = "; ".join(f"{key} ({' | '.join(map(shown, values))})" for key, values in differ.items())
        notes.append(f"the runs follow different protocols: {listed}")
    followed = {m.label: {str(run.summary.get("protocol") or "none") for run in m.runs.values()} for m in methods}
    if len(set().union(*followed.values())) > 1:
        listed = "; ".join(f"{label}: {', '.join(sorted(names))}" for label, names in followed.items())
        notes.append(f"declared protocols: {listed}")
    apart = differing([{key: v for key, v in run.method.items() if not within(key, IN_LABEL)} for run in firsts])
    hidden = {key: values for key, values in apart.items() if not any(key in method.settings for method in methods)}
    if hidden:
        listed = "; ".join(f"{key} ({' | '.join(map(shown, values))})" for key, values in hidden.items())
        notes.append(f"the methods differ in more than their stacks: {listed}")
    if len({method.seeds for method in methods}) > 1:
        listed = "; ".join(f"{method.label}: {_seeds(method.seeds)}" for method in methods)
        notes.append(f"seeds differ; pairs use those that both have, ranks those that all have ({listed})")
    undefined: dict[str, list[str]] = {}
    for metric in metrics:
        left = {label: found.undefined for label, found in estimates[metric.key].items() if found.undefined}
        if left:
            listed = "; ".join(f"{label}: seeds {_seeds(seeds)}" for label, seeds in left.items())
            undefined.setdefault(listed, []).append(metric.key)
    notes += [f"undefined, and left out: {', '.join(keys)} ({listed})" for listed, keys in undefined.items()]
    weak: dict[str, list[str]] = {}
    for metric in metrics:
        for note in _power([pair for pair in pairs if pair.metric == metric.key]):
            weak.setdefault(note, []).append(metric.key)
    return notes + [f"{', '.join(keys)}: {note}" for note, keys in weak.items()]


def _power(pairs: Sequence[Pair]) -> list[str]:
    """What the tests of one metric could not have shown, or do not correct for."""
    tested = [pair for pair in pairs if pair.p is not None]
    plain = [pair for pair in pairs if pair.low is not None and pair.p is None and pair.verdict != "identical"]
    alpha = 1 - LEVEL
    notes = []
    if tested and all(len(tested) * smallest_p(len(pair.seeds)) > alpha for pair in tested):
        seeds = next(n for n in range(1, 99) if len(tested) * smallest_p(n) <= alpha)
        notes.append(
            f"with {len(tested)} tests no rank test can show a difference of so few seeds; "
            f"{seeds} seeds could, or a --baseline (fewer tests)"
        )
    if plain and len(plain) + len(tested) > 1:
        what = f"the {len(plain)} intervals" if len(plain) > 1 else "the interval"
        notes.append(f"{what} without a rank test: not corrected for the number of comparisons")
    return notes


def _seeds(seeds: Sequence[int]) -> str:
    """Seeds as a person writes them.

    >>> _seeds((0, 1, 2, 5)), _seeds((3,)), _seeds((1, 2))
    ('0-2, 5', '3', '1, 2')
    """
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs) or "none"
