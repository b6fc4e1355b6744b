"""Metrics of whole streams beside those of :mod:`fedcl.metrics.matrix`.

Against a joint model, of few-shot sessions, online streams and memory budgets. Matrices, undefined entries and errors
are as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedcl.metrics.matrix import (
    Counts,
    Matrix,
    Row,
    as_counts,
    as_matrix,
    as_row,
    learning_accuracy,
    mean_or_none,
    seen_accuracy_weighted,
)


def per_task_intransigence(matrix: Matrix, joint: Row) -> list[float | None]:
    """What continual training lacks on each task when it is learned, (T,): ``I_k = a*_k - R[k, k]``.

    Source: Chaudhry et al., Riemannian Walk, ECCV 2018. Negative where the continual model is the better one.

    Args:
        matrix: accuracies, (T, T).
        joint: ``a*_k``, accuracy on task k of a model trained on the data of tasks 0 .. k together, (T,): the diagonal
            of the matrix of a run with the strategy ``cumulative``.

    >>> per_task_intransigence([[0.5, 0.0], [0.25, 0.75]], [0.75, 0.5])
    [0.25, -0.25]
    """
    r = as_matrix(matrix)
    gaps = as_row(joint, len(r), "joint accuracy") - np.diagonal(r)
    return [None if np.isnan(gap) else float(gap) for gap in gaps]


def intransigence(matrix: Matrix, joint: Row) -> float | None:
    """Mean over tasks of :func:`per_task_intransigence`, in [-1, 1].

    >>> intransigence([[0.5, 0.0], [0.25, 0.75]], [0.75, 0.75])
    0.125
    """
    return mean_or_none(per_task_intransigence(matrix, joint))


def anytime_accuracy(accuracies: Row, samples: Sequence[int] | None = None) -> float | None:
    """A_auc: area under the accuracy curve of an online stream over its length, in [0, 1].

    ``sum_e a_e (n_e - n_{e-1}) / n_E``, n_0 = 0; with evaluations every so many samples, the mean. Source: Koh et al.,
    i-Blurry, ICLR 2022.

    Args:
        accuracies: accuracy on the classes exposed so far at each evaluation, (E,).
        samples: samples of the stream seen at each evaluation, (E,), rising; None: equally many between evaluations.

    Raises:
        ValueError: an accuracy outside [0, 1], or samples that do not rise.

    >>> anytime_accuracy([0.5, 1.0]), anytime_accuracy([0.5, 1.0], [30, 40])
    (0.75, 0.625)
    """
    a = as_row(accuracies, len(accuracies), "anytime accuracy")
    if samples is None:
        return mean_or_none(a)
    ends = np.array([0, *samples], dtype=np.int64)
    if len(ends) != len(a) + 1 or (np.diff(ends) <= 0).any():
        raise ValueError(f"samples rise from above 0, one number for each of {len(a)} evaluations; got {list(samples)}")
    if not len(a) or np.isnan(a).any():
        return None
    return float((a * np.diff(ends)).sum() / ends[-1])


def session_accuracy(matrix: Matrix, test_counts: Counts) -> list[float | None]:
    """Accuracy after each session of a few-shot stream on the test images of all classes so far, (T,).

    Source: Tao et al., Few-Shot Class-Incremental Learning, CVPR 2020. It is :func:`seen_accuracy_weighted` by the
    field's name: images count alike, so the large base session weighs most.

    >>> session_accuracy([[0.5, 0.0], [0.25, 0.75]], [3, 1])
    [0.5, 0.375]
    """
    return seen_accuracy_weighted(matrix, test_counts)


def performance_drop(matrix: Matrix, test_counts: Counts) -> float | None:
    """PD: session accuracy after the base session less that after the last one; None with one session.

    Source: Zhang et al., Few-Shot Incremental Learning with Continually Evolved Classifiers (CEC), CVPR 2021.

    >>> performance_drop([[0.5, 0.0], [0.25, 0.75]], [3, 1])
    0.125
    """
    sessions = session_accuracy(matrix, test_counts)
    first, last = sessions[0], sessions[-1]
    return None if len(sessions) == 1 or first is None or last is None else first - last


def harmonic_accuracy(matrix: Matrix, test_counts: Counts) -> float | None:
    """Harmonic mean ``2 B N / (B + N)`` after the last session of the accuracies on base (B) and on later classes (N).

    N counts test images alike. 0 where both are 0; None with one session. Source: Peng et al., Few-Shot
    Class-Incremental Learning from an Open-Set Perspective (ALICE), ECCV 2022.

    >>> harmonic_accuracy([[1.0, 0.0], [0.75, 0.25]], [3, 1])
    0.375
    """
    r = as_matrix(matrix)
    counts = as_counts(test_counts, len(r))
    held = counts[1:] > 0
    if not held.any():
        return None
    novel = float((r[-1, 1:][held] * counts[1:][held]).sum() / counts[1:].sum())
    return _harmonic(float(r[-1, 0]), novel)


def stability(matrix: Matrix) -> float | None:
    """What remains of the earlier tasks: ``mean_{j<T-1} R[T-1, j]``; None with one task.

    Source: Sarfraz et al., SYNERgy between SYNaptic consolidation and Experience Replay, CoLLAs 2022. The plasticity to
    go with it is :func:`fedcl.metrics.matrix.learning_accuracy`, ``mean_j R[j, j]``.

    >>> stability([[1.0, 0.0], [0.25, 0.75]])
    0.25
    """
    return mean_or_none(as_matrix(matrix)[-1, :-1])


def stability_plasticity(matrix: Matrix) -> float | None:
    """Harmonic mean ``2 S P / (S + P)`` of stability S and plasticity P; 0 where both are 0.

    Source: as :func:`stability`.

    >>> stability_plasticity([[0.5, 0.0], [0.25, 1.0]])
    0.375
    """
    kept, learned = stability(matrix), learning_accuracy(matrix)
    return None if kept is None or learned is None else _harmonic(kept, learned)


def memory_area(megabytes: Sequence[float], accuracies: Row) -> float | None:
    """Area under accuracy against memory by the trapezoid rule, in megabytes: AUC-A and AUC-L.

    AUC-A takes the average incremental accuracy of runs with growing budgets, AUC-L the last accuracy. The area is not
    divided by the range, so that only curves over the same budgets compare. None with fewer than two budgets, or an
    undefined accuracy. Source: Zhou et al., Class-Incremental Learning: A Survey, TPAMI 2024 (memory-agnostic measure).

    Args:
        megabytes: model and exemplars of each run, (B,), rising.
        accuracies: of each run, in [0, 1], (B,).

    Raises:
        ValueError: budgets that do not rise, or an accuracy outside [0, 1].

    >>> memory_area([8.0, 12.0, 24.0], [0.5, 0.75, 0.75])
    11.5
    """
    budgets = np.array(megabytes, dtype=np.float64)
    a = as_row(accuracies, len(budgets), "accuracy")
    if not np.isfinite(budgets).all() or (budgets < 0).any() or (np.diff(budgets) <= 0).any():
        raise ValueError(f"budgets are numbers of megabytes in rising order; got {budgets.tolist()}")
    if len(budgets) < 2 or np.isnan(a).any():
        return None
    return float((np.diff(budgets) * (a[1:] + a[:-1]) / 2).sum())


def stream_metrics(matrix: Matrix, test_counts: Counts) -> tuple[dict[str, float | None], list[str]]:
    """The metrics here that need one run alone, by name in ``summary.json``, and the names of the undefined ones.

    >>> stream_metrics([[0.5]], [10])[1]
    ['performance_drop', 'harmonic_accuracy', 'stability', 'stability_plasticity']
    """
    values = {
        "performance_drop": performance_drop(matrix, test_counts),
        "harmonic_accuracy": harmonic_accuracy(matrix, test_counts),
        "stability": stability(matrix),
        "stability_plasticity": stability_plasticity(matrix),
    }
    return values, [name for name, value in values.items() if value is None]


def _harmonic(a: float, b: float) -> float | None:
    if np.isnan(a) or np.isnan(b):
        return None
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
