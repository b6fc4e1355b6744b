"""Few-shot class-incremental streams: a base session, then N-way K-shot sessions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Scenario, Stream

from ._rows import refuse_unread
from .class_incremental import ClassIncremental, task_sizes


class FewShot(Scenario):
    """A base session with all images of many classes, then sessions of few classes with few images each."""

    name = "few_shot"
    aliases = ("fscil",)
    summary = "base session, then N-way K-shot sessions (scenario.base, increment=N, shots=K)"
    card = Card(
        title="Few-Shot Class-Incremental Learning",
        authors="Tao et al.",
        venue="CVPR",
        year=2020,
        certainty="Certain: base classes with all images, then sessions of N classes with K training images each, all "
        "test images. The published benchmarks fix the K images by index lists; these are drawn by the run's seed.",
        notes="scenario.base classes first, scenario.increment (N) a session, scenario.shots (K) training images of "
        "each: CIFAR-100 and miniImageNet base=60 increment=5 shots=5, CUB-200 base=100 increment=10 shots=5. The rest "
        "of a class's training images is not used; held-out images (data.validation) are drawn before the K are.",
    )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`.

        Raises:
            UsageError: no base session, sessions of unequal size, or a class with fewer images than ``shots``.
        """
        refuse_unread(config, self.name, ("base", "increment", "shots"))
        if config.base is None:
            allowed = "the number of classes of the base session, such as 60 of CIFAR-100's 100"
            raise UsageError("scenario.base", None, allowed)
        sessions = task_sizes(data.num_classes, config)[1:]
        if len(set(sessions)) > 1:
            key = "tasks" if config.increment is None else "increment"
            allowed = f"a number that shares the {sum(sessions)} classes after the base session out equally"
            raise UsageError(f"scenario.{key}", getattr(config, key), allowed)
        stream = ClassIncremental().build(data, replace(config, shots=settings.Scenario().shots), validation, seed)
        stages = [stream.stages[0]]
        for stage in stream.stages[1:]:
            rows = []
            for label in stage.classes:
                pool = stage.train_ids[stream.train_labels[stage.train_ids] == label]
                original = stream.class_order[label]
                if not 1 <= config.shots <= len(pool):
                    name = data.names[original] if data.names else str(original)
                    allowed = f"1 to {len(pool)}: class {name} has {len(pool)} training images"
                    raise UsageError("scenario.shots", config.shots, allowed)
                drawn = counter.sample(len(pool), config.shots, seed, self.name, original)
                rows.append(pool[drawn])
            stages.append(replace(stage, train_ids=np.sort(np.concatenate(rows))))
        return replace(stream, name=self.name, stages=tuple(stages))
