"""Metrics of an accuracy matrix, as pure functions.

``R[i, j]`` is the accuracy on task j after training on task i (0-based, T tasks), in [0, 1]. ``None`` or NaN
means undefined: nothing was measured there because task j has no test samples. Undefined is never skipped and
never counted as 0: a metric that needs an undefined entry is ``None``. The weighted forms are the exception
by their own formula, since a task of no test samples has weight 0. With T = 1 every difference between tasks
is ``None``. All arithmetic is float64.

Every function raises ValueError if the matrix is not square or an entry is outside [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Matrix = FloatArray | Sequence[Sequence[float | None]]
Row = FloatArray | Sequence[float | None]
Counts = npt.NDArray[np.int64] | Sequence[int]


def as_matrix(matrix: Matrix) -> FloatArray:
    """Checked float64 copy of an accuracy matrix, (T, T), with NaN where an entry is undefined.

    >>> as_matrix([[0.5, None], [0.25, 1]])
    array([[0.5 ,  nan],
           [0.25, 1.  ]])

    Raises:
        ValueError: not square, empty, or an entry outside [0, 1].
    """
    try:
        array = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an accuracy matrix has T rows of T numbers or None: {error}") from None
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.size == 0:
        raise ValueError(f"an accuracy matrix is square, (T, T) with T >= 1; got shape {array.shape}")
    _check_accuracies(array, "accuracy matrix")
    return array


def as_row(values: Row, num_tasks: int, name: str) -> FloatArray:
    """Checked float64 copy of one accuracy per task, (T,), with NaN where undefined.

    Raises:
        ValueError: not of length ``num_tasks``, or an entry outside [0, 1].
    """
    array = np.array(values, dtype=np.float64)
    if array.shape != (num_tasks,):
        raise ValueError(f"{name} needs one value for each of {num_tasks} tasks; got shape {array.shape}")
    _check_accuracies(array, name)
    return array


def as_counts(counts: Counts, num_tasks: int) -> npt.NDArray[np.int64]:
    """Checked int64 copy of the number of test samples of each task, (T,).

    Raises:
        ValueError: not of length ``num_tasks``, negative, or not whole numbers.
    """
    raw = np.asarray(counts)
    if raw.shape != (num_tasks,):
        raise ValueError(f"test counts need one value for each of {num_tasks} tasks; got shape {raw.shape}")
    array = raw.astype(np.int64)
    if (array != raw).any() or (array < 0).any():
        raise ValueError(f"test counts are whole numbers of samples, 0 or more; got {raw.tolist()}")
    return array


def seen_accuracy(matrix: Matrix) -> list[float | None]:
    """Accuracy on the tasks seen so far, each counted alike, after each task: ``mean_{j<=i} R[i, j]``.

    Source: Rebuffi et al., iCaRL, CVPR 2017 (the incremental accuracy curve).

    >>> seen_accuracy([[0.5, 0.25], [0.25, 0.75]])
    [0.5, 0.5]
    """
    r = as_matrix(matrix)
    return [mean_or_none(r[i, : i + 1]) for i in range(len(r))]


def seen_accuracy_weighted(matrix: Matrix, test_counts: Counts) -> list[float | None]:
    """Accuracy on the test samples seen so far: ``sum_{j<=i} n_j R[i, j] / sum_{j<=i} n_j``.

    ``n_j`` is the number of test samples of task j; tasks of no test samples have no weight.

    >>> seen_accuracy_weighted([[0.5, 0.25], [0.25, 0.75]], [1, 3])
    [0.5, 0.625]
    """
    r = as_matrix(matrix)
    counts = as_counts(test_counts, len(r))
    return [_weighted(r[i, : i + 1], counts[: i + 1]) for i in range(len(r))]


def average_accuracy(matrix: Matrix) -> float | None:
    """Accuracy after the last task, each task counted alike: ``mean_j R[T-1, j]``.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017 (ACC).

    >>> average_accuracy([[0.5, 0.25], [0.25, 0.75]])
    0.5
    """
    return seen_accuracy(matrix)[-1]


def average_accuracy_weighted(matrix: Matrix, test_counts: Counts) -> float | None:
    """Accuracy after the last task over all test samples: ``sum_j n_j R[T-1, j] / sum_j n_j``.

    >>> average_accuracy_weighted([[0.5, 0.25], [0.25, 0.75]], [1, 3])
    0.625
    """
    return seen_accuracy_weighted(matrix, test_counts)[-1]


def average_incremental_accuracy(matrix: Matrix) -> float | None:
    """Mean height of the accuracy curve: ``mean_i mean_{j<=i} R[i, j]``, the first task included.

    Source: Rebuffi et al., iCaRL, CVPR 2017.

    >>> average_incremental_accuracy([[1.0, 0.0], [0.25, 0.75]])
    0.75
    """
    return mean_or_none(seen_accuracy(matrix))


def average_incremental_accuracy_weighted(matrix: Matrix, test_counts: Counts) -> float | None:
    """Mean over i of the accuracy on the test samples seen so far, see :func:`seen_accuracy_weighted`.

    >>> average_incremental_accuracy_weighted([[0.5, 0.25], [0.25, 0.75]], [1, 3])
    0.5625
    """
    return mean_or_none(seen_accuracy_weighted(matrix, test_counts))


def per_task_forgetting(matrix: Matrix) -> list[float | None]:
    """Forgetting of each task but the last, (T-1,): ``f_j = max_{j<=i<T-1} R[i, j] - R[T-1, j]``.

    Source: Chaudhry et al., Riemannian Walk, ECCV 2018. Their maximum is over all rows before the last; here it
    starts at the row in which task j is learned, so luck before that is not counted as knowledge: the same in
    class-incremental streams, where unlearned tasks score 0. Negative when the last task improved task j.

    >>> per_task_forgetting([[0.5, 0.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.625, 1.0]])
    [0.5, -0.125]
    """
    r = as_matrix(matrix)
    return _listed(r[j:-1, j].max() - r[-1, j] for j in range(len(r) - 1))


def forgetting(matrix: Matrix) -> float | None:
    """Mean over all tasks but the last of the best accuracy before the last task minus the last accuracy.

    ``mean_{j<T-1} (max_{j<=i<T-1} R[i, j] - R[T-1, j])``, in [-1, 1]; see :func:`per_task_forgetting`.

    >>> forgetting([[0.5, 0.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.5, 1.0]])
    0.25
    >>> forgetting([[0.5]]) is None
    True
    """
    return mean_or_none(per_task_forgetting(matrix))


def forgetting_curve(matrix: Matrix) -> list[float | None]:
    """Forgetting after each task, (T,): entry k is :func:`forgetting` of the first k+1 rows and columns.

    >>> forgetting_curve([[0.5, 0.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.5, 1.0]])
    [None, -0.25, 0.25]
    """
    r = as_matrix(matrix)
    return [forgetting(r[: k + 1, : k + 1]) for k in range(len(r))]


def per_task_backward_transfer(matrix: Matrix) -> list[float | None]:
    """Change of each task but the last since it was learned, (T-1,): ``R[T-1, j] - R[j, j]``.

    >>> per_task_backward_transfer([[0.5, 0.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.625, 1.0]])
    [-0.25, 0.125]
    """
    r = as_matrix(matrix)
    return _listed(r[-1, j] - r[j, j] for j in range(len(r) - 1))


def backward_transfer(matrix: Matrix) -> float | None:
    """What later tasks did to earlier ones: ``mean_{j<T-1} (R[T-1, j] - R[j, j])``; negative: forgetting.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017 (BWT).

    >>> backward_transfer([[1.0, 0.0], [0.25, 0.75]])
    -0.75
    """
    return mean_or_none(per_task_backward_transfer(matrix))


def forgetting_first_last(matrix: Matrix) -> float | None:
    """Forgetting as first minus last accuracy: ``mean_{j<T-1} (R[j, j] - R[T-1, j])``.

    Source: Avalanche's ``Forgetting``. Equal to minus the backward transfer, and at most :func:`forgetting`.

    >>> forgetting_first_last([[1.0, 0.0], [0.25, 0.75]])
    0.75
    """
    transfer = backward_transfer(matrix)
    return None if transfer is None else 0.0 - transfer


def per_task_forward_transfer(matrix: Matrix, baseline: Row | None) -> list[float | None]:
    """Head start of each task but the first, (T-1,): ``R[j-1, j] - b_j`` for j = 1 .. T-1.

    >>> per_task_forward_transfer([[1.0, 0.375], [0.25, 0.75]], [0.5, 0.125])
    [0.25]
    """
    r = as_matrix(matrix)
    if baseline is None:
        return [None] * (len(r) - 1)
    b = as_row(baseline, len(r), "baseline")
    return _listed(r[j - 1, j] - b[j] for j in range(1, len(r)))


def forward_transfer(matrix: Matrix, baseline: Row | None) -> float | None:
    """What earlier tasks gave to a task not yet learned: ``mean_{j>0} (R[j-1, j] - b_j)``.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017 (FWT).

    Args:
        matrix: accuracies, (T, T).
        baseline: ``b_j``, the accuracy of the untrained model on task j, (T,); entry 0 is not used. ``None``
            when it does not exist, as in class-incremental streams whose predictor cannot score unseen
            classes.

    >>> forward_transfer([[1.0, 0.375], [0.25, 0.75]], [0.5, 0.125])
    0.25
    >>> forward_transfer([[1.0, 0.0], [0.25, 0.75]], None) is None
    True
    """
    return mean_or_none(per_task_forward_transfer(matrix, baseline))


def learning_accuracy(matrix: Matrix) -> float | None:
    """How well each task was learned at its own time: ``mean_j R[j, j]``.

    Source: Riemer et al., Meta-Experience Replay, ICLR 2019 (LA).

    >>> learning_accuracy([[1.0, 0.0], [0.25, 0.75]])
    0.875
    """
    return mean_or_none(np.diagonal(as_matrix(matrix)))


def cumulative_forgetting(cumulative: Matrix) -> float | None:
    """Forgetting inside growing sets of tasks: ``mean_j (max_{j<=i} C[i, j] - C[T-1, j])``, in [0, 1].

    Source: Soutif-Cormerais et al., On the importance of cross-task features, 2021 (arXiv:2106.11930).

    Args:
        cumulative: ``C[i, j]``, accuracy after task i on the classes of tasks 0 .. j, with the prediction
            restricted to these classes, (T, T). This is not the accuracy matrix: it has to be measured so.

    >>> cumulative_forgetting([[1.0, 0.0], [0.5, 0.75]])
    0.25
    """
    c = as_matrix(cumulative)
    if len(c) == 1:
        return None
    return mean_or_none([c[j:, j].max() - c[-1, j] for j in range(len(c))])


def summary_metrics(
    matrix: Matrix, baseline: Row | None, test_counts: Counts | None
) -> tuple[dict[str, float | None], list[str]]:
    """All metrics of one accuracy matrix, by name in ``summary.json``, and the names of the undefined ones.

    Args:
        matrix: accuracies, (T, T).
        baseline: accuracy of the untrained model on each task, (T,), or ``None``; see
            :func:`forward_transfer`.
        test_counts: test samples of each task, (T,), or ``None``: then the weighted metrics are undefined.

    >>> values, undefined = summary_metrics([[0.5]], None, [10])
    >>> values["average_accuracy"], undefined
    (0.5, ['forgetting', 'forgetting_first_last', 'backward_transfer', 'forward_transfer'])
    """
    r = as_matrix(matrix)
    values: dict[str, float | None] = {
        "average_accuracy": average_accuracy(r),
        "average_accuracy_weighted": None if test_counts is None else average_accuracy_weighted(r, test_counts),
        "average_incremental_accuracy": average_incremental_accuracy(r),
        "average_incremental_accuracy_weighted": (
            None if test_counts is None else average_incremental_accuracy_weighted(r, test_counts)
        ),
        "learning_accuracy": learning_accuracy(r),
        "forgetting": forgetting(r),
        "forgetting_first_last": forgetting_first_last(r),
        "backward_transfer": backward_transfer(r),
        "forward_transfer": forward_transfer(r, baseline),
    }
    return values, [name for name, value in values.items() if value is None]


def mean_or_none(values: Row) -> float | None:
    """Mean of the values; ``None`` if there are none or any of them is undefined.

    >>> mean_or_none([0.25, 0.75]), mean_or_none([0.25, None]), mean_or_none([])
    (0.5, None, None)
    """
    array = np.array(values, dtype=np.float64)
    if array.size == 0 or np.isnan(array).any():
        return None
    return float(array.mean())


def _weighted(values: FloatArray, counts: npt.NDArray[np.int64]) -> float | None:
    held = counts > 0
    if not held.any() or np.isnan(values[held]).any():
        return None
    return float((values[held] * counts[held]).sum() / counts[held].sum())


def _listed(values: Iterable[float]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _check_accuracies(array: FloatArray, name: str) -> None:
    wrong = ~(np.isnan(array) | ((array >= 0) & (array <= 1)))
    if wrong.any():
        place = tuple(int(k) for k in np.argwhere(wrong)[0])
        raise ValueError(f"{name}: entry {list(place)} is {array[place]}; accuracies lie in [0, 1]")
