"""Metrics of one run that need more than its accuracy matrix: of classes, and of the accuracy curve of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fedcl.metrics.clients import summarise_clients
from fedcl.metrics.forgetting import forgetting_per_class
from fedcl.metrics.streams import anytime_accuracy

Tested = Sequence[Sequence[Any]]
"""After each task: its number, then right and all test images of each class, (C,) each."""

Curve = Sequence[Sequence[Any]]
"""(training images seen, accuracy on the classes so far) of each evaluation within tasks."""


def class_table(tested: Tested) -> list[list[float | None]]:
    """Accuracy of each class after each task, (T, C), in [0, 1]; None before a class has test images.

    >>> class_table([[0, [1, 0], [2, 0]], [1, [2, 1], [2, 4]]])
    [[0.5, None], [1.0, 0.25]]
    """
    return [[c / n if n else None for c, n in zip(right, every, strict=True)] for _, right, every in tested]


def per_class_forgetting(table: Sequence[Sequence[float | None]]) -> list[float | None]:
    """What each class has lost, (C,): its best earlier accuracy less its last; None for one that was tested once.

    The mean over classes is :func:`fedcl.metrics.forgetting.forgetting_per_class`.

    >>> per_class_forgetting([[0.75, None], [0.5, 0.25]])
    [0.25, None]
    """
    lost: list[float | None] = []
    for column in zip(*table, strict=True):
        before = [value for value in column[:-1] if value is not None]
        lost.append(max(before) - column[-1] if before and column[-1] is not None else None)
    return lost


def class_summary(tested: Tested) -> dict[str, dict[str, Any]]:
    """Mean, deviation and worst tenth over classes: of the last ``accuracy`` and of the ``forgetting``.

    The weighted mean counts test images alike; ``classes`` have a value, ``undefined`` ones have none.

    >>> found = class_summary([[0, [2, 0], [2, 0]], [1, [1, 1], [2, 4]]])
    >>> found["accuracy"]["mean"], found["forgetting"]["worst_decile"]
    (0.375, 0.5)
    """
    table, counts = class_table(tested), tested[-1][2]
    both = {
        "accuracy": summarise_clients(table[-1], counts),
        "forgetting": summarise_clients(per_class_forgetting(table), counts, worst="highest"),
    }
    # a class takes the place of a client
    return {name: {("classes" if k == "clients" else k): v for k, v in asdict(s).items()} for name, s in both.items()}


def anytime_of(curve: Curve) -> float | None:
    """A_auc of a run's evaluations within tasks, see :func:`fedcl.metrics.streams.anytime_accuracy`; None without any.

    Evaluations before which no image was seen since the last one have no width and do not count.

    >>> anytime_of([[30, 0.5], [30, 0.75], [40, 1.0]])
    0.625
    """
    seen = [0, *(point[0] for point in curve)]
    kept = [point for point, before in zip(curve, seen, strict=False) if point[0] > before]
    if not kept or any(point[1] is None for point in kept):
        return None
    return anytime_accuracy(np.array([point[1] for point in kept]), [point[0] for point in kept])


def run_metrics(records: Mapping[str, Any]) -> tuple[dict[str, float | None], list[str]]:
    """The metrics here by name in ``summary.json``, and the names of the undefined ones.

    Args:
        records: of a run, with ``by_class`` and, where it was evaluated within tasks, ``curve``.

    >>> run_metrics({"by_class": [[0, [1], [2]]], "curve": [[10, 0.5]]})
    ({'anytime_accuracy': 0.5, 'forgetting_per_class': None}, ['forgetting_per_class'])
    """
    table = class_table(records["by_class"])
    values = {
        "anytime_accuracy": anytime_of(records.get("curve", [])),
        "forgetting_per_class": forgetting_per_class(table) if len(table) > 1 else None,
    }
    return values, [name for name, value in values.items() if value is None]
