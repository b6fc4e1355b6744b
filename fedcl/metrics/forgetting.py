"""The forgetting numbers of the field, each by a name of its own, from one accuracy matrix.

They agree on the idea (what a task once scored, less what it scores at the end) and differ in which rows "once" may be,
and in what the mean is divided by. ``docs/metrics.md`` says who computes which. Entries are as in
:mod:`fedcl.metrics.matrix`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedcl.errors import UsageError
from fedcl.metrics import matrix as of_matrix
from fedcl.metrics.matrix import Matrix, as_matrix, mean_or_none


def forgetting_max_with_last(matrix: Matrix) -> float | None:
    """``mean_{j<T-1} (max_{j<=i<=T-1} R[i, j] - R[T-1, j])``: never negative, since the last row may be the best.

    >>> forgetting_max_with_last([[0.5, 0.0], [0.75, 1.0]])
    0.0
    """
    r = as_matrix(matrix)
    return mean_or_none([r[j:, j].max() - r[-1, j] for j in range(len(r) - 1)])


def forgetting_max_all_rows_before_last(matrix: Matrix) -> float | None:
    """``mean_{j<T-1} (max_{i<T-1} R[i, j] - R[T-1, j])``: as printed in Riemannian Walk.

    Source: Chaudhry et al., Riemannian Walk, ECCV 2018. Rows before the task was learned may be the best; where
    unlearned tasks score 0, as in class-incremental streams, this is :func:`fedcl.metrics.matrix.forgetting`.

    >>> forgetting_max_all_rows_before_last([[0.5, 0.9, 0.0], [0.5, 0.4, 0.0], [0.5, 1.0, 1.0]])
    -0.04999999999999999
    """
    r = as_matrix(matrix)
    return mean_or_none([r[:-1, j].max() - r[-1, j] for j in range(len(r) - 1)])


def forgetting_max_all_rows(matrix: Matrix) -> float | None:
    """``mean_{j<T-1} (max_i R[i, j] - R[T-1, j])``: rows before the task was learned may be the best as well.

    The same as :func:`forgetting_max_with_last` where unlearned tasks score 0, as in class-incremental streams.

    >>> forgetting_max_all_rows([[0.5, 0.9, 0.0], [0.5, 0.4, 0.0], [0.5, 0.4, 1.0]])
    0.25
    """
    r = as_matrix(matrix)
    return mean_or_none([r[:, j].max() - r[-1, j] for j in range(len(r) - 1)])


def forgetting_two_back(matrix: Matrix) -> float | None:
    """``1/(T-1) sum_{j<T-2} (max_{j<=i<T-2} R[i, j] - R[T-1, j])``: the last two tasks and rows are left out.

    Divided by T-1 all the same. None with fewer than three tasks: the sum is empty.

    >>> forgetting_two_back([[0.5, 0.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.5, 1.0]])
    0.125
    """
    r = as_matrix(matrix)
    mean = mean_or_none([r[j:-2, j].max() - r[-1, j] for j in range(len(r) - 2)])
    return None if mean is None else mean * (len(r) - 2) / (len(r) - 1)


def forgetting_over_all_tasks(matrix: Matrix) -> float | None:
    """:func:`fedcl.metrics.matrix.forgetting` with the sum divided by T: the last task counts as not forgotten.

    >>> forgetting_over_all_tasks([[1.0, 0.0], [0.25, 0.75]])
    0.375
    """
    value = of_matrix.forgetting(matrix)
    tasks = len(as_matrix(matrix))
    return None if value is None else value * (tasks - 1) / tasks


def forgetting_relative(matrix: Matrix) -> float | None:
    """Share of the best earlier accuracy that is lost: ``mean_{j<T-1} (max_{j<=i<T-1} R[i, j] - R[T-1, j]) / max``.

    None where a task never scored above 0: there was nothing to lose.

    >>> forgetting_relative([[0.5, 0.0], [0.125, 0.75]])
    0.75
    """
    r = as_matrix(matrix)
    best = [r[j:-1, j].max() for j in range(len(r) - 1)]
    return mean_or_none([(b - r[-1, j]) / b if b != 0 else None for j, b in enumerate(best)])


FORGETTING: dict[str, Callable[[Matrix], float | None]] = {
    "max_before_last": of_matrix.forgetting,
    "first_last": of_matrix.forgetting_first_last,
    "max_with_last": forgetting_max_with_last,
    "max_all_rows_before_last": forgetting_max_all_rows_before_last,
    "max_all_rows": forgetting_max_all_rows,
    "two_back": forgetting_two_back,
    "over_all_tasks": forgetting_over_all_tasks,
    "relative": forgetting_relative,
}
"""Every definition by name; ``max_before_last`` is the ``forgetting`` of ``summary.json``."""


def forgetting_by(name: str, matrix: Matrix) -> float | None:
    """Forgetting by the definition of that name, see :data:`FORGETTING`.

    Raises:
        UsageError: there is no such definition.

    >>> r = [[0.5, 0.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.5, 1.0]]
    >>> [forgetting_by(name, r) for name in ("max_before_last", "first_last", "two_back")]
    [0.25, 0.125, 0.125]
    """
    if name not in FORGETTING:
        raise UsageError("forgetting", name, f"must be one of {', '.join(FORGETTING)}", FORGETTING)
    return FORGETTING[name](matrix)


def forgetting_per_class(accuracies: Sequence[Sequence[float | None]]) -> float | None:
    """``mean_c (best past accuracy of class c - its last one)`` over the classes that were tested more than once.

    Source: Koh et al., i-Blurry, ICLR 2022 (F_last). For streams whose tasks share classes, where a column of the
    accuracy matrix is no unit of learning.

    Args:
        accuracies: accuracy of each class at each evaluation, (E, C); None before the class was exposed.

    Raises:
        ValueError: not a table of numbers in [0, 1], or a class that was tested has no last accuracy.

    >>> forgetting_per_class([[0.75, None], [0.5, 0.25], [0.25, 0.5]])
    0.125
    """
    table = np.array(accuracies, dtype=np.float64)
    if table.ndim != 2 or not (np.isnan(table) | ((table >= 0) & (table <= 1))).all():
        raise ValueError("accuracies are a table (evaluations, classes) of numbers in [0, 1] or None")
    tested = ~np.isnan(table)
    if (tested[:-1].any(axis=0) & ~tested[-1]).any():
        raise ValueError("a class that was tested before has no accuracy at the last evaluation")
    again = tested[:-1].any(axis=0)
    return mean_or_none(np.nanmax(table[:-1, again], axis=0) - table[-1, again]) if again.any() else None
