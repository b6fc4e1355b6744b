"""What scenarios share: rows by first exposure, streams made of rows, settings that are not read."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Stage, Stream

_READERS = {
    ("base", "increment"): "class_incremental, few_shot, linear_blurry, open_world and category_discovery",
    ("benchmark",): "benchmark",
    ("shift", "own_classes"): "domain_incremental",
    ("datasets",): "domain_incremental and shift=given",
    ("angles",): "domain_incremental and shift=rotated",
    ("disjoint", "blurred"): "i_blurry and si_blurry",
    ("overlap", "steps"): "linear_blurry",
    ("shots",): "few_shot",
    ("of",): "those that change another stream (long_tailed, noisy_labels, task_incremental, cumulative, joint, ...)",
    ("imbalance", "tail"): "long_tailed",
    ("noise", "noise_rate"): "noisy_labels",
    ("mixed",): "open_world and category_discovery",
    ("labelled",): "open_world",
}
"""Keys that only some scenarios read, and which; ``tasks`` has a default that cannot be told from a choice."""


def refuse_unread(config: settings.Scenario, name: str, reads: Sequence[str]) -> None:
    """Refuses settings of the section that a scenario does not read.

    Raises:
        UsageError: a key outside ``reads`` differs from its default.
    """
    plain = settings.Scenario()
    for keys, readers in _READERS.items():
        for key in keys:
            if key not in reads and getattr(config, key) != getattr(plain, key):
                allowed = f"is not read with scenario.name={name}, only with scenario.name={readers}"
                raise UsageError(f"scenario.{key}", getattr(config, key), allowed)


def share(key: str, value: float, most: float = 1) -> Fraction:
    """A share exactly as it is written: 0.29 of 100 is 29, not floor(28.999...).

    >>> share("scenario.disjoint", 0.29) * 100
    Fraction(29, 1)

    Raises:
        UsageError: it is outside [0, ``most``].
    """
    if not 0 <= value <= most:
        raise UsageError(key, value, f"must be in [0, {most:g}]")
    return Fraction(str(value))


def check_labels(data: DatasetLabels) -> None:
    """Refuses labels that the dataset does not declare, and classes without a training or a test image."""
    for store, labels in (("training", data.train_labels), ("test", data.test_labels)):
        counts = np.bincount(labels, minlength=data.num_classes)
        if len(counts) > data.num_classes:
            raise UsageError("data.name", f"label {len(counts) - 1}", f"labels below {data.num_classes}")
        if missing := np.flatnonzero(counts == 0).tolist():
            names = [data.names[c] if data.names else str(c) for c in missing[:5]]
            raise UsageError(
                "data.name",
                ", ".join(names) + (" ..." if len(missing) > 5 else ""),
                f"every class needs a {store} image; {len(missing)} of {data.num_classes} have none",
            )


def first_exposure(data: DatasetLabels, train: Sequence[Ids]) -> Ids:
    """(C,) int64: the first task whose training rows show a class; the number of tasks where none does."""
    first = np.full(data.num_classes, len(train), dtype=np.int64)
    for task in reversed(range(len(train))):
        first[np.unique(data.train_labels[train[task]])] = task
    return first


def by_exposure(labels: Ids, rows: Ids, first: Ids, tasks: int) -> list[Ids]:
    """For each task those of ``rows``, ascending, whose class is first exposed in it."""
    rows = np.sort(rows)
    return [rows[first[labels[rows]] == task] for task in range(tasks)]


def assemble(
    name: str,
    data: DatasetLabels,
    preference: Sequence[int],
    train: Sequence[Ids],
    validation: Sequence[Ids],
    test: Sequence[Ids],
) -> Stream:
    """The stream of given rows; label positions follow first exposure.

    Args:
        name: of the scenario.
        data: labels of both stores.
        preference: original class ids in the order of positions among the classes of one task. Classes that no task
            shows get the last positions.
        train, validation, test: rows of each task, in any order.

    Raises:
        UsageError: a task has no training row.
    """
    empty = next((task for task, rows in enumerate(train) if len(rows) == 0), None)
    if empty is not None:
        allowed = f"task {empty + 1} of {len(train)} gets no training image: change the seed or scenario.tasks"
        raise UsageError("scenario.name", name, allowed)
    first = first_exposure(data, train)
    order = [int(c) for c in np.array(preference)[np.argsort(first[list(preference)], kind="stable")]]
    position = np.empty(data.num_classes, dtype=np.int64)
    position[order] = np.arange(len(order))
    stages = tuple(
        Stage(
            index=task,
            classes=tuple(np.flatnonzero(first[order] == task).tolist()),
            train_ids=np.sort(train[task]),
            validation_ids=np.sort(validation[task]),
            test_ids=np.sort(test[task]),
        )
        for task in range(len(train))
    )
    return Stream(
        name=name,
        class_order=tuple(order),
        stages=stages,
        num_classes=data.num_classes,
        train_labels=position[data.train_labels],
        test_labels=position[data.test_labels],
    )


def evenly(rows: Ids, parts: int, start: int) -> list[Ids]:
    """``rows`` in ``parts`` runs whose sizes differ by at most one; run ``start`` is the first that gets one more."""
    small, larger = divmod(len(rows), parts)
    sizes = [small + ((part - start) % parts < larger) for part in range(parts)]
    return np.split(rows, np.cumsum(sizes)[:-1])
