"""Open-world streams: a labelled base session, then mixes of known classes and classes that nobody has named."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Scenario, Stream

from ._rows import evenly, refuse_unread, share
from .class_incremental import ClassIncremental

SESSIONS = (
    "scenario.base classes with all labels first, then sessions of scenario.increment new classes each (or "
    "scenario.tasks in all). A class's training images stay in the session that first shows it, but for the share "
    "scenario.mixed, which is spread over the later ones, so that every session is a mix. New classes never have a "
    "label: no head has a row for them and no task exposes them. Column j of the accuracy matrix is the j-th part of "
    "the base classes' test images; held-out training images are cut alike."
)


class OpenWorld(Scenario):
    """A labelled base session, then sessions of labelled and unlabelled known and unlabelled unknown classes."""

    name = "open_world"
    aliases: ClassVar[tuple[str, ...]] = ("open_set",)
    summary = "labelled base, then mixes of known and never-named classes (scenario.base, increment, mixed, labelled)"
    probes = ("novelty",)
    card = Card(
        title="Open-World Semi-Supervised Learning",
        authors="Cao, Brbic, Leskovec",
        venue="ICLR",
        year=2022,
        certainty="The roles of the classes are the paper's: known ones partly labelled, novel ones never. That they "
        "come in sessions, and how images are mixed, is ours: the paper has one session.",
        notes=f"{SESSIONS} Of a base class's images in a later session the share scenario.labelled has labels. The "
        "probe novelty tells known from unknown classes: test images of the sessions still to come are among the "
        "unknown ones too.",
    )
    reads: ClassVar[tuple[str, ...]] = ("base", "increment", "mixed", "labelled")

    def labelled(self, config: settings.Scenario) -> Fraction:
        """Share of the known classes' images in later sessions that has labels."""
        return share("scenario.labelled", config.labelled)

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`.

        Raises:
            UsageError: no base session, or a session without new images.
        """
        refuse_unread(config, self.name, self.reads)
        if config.base is None:
            allowed = "the number of labelled classes of the first session, such as 80 of CIFAR-100's 100"
            raise UsageError("scenario.base", None, allowed)
        plain = settings.Scenario()
        inner = replace(config, mixed=plain.mixed, labelled=plain.labelled)
        stream = ClassIncremental().build(data, inner, validation, seed)
        known, count = stream.stages[0].classes, stream.num_tasks
        train = self._sessions(stream, share("scenario.mixed", config.mixed), seed)
        first = stream.stages[0]
        test = _by_class(stream.test_labels, first.test_ids, count, seed, self.name, "test")
        held = _by_class(stream.train_labels, first.validation_ids, count, seed, self.name, "validation")
        rate, without = self.labelled(config), [np.empty(0, dtype=np.int64)]
        for session, ids in enumerate(train):
            named = np.isin(stream.train_labels[ids], known)
            without.append(ids[~named])
            for label in known if session else ():
                rows = ids[stream.train_labels[ids] == label]
                order = counter.permutation(len(rows), seed, self.name, "labelled", session, stream.class_order[label])
                without.append(rows[order[int(rate * len(rows) + Fraction(1, 2)) :]])
        stages = tuple(
            replace(
                stage, classes=known if stage.index == 0 else (), train_ids=ids, test_ids=part, validation_ids=kept,
            )
            for stage, ids, part, kept in zip(stream.stages, train, test, held, strict=True)
        )  # fmt: skip
        later = stream.stages[1:]
        unnamed = tuple(np.sort(np.concatenate([getattr(s, n) for s in later])) for n in ("test_ids", "validation_ids"))
        return replace(
            stream, name=self.name, stages=stages, unlabelled=np.sort(np.concatenate(without)),
            unnamed=(unnamed[0], unnamed[1]),
        )  # fmt: skip

    def _sessions(self, stream: Stream, mixed: Fraction, seed: int) -> list[Ids]:
        """Training rows of each session, ascending."""
        count = stream.num_tasks
        parts: list[list[Ids]] = [[] for _ in range(count)]
        for stage in stream.stages:
            for label in stage.classes:
                rows = stage.train_ids[stream.train_labels[stage.train_ids] == label]
                rows = rows[counter.permutation(len(rows), seed, self.name, "train", stream.class_order[label])]
                later = count - 1 - stage.index
                moved = int(mixed * len(rows)) if later else 0
                parts[stage.index].append(rows[moved:])
                for session, piece in enumerate(evenly(rows[:moved], later, label % later) if later else []):
                    parts[stage.index + 1 + session].append(piece)
        return [np.sort(np.concatenate(part)) for part in parts]


def _by_class(labels: Ids, rows: Ids, parts: int, *stream: object) -> list[Ids]:
    """``rows`` dealt out class by class in random order; sizes of a class differ by at most one."""
    found: list[list[Ids]] = [[] for _ in range(parts)]
    start = 0
    for label in np.unique(labels[rows]).tolist():
        mine = rows[labels[rows] == label]
        mine = mine[counter.permutation(len(mine), *stream, label)]
        for place, piece in enumerate(evenly(mine, parts, start)):
            found[place].append(piece)
        start = (start + len(mine)) % parts
    return [np.sort(np.concatenate([rows[:0], *part])) for part in found]
