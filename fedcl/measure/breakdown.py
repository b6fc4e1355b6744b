"""Two tables of a run folder: accuracy by class and by client after each task.

``class_accuracy.csv`` has a row a task: its number from 0, then the accuracy of every class, in the order of exposure
and under its name, on the test images of the tasks so far; an empty cell is a class without such images.
``client_accuracy.csv`` has a row for each client and task that it has test images of its own of: after which task,
which client, tested on which task (all from 0), how many images are right and how many there are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RunFailed
from ..metrics.matrix import FloatArray

CLASSES_CSV, CLIENTS_CSV = "class_accuracy.csv", "client_accuracy.csv"
CLIENT_COLUMNS = ["task", "client", "tested", "correct", "total"]


@dataclass(frozen=True, eq=False)
class ByClass:
    """Accuracy (T, C) of each class after each task, NaN where undefined; the classes' names, as exposed."""

    accuracy: FloatArray
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ByClient:
    """Right and all test images of their own, (T, K, T) each: after a task, of a client, of a tested task."""

    correct: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]

    def seen(self) -> FloatArray:
        """(T, K) accuracy of each client on its own images of the tasks so far; NaN for a client without any.

        >>> ByClient(np.array([[[3, 2]], [[2, 4]]]), np.array([[[4, 4]], [[4, 4]]])).seen().tolist()
        [[0.75], [0.75]]
        """
        so_far = np.tril(np.ones((len(self.total), len(self.total)), dtype=np.int64))[:, None, :]
        right, every = (self.correct * so_far).sum(axis=2), (self.total * so_far).sum(axis=2)
        shares: FloatArray = np.divide(right, every, out=np.full(right.shape, np.nan), where=every > 0)
        return shares


def class_csv(rows: Sequence[tuple[int, Sequence[int], Sequence[int]]], names: Sequence[str]) -> bytes:
    """``class_accuracy.csv``.

    Args:
        rows: after each task its number, and right and all images of each class, (C,) each.

    >>> class_csv([(0, [1, 0], [2, 0]), (1, [1, 3], [2, 4])], ["cat", "dog"]).decode().splitlines()
    ['task,cat,dog', '0,0.5,', '1,0.5,0.75']
    """
    return _csv(
        ["task", *names], [[t, *(c / n if n else "" for c, n in zip(right, of, strict=True))] for t, right, of in rows]
    )


def client_csv(found: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> bytes:
    """``client_accuracy.csv``.

    Args:
        found: after each task, each client's numbers of ``correct`` and of all images (``total``) by task.

    >>> client_csv([{"correct": [[1, 0]], "total": [[2, 0]]}]).decode().splitlines()
    ['task,client,tested,correct,total', '0,0,0,1,2']
    """
    rows = [
        [task, client, tested, right, of]
        for task, table in enumerate(found)
        for client, pair in enumerate(zip(table["correct"], table["total"], strict=True))
        for tested, (right, of) in enumerate(zip(*pair, strict=True))
        if of
    ]
    return _csv(CLIENT_COLUMNS, rows)


def read_classes(folder: Path, tasks: int) -> ByClass:
    """The table of a run folder.

    Raises:
        RunFailed: it is not there or damaged.
    """
    header, *rows = _rows(folder / CLASSES_CSV, "runs of an older version have none; run it again to get it")
    try:
        stages = max(tasks, 1 + max(int(row[0]) for row in rows))
        table = np.full((stages, len(header) - 1), np.nan)
        for task, *cells in rows:
            table[int(task)] = [float(cell) if cell else np.nan for cell in cells]
    except (ValueError, IndexError) as error:
        raise RunFailed(f"{folder / CLASSES_CSV} is damaged ({error})") from error
    return ByClass(table, tuple(header[1:]))


def read_clients(folder: Path, tasks: int, clients: int) -> ByClient:
    """The table of a run folder.

    Raises:
        RunFailed: it is not there or damaged.
    """
    hint = (
        "personal test sets record it: partition.test=same_mix or partition.test=holdout(0.2), evaluate.personal=true"
    )
    path = _there(folder / CLIENTS_CSV, hint)
    shape = (tasks, clients, tasks)
    correct, total = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    try:
        rows = np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1, ndmin=2)
        places = tuple(rows[:, :3].T)
        correct[places], total[places] = rows[:, 3], rows[:, 4]
    except (ValueError, IndexError) as error:
        raise RunFailed(f"{path} is damaged ({error})") from error
    return ByClient(correct, total)


def _there(path: Path, hint: str) -> Path:
    if not path.is_file():
        raise RunFailed(f"{path.parent} has no {path.name}: {hint}")
    return path


def _rows(path: Path, hint: str) -> list[list[str]]:
    with _there(path, hint).open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    if len(rows) < 2:
        raise RunFailed(f"{path} is empty")
    return rows


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()
