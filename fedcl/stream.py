"""Streams of tasks and their split over clients: plain NumPy rows, no images.

A **store** is the contiguous tensor of a dataset's training (or test) images. A :class:`Stream` says which
rows of it belong to which task; a :class:`Split` says which of a task's training rows belong to which
client. Labels are **positions**: class ``class_order[p]`` of the dataset has label ``p``, and logit ``p``,
everywhere in fedcl.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from . import config as settings
from .cards import Card
from .errors import UsageError

if TYPE_CHECKING:
    from .data.store import Dataset

Ids = npt.NDArray[np.int64]
"""Rows of a store, or labels."""

Store = Literal["train", "test"]


@dataclass(frozen=True)
class DatasetLabels:
    """All that a scenario needs to know of a dataset.

    Attributes:
        train_labels: (N,) int64 original class ids of the training store.
        test_labels: (M,) int64 original class ids of the test store.
        num_classes: how many classes the dataset declares.
        names: (num_classes,) class names.
    """

    train_labels: Ids
    test_labels: Ids
    num_classes: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One task of a stream.

    Attributes:
        index: number of the task, from 0.
        classes: label positions first exposed in this task (none in a domain stream after its first task).
        train_ids: rows of the training store to learn from, ascending.
        validation_ids: rows of the training store that are held out, ascending.
        test_ids: rows of the test store that make up column ``index`` of the accuracy matrix, ascending.
    """

    index: int
    classes: tuple[int, ...]
    train_ids: Ids
    validation_ids: Ids
    test_ids: Ids


@dataclass(frozen=True)
class Stream:
    """A sequence of tasks over one dataset.

    Attributes:
        name: the scenario that built it.
        class_order: original class id of each label position.
        stages: the tasks in order.
        num_classes: number of label positions.
        train_labels: (N,) int64 label positions of the training store.
        test_labels: (M,) int64 label positions of the test store.
    """

    name: str
    class_order: tuple[int, ...]
    stages: tuple[Stage, ...]
    num_classes: int
    train_labels: Ids
    test_labels: Ids

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.stages)

    def known(self, task: int) -> tuple[int, ...]:
        """Label positions exposed in tasks 0 to ``task``, ascending."""
        return tuple(sorted({label for stage in self.stages[: task + 1] for label in stage.classes}))


class Scenario(ABC):
    """Turns a dataset's labels into a stream of tasks. Subclasses are found by entry point or
    ``--plugin``.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    card: ClassVar[Card] = Card("")

    def dataset(self, config: settings.Scenario, seed: int) -> Dataset | None:
        """The scenario's own images, or None (the default) to use those of the ``data`` section.

        Called once, before :meth:`build`, which then gets this dataset's labels.
        """
        return None

    @abstractmethod
    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """The stream of ``data``.

        Args:
            data: labels of both stores.
            config: the ``scenario`` section.
            validation: share of each class's training rows to hold out, in [0, 1).
            seed: the run's seed; equal seeds give equal streams.

        Raises:
            UsageError: the section does not fit the dataset.
        """


class Partition(ABC):
    """A rule that splits one task's training rows over the clients.

    Subclasses write :meth:`draw`; :meth:`split` checks the settings and repeats the draw until
    ``partition.min_size`` holds.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    card: ClassVar[Card] = Card("")
    attempts: ClassVar[int] = 1000
    """Most draws to reach ``partition.min_size``; 1 where another draw gives the same sizes."""

    setting: ClassVar[str] = ""
    """The key of the section that shapes the sizes, for the error that names it."""

    remedy: ClassVar[str] = "lower partition.min_size or federation.clients"
    """What to change when no draw was large enough."""

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """Raises UsageError where the rule's own settings cannot be met; the default accepts all."""
        return None

    @abstractmethod
    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """One draw of the rule: rows of ``labels`` for each client, in any order.

        A rule that knows its sizes before it deals rows may return None when the smallest is below
        ``config.min_size``. ``attempt`` counts the draws from 0 and belongs into the name of whatever is
        redrawn.
        """

    def split(self, labels: Ids, clients: int, config: settings.Partition, *stream_parts: object) -> list[Ids]:
        """Splits one task.

        Args:
            labels: (N,) int64 label positions of the task's training rows.
            clients: number of clients K, at least 1.
            config: the ``partition`` section.
            stream_parts: name of the random stream, for example ``seed, "partition", task``.

        Returns:
            K arrays of indices into ``range(N)``: disjoint, together complete, each ascending. A client may
            be empty.

        Raises:
            UsageError: a setting is out of range, or ``min_size`` was not reached.
        """
        if clients < 1:
            raise UsageError("federation.clients", clients, "at least 1")
        if config.min_size < 0:
            raise UsageError("partition.min_size", config.min_size, "at least 0")
        if config.min_size * clients > len(labels):
            raise UsageError(
                "partition.min_size",
                config.min_size,
                f"at most {len(labels) // clients}: a task has {len(labels)} training images "
                f"for federation.clients={clients}",
            )
        self.check(labels, clients, config)
        for attempt in range(self.attempts):
            parts = self.draw(labels, clients, config, attempt, *stream_parts)
            if parts is not None and min(len(part) for part in parts) >= config.min_size:
                return [np.sort(part).astype(np.int64, copy=False) for part in parts]
        shaped = f", partition.{self.setting}={getattr(config, self.setting)}" if self.setting else ""
        raise UsageError(
            "partition.min_size",
            config.min_size,
            f"not reached in {self.attempts} draw(s) of partition.name={self.name}{shaped}, "
            f"federation.clients={clients} and {len(labels)} images; {self.remedy}",
        )


