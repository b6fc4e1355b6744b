"""Streams that forget nothing: all tasks at once, or each task with all images of the earlier ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedcl import config as settings
from fedcl.cards import Card
from fedcl.stream import DatasetLabels, Stage, Stream

from ._wrapping import OF, Wrapping

_CERTAIN = "Certain: no method, and the usual reference of continual learning."


class Cumulative(Wrapping):
    """Another stream in which each task holds all images of the tasks before it too."""

    name = "cumulative"
    summary = "task t holds the images of tasks 0 to t of any other stream (scenario.of), federated"
    card = Card(
        title="Avalanche: an End-to-End Library for Continual Learning",
        authors="Lomonaco et al.",
        venue="CVPR Workshops",
        year=2021,
        certainty=_CERTAIN,
        notes="New images are dealt to clients as in the changed stream, old ones stay with their client. Columns, "
        "classes and held-out images of the tasks are those of the changed stream. The bound strategy=cumulative on "
        "the changed stream trains on the same images: with finetune the two give the same model. Take the scenario to "
        "run other strategies without forgetting, the bound to put a reference beside runs of the changed stream, as "
        "intransigence needs. Refused with partition.test=holdout, whose test images would be trained on later, with "
        f"partition.size, and with federation.passes=once. {OF}",
    )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`."""
        scenario, inner = self.inner(config)
        stream = scenario.build(data, inner, validation, seed)
        so_far = [stream.stages[: stage.index + 1] for stage in stream.stages]
        stages = tuple(
            replace(stage, train_ids=np.unique(np.concatenate([s.train_ids for s in seen])))
            for stage, seen in zip(stream.stages, so_far, strict=True)
        )
        return replace(stream, name=self.name, stages=stages)


class Joint(Wrapping):
    """All tasks of another stream as one."""

    name = "joint"
    summary = "all images of any other stream (scenario.of) in one task, federated: no continual learning"
    card = Card(
        title="Avalanche: an End-to-End Library for Continual Learning",
        authors="Lomonaco et al.",
        venue="CVPR Workshops",
        year=2021,
        certainty=_CERTAIN,
        notes="One task with all training, held-out and test images of the changed stream, split over the clients by "
        "the partition: plain federated learning. Metrics between tasks are undefined. The bound strategy=joint "
        "differs: it is centralised, one learner without clients, and it is trained task by task on all images so "
        f"far, so that its accuracy matrix has the columns of the stream. {OF}",
    )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`."""
        scenario, inner = self.inner(config)
        stream = scenario.build(data, inner, validation, seed)
        stages = stream.stages
        whole = Stage(
            index=0,
            classes=stream.known(len(stages) - 1),
            train_ids=np.unique(np.concatenate([stage.train_ids for stage in stages])),
            validation_ids=np.unique(np.concatenate([stage.validation_ids for stage in stages])),
            test_ids=np.unique(np.concatenate([stage.test_ids for stage in stages])),
        )
        return replace(stream, name=self.name, stages=(whole,), arrival=None)
