"""Metrics over clients: personal accuracies and matrices, spatial and temporal forgetting. Pure functions.

A client need not hold test samples of every task (or any): that is a property of the partition, not a failed
measurement. So a client's own metric is a mean over the tasks it is tested on, and a client without a value
is left out of the statistics and counted in ``undefined``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedcl.metrics import matrix as of_matrix
from fedcl.metrics.matrix import Counts, FloatArray, Matrix, Row


@dataclass(frozen=True)
class ClientSummary:
    """One metric over clients, in the unit of the metric; ``None`` where no client has a value.

    Attributes:
        weighted_mean: mean weighted by each client's test samples.
        mean: mean with every client counted alike.
        std: population standard deviation (divisor K: the clients are all there are, not a sample),
            unweighted.
        worst_decile: mean of the worst ceil(K / 10) clients, at least one (Li et al., q-FFL, ICLR 2020).
        clients: K, the clients that have a value.
        undefined: the clients that have none.
    """

    weighted_mean: float | None
    mean: float | None
    std: float | None
    worst_decile: float | None
    clients: int
    undefined: int


def summarise_clients(
    values: Sequence[float | None], test_counts: Counts, worst: Literal["lowest", "highest"] = "lowest"
) -> ClientSummary:
    """Statistics of one metric over clients.

    Args:
        values: the metric of each client, (K,); ``None`` or NaN for a client that has none.
        test_counts: test samples of each client, (K,).
        worst: which end is bad: ``lowest`` for accuracies and transfer, ``highest`` for forgetting.

    Raises:
        ValueError: different lengths, an infinite value, negative counts, a value from no test samples, or an
            unknown ``worst``.

    >>> summary = summarise_clients([0.5, None, 1.0], [30, 0, 10])
    >>> summary.weighted_mean, summary.mean, summary.std, summary.worst_decile
    (0.625, 0.75, 0.25, 0.5)
    >>> summary.clients, summary.undefined
    (2, 1)
    """
    if worst not in ("lowest", "highest"):
        raise ValueError(f"worst is 'lowest' or 'highest'; got {worst!r}")
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1 or np.isinf(array).any():
        raise ValueError("client values are one finite number or None for each client")
    counts = of_matrix.as_counts(test_counts, array.size)
    held = ~np.isnan(array)
    if (held & (counts == 0)).any():
        client = int(np.flatnonzero(held & (counts == 0))[0])
        raise ValueError(f"client {client} has a value but no test samples")
    kept, weights = array[held], counts[held]
    if kept.size == 0:
        return ClientSummary(None, None, None, None, 0, array.size)
    ordered = np.sort(kept) if worst == "lowest" else np.sort(kept)[::-1]
    return ClientSummary(
        weighted_mean=float((kept * weights).sum() / weights.sum()),
        mean=float(kept.mean()),
        std=float(kept.std()),
        worst_decile=float(ordered[: math.ceil(kept.size / 10)].mean()),
        clients=int(kept.size),
        undefined=int(array.size - kept.size),
    )


def client_metrics(matrix: Matrix, baseline: Row | None = None) -> dict[str, float | None]:
    """The metrics of one client's own accuracy matrix, (T, T), over the tasks the client is tested on.

    Formulas and names are those of :func:`fedcl.metrics.matrix.summary_metrics`, with each mean over tasks
    taken over the tasks whose column is defined; ``None`` where none is left.

    Args:
        matrix: accuracies on the client's own test samples; a whole column is undefined where it has none.
        baseline: accuracy of the untrained model on the client's test samples of each task, (T,), or
            ``None``.

    Raises:
        ValueError: not an accuracy matrix, or a column is undefined in some rows only.

    >>> values = client_metrics([[1.0, None, 0.0], [0.5, None, 0.0], [0.25, None, 0.75]])
    >>> values["average_accuracy"], values["forgetting"]
    (0.5, 0.75)
    """
    r = of_matrix.as_matrix(matrix)
    gaps = np.isnan(r)
    partial = gaps.any(axis=0) & ~gaps.all(axis=0)
    if partial.any():
        raise ValueError(f"task {int(np.flatnonzero(partial)[0])} is undefined in some rows only")
    backward = _mean_defined(of_matrix.per_task_backward_transfer(r))
    return {
        "average_accuracy": _mean_defined(r[-1]),
        "average_incremental_accuracy": _mean_defined([_mean_defined(r[i, : i + 1]) for i in range(len(r))]),
        "learning_accuracy": _mean_defined(np.diagonal(r)),
        "forgetting": _mean_defined(of_matrix.per_task_forgetting(r)),
        "forgetting_first_last": None if backward is None else 0.0 - backward,
        "backward_transfer": backward,
        "forward_transfer": _mean_defined(of_matrix.per_task_forward_transfer(r, baseline)),
    }


def summarise_client_matrices(
    matrices: Sequence[Matrix],
    test_counts: Sequence[Counts],
    baselines: Sequence[Row] | None = None,
) -> dict[str, ClientSummary]:
    """Every metric of :func:`client_metrics` over clients, weighted by their test samples of all tasks.

    Args:
        matrices: one accuracy matrix a client, K of (T, T).
        test_counts: test samples of each client and task, (K, T).
        baselines: accuracy of the untrained model for each client and task, (K, T), or ``None``.

    Raises:
        ValueError: no client, different lengths, or a column that is defined without test samples.

    >>> matrices = [[[1.0, 0.0], [0.5, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]
    >>> found = summarise_client_matrices(matrices, [[2, 1], [1, 2]])
    >>> found["forgetting"].mean, found["forgetting"].worst_decile
    (0.75, 1.0)
    """
    if not matrices or len(test_counts) != len(matrices):
        raise ValueError(f"{len(matrices)} client matrices and {len(test_counts)} rows of test counts")
    if baselines is not None and len(baselines) != len(matrices):
        raise ValueError(f"{len(matrices)} client matrices and {len(baselines)} baselines")
    metrics, totals = [], []
    for client, matrix in enumerate(matrices):
        r = of_matrix.as_matrix(matrix)
        counts = of_matrix.as_counts(test_counts[client], len(r))
        untested = (counts == 0) & ~np.isnan(r).all(axis=0)
        if untested.any():
            task = int(np.flatnonzero(untested)[0])
            raise ValueError(f"client {client}: task {task} has accuracies but no test samples")
        metrics.append(client_metrics(r, None if baselines is None else baselines[client]))
        totals.append(int(counts.sum()))
    return {
        name: summarise_clients(
            [values[name] for values in metrics],
            totals,
            worst="highest" if name.startswith("forgetting") else "lowest",
        )
        for name in metrics[0]
    }


def spatial_forgetting(local: Row, shared: Row) -> list[float | None]:
    """What aggregation takes from each client on its own current task: ``local_k - shared_k``, (K,).

    Source: the spatial part of spatial-temporal forgetting, Yang et al., Federated Continual Learning via
    Knowledge
    Fusion: A Survey, TKDE 2024. Negative where the aggregated model is the better one.

    Args:
        local: accuracy of each client's model after its local training, on its own test samples of the task,
            (K,).
        shared: accuracy of the aggregated model of the same round, on the same samples, (K,).

    Raises:
        ValueError: different lengths, or an accuracy outside [0, 1].

    >>> spatial_forgetting([1.0, 0.5, None], [0.25, 0.75, None])
    [0.75, -0.25, None]
    """
    before = of_matrix.as_row(local, len(local), "local accuracy")
    after = of_matrix.as_row(shared, len(local), "shared accuracy")
    return _differences(before, after)


def temporal_forgetting(matrix: Matrix) -> list[float | None]:
    """What the next task takes from each task but the last: ``R[j, j] - R[j+1, j]``, (T-1,).

    The temporal counterpart of :func:`spatial_forgetting`: the same model line, one task later. What still
    later tasks take or give back is in :func:`fedcl.metrics.matrix.per_task_forgetting`.

    >>> temporal_forgetting([[1.0, 0.0, 0.0], [0.25, 0.5, 0.0], [0.75, 0.75, 1.0]])
    [0.75, -0.25]
    """
    r = of_matrix.as_matrix(matrix)
    return _differences(np.diagonal(r)[:-1], np.diagonal(r, offset=-1))


def _differences(before: FloatArray, after: FloatArray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in (before - after).tolist()]


def _mean_defined(values: Row) -> float | None:
    array = np.array(values, dtype=np.float64)
    return of_matrix.mean_or_none(array[~np.isnan(array)])
