"""The numbers of ``summary.json`` in words: names, units, what an undefined one means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..compare.metric import metric_of
from ..records.runs import Run
from .parts import THIN, UNDEFINED, Cell, Column, Table, words

SPREADS = ("weighted_mean", "mean", "std", "worst_decile")

KEYS: dict[str, tuple[str, str]] = {
    "average_accuracy": ("Average accuracy", "mean over all tasks, after the last one"),
    "average_incremental_accuracy": ("Average incremental accuracy", "mean over the tasks so far, then over time"),
    "forgetting": ("Forgetting", "best earlier accuracy of a task minus its last; lower is better"),
    "backward_transfer": ("Backward transfer", "last accuracy of a task minus that when it was learned"),
    "forward_transfer": ("Forward transfer", "accuracy just before a task, minus that of an untrained model"),
    "validation_accuracy": ("Validation accuracy", "on images held out of the training"),
    "personal.average_accuracy.weighted_mean": ("Average accuracy of clients", "each on test images of its own"),
    "personal.average_accuracy.worst_decile": ("Worst tenth of clients", "their average accuracy"),
    "probes.linear.accuracy": ("Linear probe", "of the frozen encoder: what the representation knows"),
    "bytes_up": ("Sent by clients", "declared arrays of all clients"),
    "bytes_down": ("Sent to clients", "declared arrays of all clients"),
    "costs.flops": ("Work of all clients", "floating point operations of the training"),
    "wall_seconds": ("Time", "on the machine of this run"),
}
"""Key -> name and what it is: the numbers that head a report."""

OPTIONAL = ("personal.", "probes.", "costs.", "validation_accuracy")
"""Those that are left out, rather than named undefined, where the run was not asked for them."""

WHY = {
    "forward_transfer": "the classes of a later task cannot be predicted before it",
    "forgetting": "needs two tasks with test images",
    "backward_transfer": "needs two tasks with test images",
    "bytes_up": "the data are pooled, nothing is sent",
    "bytes_down": "the data are pooled, nothing is sent",
}


@dataclass(frozen=True)
class Figure:
    """One of the numbers that head a report; ``value`` has its unit."""

    name: str
    value: str
    about: str


def key_figures(run: Run) -> list[Figure]:
    """What a reader wants to know first."""
    found = []
    for key, (name, about) in KEYS.items():
        value = run.metric(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(Figure(name, with_unit(key, value), about))
        elif not key.startswith(OPTIONAL):
            why = WHY.get(key, "undefined in this run") if key in run.summary else "not in the summary of this run"
            found.append(Figure(name, UNDEFINED, why))
    return found


def all_numbers(run: Run) -> Table:
    """Every number of the summary; undefined ones are named."""
    rows = []
    for key, value in _leaves(run.summary):
        shown = Cell("undefined", None) if value is None else Cell(with_unit(key, value), float(value))
        rows.append((words(key), shown))
    return Table("numbers", "All numbers of summary.json", (Column("Key", "text"), Column("Value")), tuple(rows))


def with_unit(key: str, value: float) -> str:
    """A number of the summary as a person writes it.

    >>> with_unit("forgetting", 0.3875), with_unit("personal.forgetting.std", 0.0254), with_unit("num_tasks", 5)
    ('38.8 %', '2.5 %', '5')
    >>> with_unit("bytes_up", 998600), with_unit("measured.peak_bytes.node", 1110716416), with_unit("costs.flops", 72e6)
    ('998.6 kB', '1.1 GB', '72 MFLOP')
    """
    if "flops" in key:
        power = next((p for p in range(5, 0, -1) if abs(value) >= 1000**p), 0)
        return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}FLOP"
    metric = metric_of(_unit_key(key))
    if metric.unit:
        unit = {"points": " %", "bytes": "", "seconds": " s"}[metric.unit]
        return metric.number(value) + unit
    if isinstance(value, int):
        return f"{value:,}".replace(",", THIN)
    return f"{value:.4g}"


def _unit_key(key: str) -> str:
    """The part of a key that tells its unit."""
    *before, last = key.split(".")
    if last in ("clients", "classes", "undefined") and "bytes" not in key:
        return "count"
    if "bytes" in key:
        return "bytes"
    if "seconds" in key:
        return "seconds"
    if last in SPREADS and before:
        return _unit_key(".".join(before))
    if before[:1] == ["probes"] and before[1:] and before[1] in ("linear", "knn", "nearest_mean"):
        return "accuracy" if last.startswith("task_") else last
    return last


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    undefined = set(values.get("undefined") or ()) if not prefix else set()
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
        elif value is None and (prefix or key in undefined):
            yield key, None
