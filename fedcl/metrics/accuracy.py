"""Accuracy as integer counts, so that results of clients, batches and workers add up exactly in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AccuracyState:
    """Correct predictions and test samples of each class; immutable, merged with ``+``.

    Sums of integers do not depend on order or grouping, so the merged state of any partition of the test
    samples equals the state of all of them at once.

    Attributes:
        correct: correct predictions of each true class, (C,) int64.
        total: test samples of each true class, (C,) int64.

    >>> state = AccuracyState.empty(3).update([0, 0, 2], [0, 1, 2])
    >>> state.accuracy(), state.per_class()
    (0.6666666666666666, [0.5, None, 1.0])
    >>> state.per_task([0, 0, 1], num_tasks=2)
    [0.5, 1.0]
    """

    correct: IntArray
    total: IntArray

    def __post_init__(self) -> None:
        correct, total = _integers(self.correct, "correct"), _integers(self.total, "total")
        if correct.shape != total.shape or (correct < 0).any() or (correct > total).any():
            raise ValueError("correct and total are both (C,), with 0 <= correct <= total in each class")
        for name, array in (("correct", correct), ("total", total)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def empty(cls, num_classes: int) -> AccuracyState:
        """State of no samples over ``num_classes`` classes."""
        return cls(np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64))

    def update(self, labels: Any, predictions: Any) -> AccuracyState:
        """New state with a batch added; this one stays as it is.

        Args:
            labels: true classes, (N,) integers in [0, C): NumPy array, CPU tensor or sequence.
            predictions: predicted classes, (N,) integers; a value outside [0, C) is a wrong prediction.

        Raises:
            ValueError: different lengths, not integers, or a label outside [0, C).
        """
        truth, guess = _integers(labels, "labels"), _integers(predictions, "predictions")
        if truth.shape != guess.shape:
            raise ValueError(f"{truth.size} labels but {guess.size} predictions")
        num_classes = self.total.size
        if truth.size and (truth.min() < 0 or truth.max() >= num_classes):
            raise ValueError(f"labels lie in [0, {num_classes}); got {truth.min()} to {truth.max()}")
        return AccuracyState(
            self.correct + np.bincount(truth[truth == guess], minlength=num_classes),
            self.total + np.bincount(truth, minlength=num_classes),
        )

    def __add__(self, other: AccuracyState) -> AccuracyState:
        """State of the samples of both.

        Raises:
            ValueError: different numbers of classes.
        """
        if self.total.size != other.total.size:
            raise ValueError(f"cannot add {other.total.size} classes to {self.total.size}")
        return AccuracyState(self.correct + other.correct, self.total + other.total)

    def __eq__(self, other: object) -> bool:
        """Equal counts in every class."""
        if not isinstance(other, AccuracyState):
            return NotImplemented
        return np.array_equal(self.correct, other.correct) and np.array_equal(self.total, other.total)

    def __hash__(self) -> int:
        """Hash of the counts."""
        return hash((self.correct.tobytes(), self.total.tobytes()))

    def accuracy(self) -> float | None:
        """Share of correct predictions over all samples, in [0, 1]; ``None`` without samples."""
        return _ratio(self.correct.sum(), self.total.sum())

    def per_class(self) -> list[float | None]:
        """Accuracy of each class, (C,), in [0, 1]; ``None`` for a class without samples."""
        return [_ratio(c, n) for c, n in zip(self.correct, self.total, strict=True)]

    def per_task(self, column_of_class: Sequence[int] | IntArray, num_tasks: int) -> list[float | None]:
        """One row of the accuracy matrix, (T,), in [0, 1]; ``None`` for a task without samples.

        Args:
            column_of_class: the task in which each class is first exposed, (C,); -1 for never.
            num_tasks: T.

        Raises:
            ValueError: not one task for each class, or a task outside [-1, T).
        """
        columns = self._columns(column_of_class, num_tasks)
        members = [columns == j for j in range(num_tasks)]
        return [_ratio(self.correct[own].sum(), self.total[own].sum()) for own in members]

    def task_totals(self, column_of_class: Sequence[int] | IntArray, num_tasks: int) -> list[int]:
        """Test samples of each task, (T,): the weights ``n_j`` of the weighted metrics."""
        columns = self._columns(column_of_class, num_tasks)
        return [int(self.total[columns == j].sum()) for j in range(num_tasks)]

    def _columns(self, column_of_class: Sequence[int] | IntArray, num_tasks: int) -> IntArray:
        columns = _integers(column_of_class, "column_of_class")
        if columns.shape != self.total.shape:
            raise ValueError(f"column_of_class has {columns.size} entries for {self.total.size} classes")
        if columns.size and (columns.min() < -1 or columns.max() >= num_tasks):
            raise ValueError(f"tasks lie in [0, {num_tasks}), or -1 for never; got {columns.tolist()}")
        return columns


def _integers(values: Any, name: str) -> IntArray:
    raw = np.asarray(values)
    if raw.ndim != 1 or (raw.size and raw.dtype.kind not in "iu"):
        raise ValueError(f"{name} is one integer for each entry; got shape {raw.shape} of {raw.dtype}")
    return raw.astype(np.int64)


def _ratio(correct: np.int64, total: np.int64) -> float | None:
    return float(correct) / float(total) if total else None
