"""What plots of several runs share: methods with their seeds, arrays over seeds, and words for titles and legends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..compare.groups import Method, group
from ..errors import UsageError
from ..metrics import matrix as mx
from ..metrics.matrix import FloatArray
from ..records.runs import Run

__all__ = ["Method", "describe", "methods_of", "over_seeds", "seen_accuracy", "spread", "told"]


def methods_of(runs: Sequence[Run], by: Sequence[str] = ()) -> list[Method]:
    """The methods among some runs, ordered by label with numbers by size; see :func:`fedcl.compare.groups.group`."""
    protocols = {run.protocol_key for run in runs}
    methods, _ = group(runs, by, across=len(protocols) > 1)
    return sorted(methods, key=lambda method: _natural(method.label))


def over_seeds(method: Method, values: Callable[[Run], Any], what: str) -> FloatArray:
    """A table of each run of a method, stacked: (S, ...), NaN where undefined.

    Raises:
        UsageError: the runs have tables of different shapes.
    """
    tables = [np.array(values(run), dtype=np.float64) for run in method.runs.values()]
    if len({table.shape for table in tables}) > 1:
        shapes = ", ".join(f"{run.folder} {t.shape}" for run, t in zip(method.runs.values(), tables, strict=True))
        raise UsageError("--by", method.label, f"its runs differ in their {what}: {shapes}")
    return np.stack(tables)


def seen_accuracy(run: Run) -> list[float | None]:
    """Accuracy on the tasks so far after each task, (T,), weighted by test images where their numbers are known."""
    counts = run.summary.get("test_counts")
    return mx.seen_accuracy(run.matrix) if counts is None else mx.seen_accuracy_weighted(run.matrix, counts)


def spread(values: FloatArray) -> FloatArray:
    """Sample standard deviation over seeds, the first axis; 0 for one seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def told(methods: Sequence[Method]) -> list[str]:
    """A legend entry for each method; it says the number of seeds where methods differ in it."""
    if len({len(method.runs) for method in methods}) == 1:
        return [method.label for method in methods]
    return [f"{m.label} ({len(m.runs)}\N{NO-BREAK SPACE}seed{'s' if len(m.runs) > 1 else ''})" for m in methods]


def describe(methods: Sequence[Method], title: str | None, drawn: str = "mean ± 1 s.d.") -> str:
    """The title that was asked for, or data, stream and seeds as far as all runs share them.

    Args:
        drawn: what stands for several seeds.
    """
    if title is not None:
        return title
    runs = [run for method in methods for run in method.runs.values()]
    found = []
    for key, noun in (("dataset", ""), ("scenario", ""), ("num_tasks", "task"), ("num_clients", "client")):
        values = {run.summary.get(key) for run in runs}
        if len(values) == 1 and None not in values:
            text = str(values.pop()).replace("_", "-")
            found.append(f"{text} {noun}{'s' if text != '1' else ''}" if noun else text)
    seeds = sorted({run.seed for run in runs})
    several = max(len(method.runs) for method in methods) > 1
    last = f"{drawn} of {_seeds(seeds)}" if several else _seeds(seeds)
    return ", ".join([*found, last.replace(" ", "\N{NO-BREAK SPACE}")])


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"seeds {seeds[0]}–{seeds[-1]}"
    return "seeds " + ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{len(seeds)} seeds"


def _natural(text: str) -> list[tuple[int, float, str]]:
    """A key that sorts numbers in texts by size."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]
