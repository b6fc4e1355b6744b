"""Long-tailed streams: few classes with many training images, many with few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Stream

from ._wrapping import OF, Wrapping


class LongTailed(Wrapping):
    """Another stream whose classes' training images fall off exponentially."""

    name = "long_tailed"
    aliases = ("lt",)
    summary = "exponential class frequencies (scenario.imbalance, tail) of any other stream (scenario.of)"
    card = Card(
        title="Long-Tailed Class Incremental Learning",
        authors="Liu et al.",
        venue="ECCV",
        year=2022,
        certainty="Certain: the profile is that of Cao et al. (LDAM, NeurIPS 2019), n_max * imbalance^(-r / (C - 1)) "
        "rounded down for the class of rank r; ordered and shuffled tails are the two scenarios of Liu et al.",
        notes="scenario.imbalance is the ratio of the largest to the smallest class (100: as published). "
        "scenario.tail: shuffled gives ranks at random, ordered makes classes rarer in the order of exposure. n_max is "
        "the number of training images of the smallest class, so that every class can have its number. Held-out and "
        f"test images stay balanced. {OF}",
    )
    own = ("imbalance", "tail")

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`.

        Raises:
            UsageError: an imbalance below 1 or so large that a class or a task would be left without images.
        """
        if not config.imbalance >= 1:
            raise UsageError("scenario.imbalance", config.imbalance, "must be at least 1")
        scenario, inner = self.inner(config)
        stream = scenario.build(data, inner, validation, seed)
        shown = np.unique(np.concatenate([stage.train_ids for stage in stream.stages]))
        held = np.bincount(stream.train_labels[shown], minlength=stream.num_classes)
        classes = np.flatnonzero(held).tolist()
        ranks = range(len(classes))
        if config.tail == "shuffled":
            ranks = counter.permutation(len(classes), seed, self.name, "ranks").tolist()
        largest = int(held[classes].min())
        sizes = profile(largest, len(classes), config.imbalance)
        if sizes[-1] < 1:
            allowed = f"at most {largest}: the smallest class has {largest} training images"
            raise UsageError("scenario.imbalance", config.imbalance, allowed)
        keep = np.zeros(len(stream.train_labels), dtype=bool)
        for label, rank in zip(classes, ranks, strict=True):
            # a choice among all rows of the class is one of each task's
            rows: Ids = np.sort(shown[stream.train_labels[shown] == label])
            chosen = counter.permutation(len(rows), seed, self.name, stream.class_order[label])[: sizes[rank]]
            keep[rows[chosen]] = True
        stages = tuple(replace(stage, train_ids=stage.train_ids[keep[stage.train_ids]]) for stage in stream.stages)
        empty = next((stage.index for stage in stages if not len(stage.train_ids)), None)
        if empty is not None:
            allowed = f"lower: task {empty + 1} of {len(stages)} would be left without a training image"
            raise UsageError("scenario.imbalance", config.imbalance, allowed)
        return replace(stream, name=self.name, stages=stages)


def profile(largest: int, classes: int, imbalance: float) -> list[int]:
    """Training images of the classes by rank: ``largest * imbalance^(-r / (C - 1))``, rounded down.

    >>> profile(500, 5, 100)
    [500, 158, 50, 15, 5]
    """
    steps = max(classes - 1, 1)
    # the hair above makes up for powers that fall just short of a whole number
    return [int(largest * imbalance ** (-rank / steps) + 1e-6) for rank in range(classes)]
