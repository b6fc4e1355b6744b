"""Task-incremental streams: at test the task of an image is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedcl import config as settings
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Stream

from ._wrapping import OF, Wrapping


class TaskIncremental(Wrapping):
    """Another stream with a head for each task: an image chooses among the classes of its own task."""

    name = "task_incremental"
    aliases = ("til",)
    summary = "the task of an image is known at test: a head a task for any stream of disjoint classes (scenario.of)"
    card = Card(
        title="Three Types of Incremental Learning",
        authors="van de Ven, Tuytelaars, Tolias",
        venue="Nature Machine Intelligence",
        year=2022,
        certainty="Certain: the multi-head setting of LwF, EWC and GEM. Heads are disjoint rows of the one growing "
        "head, which is the same as a layer for each task.",
        notes="The softmax of an image runs over the classes of its own task, in training (images of a memory: over "
        "those of theirs) and at test, also of clients' own test sets, newcomers and held-out images. Accuracies are "
        "higher than in the class-incremental stream of the same images and must not be put beside those. A task "
        "that is not learned yet is scored by its initial rows, near chance, so that forward transfer is defined; a"
        " strategy that predicts by another rule scores 0 there. Probes of features know no task; those of the head"
        " do. Streams whose tasks share classes (blurry, new instances, domains) are refused: an image would have "
        f"no single task. So are clients with orders of their own (time.order). {OF}",
    )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`.

        Raises:
            UsageError: a class stands in several tasks, or a task brings no class.
        """
        scenario, inner = self.inner(config)
        stream = scenario.build(data, inner, validation, seed)
        seen = np.zeros(len(stream.train_labels), dtype=bool)
        for stage in stream.stages:
            fresh = stage.train_ids[~seen[stage.train_ids]]  # a cumulative stream shows old images again
            seen[fresh] = True
            if not stage.classes or not np.isin(stream.train_labels[fresh], stage.classes).all():
                allowed = f"streams of disjoint classes; {inner.name} shows old classes in task {stage.index + 1}"
                raise UsageError("scenario.of", [inner.name], allowed)
        return replace(stream, name=self.name, task_known=True)
