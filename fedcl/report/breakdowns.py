"""Accuracy by task, class and client: tables, and what the browser lets one choose from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import FedclError
from ..measure.breakdown import CLASSES_CSV, CLIENTS_CSV, read_classes, read_clients
from ..metrics.matrix import FloatArray
from ..records.runfolder import MATRIX
from ..records.runs import Run
from .parts import SPACE, Cell, Chooser, Column, Table, count, numbers, percent


def matrix_table(run: Run, most: int) -> Table:
    """The accuracy matrix, a row after each task."""
    tasks = range(1, run.num_tasks + 1)
    rows = tuple(
        (Cell(f"After{SPACE}task{SPACE}{task}", task), *(percent(value, tint=True) for value in row))
        for task, row in zip(tasks, run.matrix, strict=True)
    )
    columns = (Column("Trained", "text"), *numbers(f"Task{SPACE}{task}" for task in tasks))
    return Table("matrix", "Test accuracy (%) on each task, after each task", columns, rows).cut(most, MATRIX)


def classes_of(run: Run) -> tuple[FloatArray, tuple[str, ...]] | None:
    """Accuracy (C, T) and names of the classes; None where the run did not record them or has damaged records."""
    try:
        found = read_classes(run.folder, run.num_tasks)
    except (FedclError, OSError, UnicodeDecodeError):
        return None
    return found.accuracy.T, found.names


def clients_of(run: Run) -> tuple[FloatArray, tuple[str, ...], list[int]] | None:
    """Accuracy (K, T) of clients on their own test images, names, and how many images at the end; None as above."""
    try:
        found = read_clients(run.folder, run.num_tasks, int(run.summary.get("num_clients") or 0))
    except (FedclError, OSError, UnicodeDecodeError):
        return None
    table = found.seen().T
    return table, tuple(str(client) for client in range(len(table))), found.total[-1].sum(axis=1).tolist()


def class_parts(run: Run, most: int) -> tuple[Chooser, Table] | None:
    """The classes of a run."""
    found = classes_of(run)
    if found is None:
        return None
    table, names = found
    chooser = Chooser("classes", "class", "Classes", names, {"this class": table}, True, _fewer(names, most, "classes"))
    titles = ("Met in task", "When met (%)", "Best (%)", "Last (%)", "Forgetting (points)")
    rows = [(Cell(name, name, None, ("classes", i)), *_ends(table[i])) for i, name in enumerate(names[:most])]
    caption = "Accuracy of each class, on the test images of the tasks so far"
    return chooser, Table("classes", caption, (Column("Class", "text"), *numbers(titles)), tuple(rows))


def client_parts(run: Run, most: int) -> tuple[Chooser, Table] | None:
    """The clients of a run, where they have test images of their own."""
    found = clients_of(run)
    if found is None:
        return None
    table, names, images = found
    chooser = Chooser(
        "clients", "client", "Clients", names, {"this client": table}, True, _fewer(names, most, "clients")
    )
    titles = ("Test images", "First (%)", "Best (%)", "Last (%)", "Best minus last (points)")
    rows = [
        (Cell(name, float(name), None, ("clients", i)), count(images[i]), *_ends(table[i])[1:])
        for i, name in enumerate(names[:most])
    ]
    caption = "Accuracy of each client, on its own test images of the tasks so far"
    return chooser, Table("clients", caption, (Column("Client", "text"), *numbers(titles)), tuple(rows))


def across(runs: Sequence[tuple[str, Sequence[Run]]], what: str) -> Chooser | None:
    """Classes or clients of several methods: a line a method, the mean over the seeds that have a value.

    Args:
        runs: label and runs of each method; they get the colours of the plots if they have their order.
        what: ``classes`` or ``clients``.

    Returns:
        None where a run did not record them.
    """
    read = {"classes": classes_of, "clients": clients_of}[what]
    tables = {label: [read(run) for run in seeds] for label, seeds in runs}
    whole = {label: [found for found in row if found is not None] for label, row in tables.items()}
    if any(len(whole[label]) < len(tables[label]) for label in tables):
        return None
    names = list(dict.fromkeys(name for row in whole.values() for found in row for name in found[1]))
    names.sort(key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    tasks = max(found[0].shape[1] for row in whole.values() for found in row)
    lines = {}
    for label, row in whole.items():
        stacked = np.full((len(row), len(names), tasks), np.nan)
        for seed, (table, own, *_) in enumerate(row):
            stacked[seed, [names.index(name) for name in own], : table.shape[1]] = table
        defined = ~np.isnan(stacked)
        sums = np.where(defined, stacked, 0.0).sum(axis=0)
        lines[label] = np.divide(sums, defined.sum(axis=0), out=np.full(sums.shape, np.nan), where=defined.any(axis=0))
    notes = {
        "classes": "Mean over the seeds in which the class has been met by then; seeds may differ in the class order.",
        "clients": "Mean over seeds; what a client holds differs from seed to seed, and is the same for all methods.",
    }
    noun, heading = {"classes": ("class", "Classes"), "clients": ("client", "Clients")}[what]
    return Chooser(what, noun, heading, tuple(names), lines, False, notes[what])


def _ends(row: FloatArray) -> list[Cell]:
    """When the first value is there, the first, the best, the last, and the best earlier one less the last."""
    there = np.flatnonzero(~np.isnan(row))
    if not len(there):
        return [count(None), *(percent(None) for _ in range(4))]
    last = float(row[-1])
    before = row[:-1][~np.isnan(row[:-1])]
    lost = float(before.max()) - last if len(before) else None
    return [
        count(int(there[0]) + 1), percent(float(row[there[0]]), True), percent(float(row[there].max()), True),
        percent(last, True), percent(lost),
    ]  # fmt: skip


def _fewer(names: Sequence[str], most: int, noun: str) -> str:
    file = {"classes": CLASSES_CSV, "clients": CLIENTS_CSV}[noun]
    return f"The first {most} of {len(names)} {noun}; all are in {file}." if len(names) > most else ""
