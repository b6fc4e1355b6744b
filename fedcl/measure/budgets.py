"""Accuracy against memory: the memory-agnostic AUC-A and AUC-L of the class-incremental survey, over several runs.

One run says how good a method is at one size of memory. The survey's protocol runs it with several sizes and takes the
area under the curve, so that methods compare that spend memory on networks and methods that spend it on images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..metrics.matrix import mean_or_none
from ..metrics.streams import memory_area
from ..records.runs import SAME_RUN, find_runs, within

if TYPE_CHECKING:
    from ..records.runs import Run

MEGABYTE = 2**20
"""The survey's: 2000 images of 32 x 32 x 3 bytes are its 5.86 MB."""


@dataclass(frozen=True)
class Budget:
    """One size of memory.

    Attributes:
        memory: bytes of the model and of all exemplars, at clients and server; the mean over ``runs`` runs.
        average_incremental, last: accuracies, in [0, 1]; test images count alike.
        runs: with the same settings but for the seed.
    """

    memory: float
    average_incremental: float | None
    last: float | None
    runs: int


@dataclass(frozen=True)
class MemoryCurve:
    """Accuracy over sizes of memory, smallest first.

    Attributes:
        auc_a, auc_l: area under the average incremental and under the last accuracy, in megabytes; None with fewer than
            two budgets.
    """

    budgets: tuple[Budget, ...]
    auc_a: float | None
    auc_l: float | None

    @classmethod
    def of(cls, budgets: Iterable[Budget]) -> MemoryCurve:
        """The curve through budgets in any order.

        Raises:
            UsageError: two of them have the same memory.

        >>> points = [Budget(24 * MEGABYTE, 0.75, 0.5, 1), Budget(8 * MEGABYTE, 0.5, 0.25, 1)]
        >>> curve = MemoryCurve.of(points)
        >>> curve.auc_a, curve.auc_l
        (10.0, 6.0)
        """
        ordered = tuple(sorted(budgets, key=lambda budget: budget.memory))
        for one, other in pairwise(ordered):
            if one.memory == other.memory:
                allowed = "must be the memory of one budget only; settings other than the seed differ, and it does not"
                raise UsageError("memory", f"{one.memory:g} bytes", allowed)
        sizes = [budget.memory / MEGABYTE for budget in ordered]
        return cls(
            ordered,
            memory_area(sizes, [budget.average_incremental for budget in ordered]),
            memory_area(sizes, [budget.last for budget in ordered]),
        )


def memory_curve(paths: Sequence[Path | str]) -> MemoryCurve:
    """The curve of the finished runs under some paths: one method, several budgets, one or more seeds of each.

    Runs with the same settings but for the seed are one budget, by their means. Unfinished runs are left out.

    Args:
        paths: run folders, or folders that are searched for them.

    Raises:
        UsageError: there is no run, runs of different strategies, or one whose memory is undefined (a bound, or a run
            of an older version).
    """
    runs = find_runs([Path(path) for path in paths]).runs
    stacks = sorted({run.label for run in runs})
    if len(stacks) != 1:
        names = "; ".join(stacks) or "no finished run"
        raise UsageError("DIR", ", ".join(map(str, paths)), f"must hold finished runs of one stack; found: {names}")
    same: dict[str, list[Run]] = {}
    for run in runs:
        key = {name: value for name, value in run.settings.items() if not within(name, SAME_RUN)}
        same.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(run)
    return MemoryCurve.of(_budget(group) for group in same.values())


def _budget(runs: Sequence[Run]) -> Budget:
    sizes = []
    for run in runs:
        size = run.metric("costs.memory_bytes")
        if size is None:
            raise UsageError("DIR", str(run.folder), "must be a run whose costs.memory_bytes is defined")
        sizes.append(float(size))

    def mean(name: str) -> float | None:
        return mean_or_none([run.metric(name) for run in runs])

    last, average = mean("average_accuracy_weighted"), mean("average_incremental_accuracy_weighted")
    return Budget(sum(sizes) / len(sizes), average, last, len(runs))
