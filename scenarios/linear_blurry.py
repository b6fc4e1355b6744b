"""Class sets that fade into one another: linear-decay transitions."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.stream import DatasetLabels, Ids, Scenario, Stream

from ._rows import assemble, by_exposure, first_exposure, refuse_unread, share
from .class_incremental import ClassIncremental


class LinearBlurry(Scenario):
    """Disjoint class sets whose images overlap in time: each fades out while the next fades in."""

    name = "linear_blurry"
    aliases = ("linear_decay",)
    summary = "class sets that fade linearly into one another (scenario.overlap), in tasks of equal time"
    card = Card(
        title="Task-Agnostic Continual Learning Using Online Variational Bayes with Fixed-Point Updates",
        authors="Zeno et al.",
        venue="Neural Computation",
        year=2021,
        certainty="Certain for the probabilities: those of Avalanche's split_continuous_linear_decay_stream with "
        "beta = 1 / overlap (2 and more), iters_per_virtual_epoch = steps.",
        notes="The class sets are those of class_incremental (tasks, base, increment, order). One class set takes one "
        "unit of time; around each boundary, from overlap before to overlap after, the next set's share rises from 0 "
        "to 1. scenario.steps cuts each unit into so many tasks of equal time; with one step the tasks only leak "
        "overlap / 4 of their images into each neighbour. A class counts for the task that shows its first image, so "
        "with an overlap the last task exposes nothing new: its column of the accuracy matrix is empty, the plain "
        "averages are undefined and the weighted ones are what to read. With federation.passes=once the images of a "
        "task come in the order of these times.",
        deviations="Avalanche draws sets at random and passes over each again and again; here each image is dealt "
        "once, in the expected numbers.",
    )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`.

        Raises:
            UsageError: the class sets do not fit, overlap is outside [0, 0.5], or a task gets no image.
        """
        refuse_unread(config, self.name, ("base", "increment", "overlap", "steps"))
        overlap = share("scenario.overlap", config.overlap, 0.5)
        plain = settings.Scenario()
        sets = replace(config, overlap=plain.overlap, steps=plain.steps)
        disjoint = ClassIncremental().build(data, sets, validation, seed)
        tasks = disjoint.num_tasks * config.steps
        times = [Fraction(task, config.steps) for task in range(1, tasks)]
        parts: list[list[Ids]] = [[] for _ in range(tasks)]
        moments = np.zeros(len(data.train_labels))
        for stage in disjoint.stages:
            rows = stage.train_ids[counter.permutation(len(stage.train_ids), seed, self.name, stage.index)]
            before = [passed(stage.index, disjoint.num_tasks, time, overlap) for time in times]
            ends = [math.floor(len(rows) * part + Fraction(1, 2)) for part in before]
            moments[rows] = shown_at(stage.index, disjoint.num_tasks, len(rows), float(overlap))
            for task, part in enumerate(np.split(rows, ends)):
                parts[task].append(part)
        train = [np.concatenate(part) for part in parts]
        first = first_exposure(data, train)
        held_out = np.concatenate([stage.validation_ids for stage in disjoint.stages])
        held = by_exposure(data.train_labels, held_out, first, tasks)
        test = by_exposure(data.test_labels, np.arange(len(data.test_labels)), first, tasks)
        arrival = np.empty(len(moments), dtype=np.int64)
        arrival[np.argsort(moments, kind="stable")] = np.arange(len(moments))
        return replace(assemble(self.name, data, disjoint.class_order, train, held, test), arrival=arrival)


def passed(index: int, sets: int, time: Fraction, overlap: Fraction) -> Fraction:
    """The share of a class set's images that comes before ``time``, in units of one set, at most ``sets``.

    >>> [str(passed(1, 3, Fraction(t), Fraction(1, 4))) for t in (0, 1, 2, 3)]
    ['0', '1/16', '15/16', '1']
    """
    started = time if index == 0 else _risen(time - index, overlap)
    ended = Fraction(0) if index == sets - 1 else _risen(time - index - 1, overlap)
    return started - ended


def shown_at(index: int, sets: int, count: int, overlap: float) -> npt.NDArray[np.float64]:
    """When each of a class set's ``count`` images comes, (count,), rising: where :func:`passed` is (p + 1/2) / count.

    >>> shown_at(1, 3, 4, 0.25).round(3).tolist()
    [1.104, 1.375, 1.625, 1.896]
    """
    share = (np.arange(count) + 0.5) / count
    moments = share.copy()
    if index > 0:
        rising = share < overlap
        moments[rising] = 2 * np.sqrt(overlap * share[rising]) - overlap
    if index < sets - 1:
        falling = 1 - share < overlap
        moments[falling] = 1 + overlap - 2 * np.sqrt(overlap * (1 - share[falling]))
    return index + moments


def _risen(time: Fraction, overlap: Fraction) -> Fraction:
    """Integral up to ``time`` of the line that is 0 before -overlap and 1 from overlap on."""
    if time <= -overlap:
        return Fraction(0)
    return time if time >= overlap else (time + overlap) ** 2 / (4 * overlap)
