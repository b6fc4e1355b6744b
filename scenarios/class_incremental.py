"""Class-incremental streams: every class belongs to exactly one task."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Scenario, Stage, Stream

from ._rows import check_labels, refuse_unread

ORDERS = ("random", "natural", "seed1993", "given")


class ClassIncremental(Scenario):
    """Disjoint sets of classes, one a task: equal steps or "base + increments", built through Avalanche."""

    name = "class_incremental"
    aliases = ("cil",)
    summary = "disjoint classes, one set a task: equal steps or base + increments (B50-Inc10)"
    card = Card(
        title="Deep Class-Incremental Learning: A Survey",
        authors="Zhou et al.",
        venue="TPAMI",
        year=2024,
        notes="scenario.tasks equal steps (the first tasks get the remainder); scenario.increment replaces "
        "tasks: base classes first, then increment a task, the last task takes what remains (as in PyCIL). "
        "base with tasks and no increment spreads the other classes over the other tasks. order: random (by "
        "the run's seed), natural, seed1993 (the permutation of NumPy's generator seeded with 1993, as in "
        "the field's tables), given (scenario.classes).",
    )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`. Raises before Avalanche is imported when settings do not
        fit.
        """
        from fedcl.data.splits import validation_split

        refuse_unread(config, self.name, ("base", "increment"))
        sizes = task_sizes(data.num_classes, config)
        order = class_order(data.num_classes, config, seed)
        check_labels(data)
        _, held_out = validation_split(data.train_labels, validation, seed)
        train, test = _avalanche_rows(data, order, sizes)
        is_held_out = np.zeros(len(data.train_labels), dtype=bool)
        is_held_out[held_out] = True
        position = np.empty(data.num_classes, dtype=np.int64)
        position[list(order)] = np.arange(data.num_classes)
        starts = np.cumsum([0, *sizes]).tolist()
        stages = tuple(
            Stage(
                index=task,
                classes=tuple(range(starts[task], starts[task + 1])),
                train_ids=train[task][~is_held_out[train[task]]],
                validation_ids=train[task][is_held_out[train[task]]],
                test_ids=test[task],
            )
            for task in range(len(sizes))
        )
        return Stream(
            name=self.name,
            class_order=order,
            stages=stages,
            num_classes=data.num_classes,
            train_labels=position[data.train_labels],
            test_labels=position[data.test_labels],
        )


def task_sizes(classes: int, config: settings.Scenario) -> list[int]:
    """How many classes each task exposes.

    >>> task_sizes(10, settings.Scenario(tasks=4))
    [3, 3, 2, 2]
    >>> task_sizes(100, settings.Scenario(base=50, increment=20))
    [50, 20, 20, 10]

    Raises:
        UsageError: more tasks than classes, or base and increment that do not fit.
    """
    base = config.base or 0
    if base < 0 or base >= classes:
        raise UsageError("scenario.base", config.base, f"0 to {classes - 1}: the dataset has {classes} classes")
    left = classes - base
    if config.increment is not None:
        if not 1 <= config.increment <= left:
            raise UsageError(
                "scenario.increment",
                config.increment,
                f"1 to {left}: the dataset has {classes} classes and scenario.base={base}",
            )
        full, rest = divmod(left, config.increment)
        return [base] * (base > 0) + [config.increment] * full + [rest] * (rest > 0)
    tasks = config.tasks - (base > 0)
    if not 1 <= tasks <= left:
        first = f", scenario.base={base} of them in the first task" if base else ""
        least = 2 if base else 1
        raise UsageError(
            "scenario.tasks",
            config.tasks,
            f"{least} to {left + (base > 0)}: the dataset has {classes} classes{first}",
        )
    small, larger = divmod(left, tasks)
    return [base] * (base > 0) + [small + (task < larger) for task in range(tasks)]


def class_order(classes: int, config: settings.Scenario, seed: int) -> tuple[int, ...]:
    """Original class ids in the order of exposure.

    >>> class_order(3, settings.Scenario(order="given", classes=[2, 0, 1]), 0)
    (2, 0, 1)

    Raises:
        UsageError: an unknown order, or ``scenario.classes`` that is no permutation or not asked for.
    """
    if config.order not in ORDERS:
        raise UsageError("scenario.order", config.order, " | ".join(ORDERS), ORDERS)
    if config.order == "given":
        if sorted(config.classes) != list(range(classes)):
            raise UsageError("scenario.classes", config.classes, f"each of the classes 0 to {classes - 1} exactly once")
        return tuple(int(c) for c in config.classes)
    if config.classes:
        raise UsageError("scenario.classes", config.classes, "only with scenario.order=given")
    if config.order == "natural":
        return tuple(range(classes))
    if config.order == "seed1993":
        # the legacy generator is frozen by NumPy's policy: the field's published order depends on it
        return tuple(np.random.RandomState(1993).permutation(classes).tolist())
    return tuple(counter.permutation(classes, seed, "class_order").tolist())


def _avalanche_rows(data: DatasetLabels, order: tuple[int, ...], sizes: list[int]) -> tuple[list[Ids], list[Ids]]:
    """Rows of the training and of the test store of each experience, ascending; every row exactly once."""
    from fedcl.bridges.avalanche_import import quiet_avalanche, sealed

    quiet_avalanche()
    with sealed():
        from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark

        benchmark = class_incremental_benchmark(
            {"train": _as_avalanche(data.train_labels), "test": _as_avalanche(data.test_labels)},
            class_order=list(order),
            num_classes_per_exp=list(sizes),
        )
        streams = [
            [_sample_ids(experience) for experience in stream]
            for stream in (benchmark.train_stream, benchmark.test_stream)
        ]
    for rows, labels in zip(streams, (data.train_labels, data.test_labels), strict=True):
        seen = np.bincount(np.concatenate(rows), minlength=len(labels))
        if len(seen) != len(labels) or not (seen == 1).all():
            raise RuntimeError("a row is missing from the Avalanche stream, or stands in it twice")
    return streams[0], streams[1]


def _as_avalanche(labels: Ids) -> Any:
    import torch
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute
    from torch.utils.data import TensorDataset

    ids = torch.arange(len(labels))
    dataset: Any = TensorDataset(ids)
    dataset.targets = labels.tolist()
    return as_classification_dataset(dataset).update_data_attribute("sample_id", DataAttribute(ids, "sample_id"))


def _sample_ids(experience: Any) -> Ids:
    ids = experience.dataset.sample_id.data
    return np.sort(np.fromiter(ids, dtype=np.int64, count=len(ids)))
