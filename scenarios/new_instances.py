"""New-instances streams: every task brings new images of the same classes."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Scenario, Stream

from ._rows import assemble, check_labels, evenly, refuse_unread
from .class_incremental import class_order


class NewInstances(Scenario):
    """The images of every class, dealt out over the tasks."""

    name = "new_instances"
    aliases = ("ni",)
    summary = "the same classes in every task, each time with new images"
    card = Card(
        title="CORe50: a New Dataset and Benchmark for Continuous Object Recognition",
        authors="Lomonaco and Maltoni",
        venue="CoRL",
        year=2017,
        certainty="Certain in kind. CORe50's own tasks are recording sessions; these are random equal parts.",
        notes="Training, held-out and test images of each class are shuffled and dealt out over scenario.tasks; sizes "
        "differ by at most one. The first task exposes every class. Column j of the accuracy matrix is the j-th part "
        "of the test images. For given groups of images see domain_incremental.",
    )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`.

        Raises:
            UsageError: a class has fewer training images, or the test store fewer images, than there are tasks.
        """
        from fedcl.data.splits import validation_split

        refuse_unread(config, self.name, ())
        check_labels(data)
        kept, held_out = validation_split(data.train_labels, validation, seed)
        least = int(np.bincount(data.train_labels[kept]).min())
        most = min(least, len(data.test_labels))
        if not 1 <= config.tasks <= most:
            what = f"a class has {least} training images" if most == least else f"there are {most} test images"
            raise UsageError("scenario.tasks", config.tasks, f"1 to {most}: {what}")
        every = np.arange(len(data.test_labels))
        return assemble(
            self.name,
            data,
            class_order(data.num_classes, config, seed),
            _dealt(kept, data.train_labels, config.tasks, seed, self.name, "train"),
            _dealt(held_out, data.train_labels, config.tasks, seed, self.name, "validation"),
            _dealt(every, data.test_labels, config.tasks, seed, self.name, "test"),
        )


def _dealt(rows: Ids, labels: Ids, tasks: int, *stream: object) -> list[Ids]:
    """``rows`` dealt out class by class; the odd images of a class go on where those of the last one ended."""
    parts: list[list[Ids]] = [[np.empty(0, dtype=np.int64)] for _ in range(tasks)]
    start = 0
    for label in np.unique(labels[rows]).tolist():
        mine = rows[labels[rows] == label]
        shuffled = mine[counter.permutation(len(mine), *stream, label)]
        for part, piece in zip(parts, evenly(shuffled, tasks, start), strict=True):
            part.append(piece)
        start = (start + len(mine)) % tasks
    return [np.concatenate(part) for part in parts]
