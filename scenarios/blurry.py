"""Streams with blurry task boundaries: i-Blurry (the same in every task) and Si-Blurry (stochastic)."""

from __future__ import annotations

import math
from abc import abstractmethod
from fractions import Fraction

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Scenario, Stream

from ._rows import assemble, by_exposure, check_labels, evenly, first_exposure, refuse_unread, share
from .class_incremental import class_order

_NOTES = (
    "scenario.disjoint (N) of the classes belong to one task only, the others are blurry; both numbers are rounded "
    "down to multiples of scenario.tasks, and classes lost by this are never shown (they keep the last positions). "
    "scenario.blurred (M) of the blurry classes' images change the task. A class counts for the task that shows its "
    "first image: known classes, columns of the accuracy matrix and held-out images follow this, so a task that shows "
    "nothing new has an empty column (the weighted averages stay defined). data.validation is held out before images "
    "are moved. The images of a task come in random order, as in the paper; federation.passes=once shows each once, "
    "and federation.repeats is the paper's online_iter."
)


class _Blurry(Scenario):
    """Both variants: they differ in how classes and moved images are shared out over the tasks."""

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`.

        Raises:
            UsageError: more tasks than classes, a share outside [0, 1], or a task that gets no image.
        """
        from fedcl.data.splits import validation_split

        refuse_unread(config, self.name, ("disjoint", "blurred"))
        check_labels(data)
        tasks, order = config.tasks, class_order(data.num_classes, config, seed)
        moved = share("scenario.blurred", config.blurred)
        disjoint, blurry = pool_sizes(data.num_classes, tasks, share("scenario.disjoint", config.disjoint))
        kept, held_out = validation_split(data.train_labels, validation, seed)
        pools = order[:disjoint], order[disjoint : disjoint + blurry]
        fixed, mixed = (
            [
                kept[np.isin(data.train_labels[kept], classes)]
                for classes in self.classes(pool, tasks, seed, self.name, kind)
            ]
            for pool, kind in zip(pools, ("disjoint", "blurry"), strict=True)
        )
        mixed = self.blur(mixed, moved, seed, self.name)
        train = [np.concatenate(pair) for pair in zip(fixed, mixed, strict=True)]
        first = first_exposure(data, train)
        held = by_exposure(data.train_labels, held_out, first, tasks)
        test = by_exposure(data.test_labels, np.arange(len(data.test_labels)), first, tasks)
        return assemble(self.name, data, order, train, held, test)

    @abstractmethod
    def classes(self, pool: tuple[int, ...], tasks: int, *stream: object) -> list[tuple[int, ...]]:
        """The classes of a pool that each task gets."""

    @abstractmethod
    def blur(self, rows: list[Ids], moved: Fraction, *stream: object) -> list[Ids]:
        """The rows of blurry classes that each task gets, from those that it would get without blur."""


class IBlurry(_Blurry):
    """i-Blurry: every task has as many disjoint and blurry classes, and swaps the same share of images."""

    name = "i_blurry"
    aliases = ("iblurry",)
    summary = "blurry boundaries, the same in every task: N of the classes disjoint, M of the others' images moved"
    card = Card(
        title="Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime Inference",
        authors="Koh et al.",
        venue="ICLR",
        year=2022,
        certainty="Certain: read in the released sampler of Si-Blurry, whose fixed mode this is.",
        notes=_NOTES,
        deviations="The released sampler gives each task floor(pool / tasks) of the moved images and loses the rest; "
        "here the first tasks get one more, so that no image of a shown class is lost. Draws come from fedcl.random.",
    )

    def classes(self, pool: tuple[int, ...], tasks: int, *stream: object) -> list[tuple[int, ...]]:
        each = len(pool) // tasks
        return [pool[task * each : (task + 1) * each] for task in range(tasks)]

    def blur(self, rows: list[Ids], moved: Fraction, *stream: object) -> list[Ids]:
        cuts = [math.floor(moved * len(ids)) for ids in rows]
        pool = np.concatenate([ids[:cut] for ids, cut in zip(rows, cuts, strict=True)])
        shuffled = pool[counter.permutation(len(pool), *stream, "moved")]
        back = evenly(shuffled, len(rows), 0)
        return [np.concatenate([ids[cut:], more]) for ids, cut, more in zip(rows, cuts, back, strict=True)]


class SiBlurry(_Blurry):
    """Si-Blurry: random numbers of disjoint classes, blurry classes and moved images in every task."""

    name = "si_blurry"
    aliases = ("siblurry",)
    summary = "stochastic blurry boundaries: as i_blurry, with random numbers of classes and moved images a task"
    card = Card(
        title="Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask and Visual Prompt Tuning",
        authors="Moon et al.",
        venue="ICCV",
        year=2023,
        certainty="Certain: read in the released sampler.",
        notes=_NOTES + " A task may get no class, and one that gets no image at all is refused: take another seed.",
        deviations="Draws come from fedcl.random: the same law, but not the streams of the released seeds.",
    )

    def classes(self, pool: tuple[int, ...], tasks: int, *stream: object) -> list[tuple[int, ...]]:
        cuts = [0, *_cuts(len(pool), tasks, *stream), len(pool)]
        return [pool[cuts[task] : cuts[task + 1]] for task in range(tasks)]

    def blur(self, rows: list[Ids], moved: Fraction, *stream: object) -> list[Ids]:
        total = math.floor(moved * sum(len(ids) for ids in rows))
        shares = np.diff([0, *_cuts(total, len(rows), *stream, "shares"), total])
        pool = np.concatenate([ids[:count] for ids, count in zip(rows, shares, strict=True)])
        shuffled = pool[counter.permutation(len(pool), *stream, "moved")]
        # a task of fewer images than its share gives all of them, so that the last tasks may get less back
        back = np.split(shuffled, np.cumsum(shares)[:-1])
        return [np.concatenate([ids[count:], more]) for ids, count, more in zip(rows, shares, back, strict=True)]


def pool_sizes(classes: int, tasks: int, disjoint: Fraction) -> tuple[int, int]:
    """How many classes are disjoint and how many are blurry, each a multiple of the tasks.

    >>> pool_sizes(100, 5, Fraction(1, 2)), pool_sizes(10, 3, Fraction(1, 2))
    ((50, 50), (3, 6))

    Raises:
        UsageError: more tasks than classes.
    """
    if not 1 <= tasks <= classes:
        raise UsageError("scenario.tasks", tasks, f"1 to {classes}: the dataset has {classes} classes")
    fixed = math.floor(disjoint * classes) // tasks * tasks
    return fixed, (classes - fixed) // tasks * tasks


def _cuts(bound: int, tasks: int, *stream: object) -> list[int]:
    """``tasks - 1`` sorted uniform integers of ``range(bound)``, with replacement; zeros where it is empty."""
    draws = counter.Stream(*stream, "cuts")
    return sorted(draws.below(bound) for _ in range(tasks - 1))