@dataclass(frozen=True)
class Split:
    """Which rows each client holds in each task.

    Attributes:
        clients: number of clients K.
        train: ``train[task][client]`` rows of the training store, ascending.
        test: ``test[task][client]`` rows of the personal test sets, ascending, or None without any.
        test_store: the store that the rows of ``test`` are of; None where ``test`` is None.
        num_classes: number of label positions C.
        train_labels: (N,) int64 label positions of the training store.
    """

    clients: int
    train: tuple[tuple[Ids, ...], ...]
    test: tuple[tuple[Ids, ...], ...] | None
    test_store: Store | None
    num_classes: int
    train_labels: Ids

    @property
    def empty(self) -> tuple[tuple[int, ...], ...]:
        """For each task the clients that hold no training row in it."""
        return tuple(tuple(client for client, ids in enumerate(task) if len(ids) == 0) for task in self.train)

    def counts(self) -> Ids:
        """(T, K, C) int64: training rows by task, client and label position."""
        out = np.zeros((len(self.train), self.clients, self.num_classes), dtype=np.int64)
        for task, clients in enumerate(self.train):
            for client, ids in enumerate(clients):
                out[task, client] = np.bincount(self.train_labels[ids], minlength=self.num_classes)
        return out


def parse_test_rule(rule: str) -> tuple[str, Fraction]:
    """The kind and the share of ``partition.test``.

    >>> parse_test_rule("holdout(0.2)")
    ('holdout', Fraction(1, 5))

    Raises:
        UsageError: neither ``global``, ``same_mix`` nor ``holdout(p)`` with 0 < p < 1.
    """
    if rule in ("global", "same_mix"):
        return rule, Fraction(0)
    if rule.startswith("holdout(") and rule.endswith(")"):
        try:
            # the decimal text is taken exactly: 0.29 of 100 images is 29, not floor(28.999...)
            share = Fraction(rule[len("holdout(") : -1].strip())
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if 0 < share < 1:
            return "holdout", share
    names = ("global", "same_mix", "holdout(0.2)")
    raise UsageError("partition.test", rule, "global, same_mix or holdout(p) with 0 < p < 1", names)


def partition_stream(
    stream: Stream, partition: Partition, config: settings.Partition, clients: int, seed: int
) -> Split:
    """Splits every task of a stream over the clients, each drawn anew by the same rule.

    Personal test sets (``partition.test``):

    - ``global``: none; every client is tested on the stream's test rows.
    - ``same_mix``: from the task's test rows, for each class with ``m`` test rows of which a client holds
      ``n_k`` of ``n`` training rows, ``ceil(m n_k / n)`` rows: every class a client trains on and that the
      task tests is tested. Rows are drawn without replacement within a client; two clients may share test
      rows.
    - ``holdout(p)``: ``floor(p n_k)`` of a client's training rows of the task, drawn at random and taken out
      of its training set, so a client with a single row keeps it for training.

    Raises:
        UsageError: a setting is out of range or cannot be reached.
    """
    kind, share = parse_test_rule(config.test)
    train: list[tuple[Ids, ...]] = []
    test: list[tuple[Ids, ...]] = []
    for stage in stream.stages:
        labels = stream.train_labels[stage.train_ids]
        parts = partition.split(labels, clients, config, seed, "partition", stage.index)
        held = [stage.train_ids[part] for part in parts]
        if kind == "holdout":
            cut = [_hold_out(ids, share, seed, stage.index, k) for k, ids in enumerate(held)]
            held = [kept for kept, _ in cut]
            test.append(tuple(out for _, out in cut))
        elif kind == "same_mix":
            test.append(tuple(_same_mix(stream, stage, held, seed)))
        train.append(tuple(held))
    stores: dict[str, Store | None] = {"global": None, "same_mix": "test", "holdout": "train"}
    return Split(
        clients=clients,
        train=tuple(train),
        test=None if kind == "global" else tuple(test),
        test_store=stores[kind],
        num_classes=stream.num_classes,
        train_labels=stream.train_labels,
    )


def _hold_out(ids: Ids, share: Fraction, seed: int, task: int, client: int) -> tuple[Ids, Ids]:
    from . import random as counter  # imports torch, which this module must not need at import time

    order = counter.permutation(len(ids), seed, "partition", task, "holdout", client)
    count = math.floor(share * len(ids))
    return np.sort(ids[order[count:]]), np.sort(ids[order[:count]])


def _same_mix(stream: Stream, stage: Stage, held: Sequence[Ids], seed: int) -> list[Ids]:
    from . import random as counter

    test_labels = stream.test_labels[stage.test_ids]
    by_class = {int(c): stage.test_ids[test_labels == c] for c in np.unique(test_labels)}
    total = np.bincount(stream.train_labels[stage.train_ids], minlength=stream.num_classes)
    out = []
    for client, ids in enumerate(held):
        mine = np.bincount(stream.train_labels[ids], minlength=stream.num_classes)
        rows = [np.empty(0, dtype=np.int64)]
        for label in np.flatnonzero(mine):
            pool = by_class.get(int(label), rows[0])
            count = -(-len(pool) * int(mine[label]) // int(total[label]))
            order = counter.permutation(len(pool), seed, "partition", stage.index, "same_mix", client, int(label))
            rows.append(pool[order[:count]])
        out.append(np.sort(np.concatenate(rows)))
    return out
