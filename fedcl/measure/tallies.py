"""From counts to numbers: accuracies, metrics over clients, bytes of each task."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..metrics.clients import summarise_client_matrices
from ..metrics.matrix import mean_or_none

Table = list[list[float | None]]
"""Rows of an accuracy matrix, None where undefined."""


def ratio(correct: int, total: int) -> float | None:
    """An accuracy in [0, 1], None when there was nothing to test."""
    return correct / total if total else None


def by_client(found: list[dict[str, list[list[int]]]]) -> dict[str, Any] | None:
    """Metrics of clients on images of their own: weighted mean, deviation, worst tenth; None without any.

    Args:
        found: after each task, each client's numbers of correct and of all images by task.
    """
    if not found:
        return None
    matrices = [
        [[ratio(c, n) for c, n in zip(step["correct"][k], step["total"][k], strict=True)] for step in found]
        for k in range(len(found[0]["total"]))
    ]
    return {n: asdict(s) for n, s in summarise_client_matrices(matrices, found[0]["total"]).items()}


def spatial_mean(tasks: list[list[list[int]]]) -> float | None:
    """Mean over tasks of what aggregation takes from the clients' own models, weighted by their test images.

    Args:
        tasks: for each task rows of (client, correct alone, correct aggregated, total).

    >>> spatial_mean([[[0, 9, 5, 10], [1, 10, 10, 10]]])
    0.2
    """
    return mean_or_none([(sum(r[1] for r in t) - sum(r[2] for r in t)) / sum(r[3] for r in t) for t in tasks])


def per_task(totals: list[list[int]]) -> list[list[int]]:
    """[up, down] of each task from the running totals after each."""
    before = [[0, 0], *totals]
    return [[b[0] - a[0], b[1] - a[1]] for a, b in zip(before, totals, strict=False)]
