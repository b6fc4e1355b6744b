"""Streams of tasks and their split over clients: plain NumPy rows, no images.

A **store** is the contiguous tensor of a dataset's training (or test) images. A :class:`Stream` says which
rows of it belong to which task; a :class:`Split` says which of a task's training rows belong to which
client. Labels are **positions**: class ``class_order[p]`` of the dataset has label ``p``, and logit ``p``,
everywhere in fedcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from .cards import Card
from .settings import schema as settings

if TYPE_CHECKING:
    from .data.store import Dataset
    from .streams.clocks import Clocks
    from .streams.population import Drawn

Ids = npt.NDArray[np.int64]
"""Rows of a store, or labels."""

Store = Literal["train", "test"]


def no_rows() -> Ids:
    """(0,) int64."""
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class DatasetLabels:
    """All that a scenario needs to know of a dataset.

    Attributes:
        train_labels: (N,) int64 original class ids of the training store.
        test_labels: (M,) int64 original class ids of the test store.
        num_classes: how many classes the dataset declares.
        names: (num_classes,) class names.
        domains: names of the domains; empty where the dataset has none.
        columns: further per-sample integers as (train, test) arrays, ``domain`` among them where there are some.
    """

    train_labels: Ids
    test_labels: Ids
    num_classes: int
    names: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    columns: Mapping[str, tuple[Ids, Ids]] = field(default_factory=dict[str, "tuple[Ids, Ids]"])

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetLabels:
        """The labels of a dataset."""
        columns = dict(dataset.columns)
        if dataset.train_domains is not None and dataset.test_domains is not None:
            columns["domain"] = (dataset.train_domains, dataset.test_domains)
        train, test = dataset.train.labels, dataset.test.labels
        return cls(train, test, dataset.num_classes, dataset.class_names, dataset.domain_names, columns)


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
        arrival: (N,) int64, when the rows of the training store come within their task; None: in any order.
        task_known: whether the task of an image is known at test, so that it chooses among the classes of its own task.
        unlabelled: rows of the training store whose labels no client ever sees, whatever the section ``labels`` says.
        unnamed: (test rows, validation rows) of classes that tasks show without any label, so that no task exposes
            them: what novelty and discovery are measured on.
    """

    name: str
    class_order: tuple[int, ...]
    stages: tuple[Stage, ...]
    num_classes: int
    train_labels: Ids
    test_labels: Ids
    arrival: Ids | None = None
    task_known: bool = False
    unlabelled: Ids = field(default_factory=no_rows)
    unnamed: tuple[Ids, Ids] = field(default_factory=lambda: (no_rows(), no_rows()))

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.stages)

    def known(self, task: int) -> tuple[int, ...]:
        """Label positions exposed in tasks 0 to ``task``, ascending."""
        return tuple(sorted({label for stage in self.stages[: task + 1] for label in stage.classes}))

    @cached_property
    def repeats(self) -> bool:
        """Whether a training row stands in more than one task."""
        rows = np.concatenate([stage.train_ids for stage in self.stages])
        return len(np.unique(rows)) < len(rows)

    @property
    def heads(self) -> list[int]:
        """(C,) the task that first exposes each label position, -1 where none does, if tasks are known; else []."""
        if not self.task_known:
            return []
        owner = {label: stage.index for stage in self.stages for label in stage.classes}
        return [owner.get(label, -1) for label in range(self.num_classes)]


def untested_note(stream: Stream) -> list[str]:
    """One line that names the tasks without test images: they expose no class that no earlier task showed."""
    empty = [str(stage.index + 1) for stage in stream.stages if not len(stage.test_ids)]
    if not empty:
        return []
    which = f"task {empty[0]} exposes" if len(empty) == 1 else f"tasks {', '.join(empty)} expose"
    return [
        f"{which} no new class, so that nothing is tested there: averages over tasks are null (average_accuracy, "
        "forgetting, ...); average_accuracy_weighted, forgetting_per_class and anytime_accuracy stay defined"
    ]


class Scenario(ABC):
    """Turns a dataset's labels into a stream of tasks. Subclasses are found by entry point or
    ``--plugin``.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    card: ClassVar[Card] = Card("")
    probes: ClassVar[tuple[str, ...]] = ()
    """What this scenario is about: these probes are measured whatever ``evaluate.probes`` says."""

    def dataset(self, config: settings.Scenario, seed: int) -> Dataset | None:
        """The scenario's own images, or None (the default) to use those of the ``data`` section.

        Called once, before :meth:`build`, which then gets this dataset's labels.
        """
        return None

    def images(self, dataset: Dataset, data: settings.Data, config: settings.Scenario, seed: int) -> Dataset:
        """The dataset as this scenario shows it: turned images, changed training labels; by default as it is.

        Called before :meth:`build`, with the images of the ``data`` section or those of :meth:`dataset`, and at
        every node, which builds no stream: the answer must depend on the arguments alone.

        Raises:
            UsageError: a section does not fit the dataset.
        """
        return dataset

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


@dataclass(frozen=True)
class Split:
    """Which rows each client holds in each task.

    Attributes:
        clients: number of clients K.
        train: ``train[task][client]`` labelled rows of the training store, ascending. Of a drawn population
            (:mod:`fedcl.streams.population`) a task's clients can be indexed, not iterated.
        test: ``test[task][client]`` rows of the personal test sets, ascending, or None without any.
        test_store: the store that the rows of ``test`` are of; None where ``test`` is None.
        num_classes: number of label positions C.
        train_labels: (N,) int64 label positions of the training store.
        held_out: the clients that never train (``partition.held_out``), as a complete split of their own.
        rule: of a drawn population, all that decides what its clients draw; empty for a complete split.
        clocks: where each client stands at each stage of the server, where they are not all there and in step; then
            "task" above is a stage of the server.
        unlabelled: as ``train``, the rows whose labels are hidden (:mod:`fedcl.streams.labels`); None where none are.
        hidden: the rows of the training store that are among ``unlabelled`` anywhere, ascending.
        self_supervised: whether the stack of strategies learns from images without labels.
        public: for each task the rows that only the server holds (:mod:`fedcl.streams.public`); None without.
    """

    clients: int
    train: tuple[tuple[Ids, ...] | Drawn, ...]
    test: tuple[tuple[Ids, ...], ...] | None
    test_store: Store | None
    num_classes: int
    train_labels: Ids
    rule: str = ""
    held_out: Split | None = None
    clocks: Clocks | None = None
    unlabelled: tuple[tuple[Ids, ...] | Drawn, ...] | None = None
    hidden: Ids = field(default_factory=no_rows)
    self_supervised: bool = False
    public: tuple[Ids, ...] | None = None

    @property
    def own_clocks(self) -> Clocks | None:
        """``clocks`` where clients have tasks of their own; None where all are in step, whoever is absent."""
        return None if self.clocks is None or self.clocks.in_step else self.clocks

    def present(self, stage: int) -> Sequence[int]:
        """The clients that are there at a stage of the server, ascending."""
        return range(self.clients) if self.clocks is None else self.clocks.present(stage)

    @property
    def rows(self) -> tuple[tuple[Ids, ...], ...]:
        """``train`` of a complete split.

        Raises:
            TypeError: the population is drawn; take some of its clients with :meth:`only`.
        """
        whole = tuple(task for task in self.train if isinstance(task, tuple))
        if len(whole) < len(self.train):
            raise TypeError(f"the {self.clients} clients of a drawn population are not enumerated")
        return whole

    @property
    def empty(self) -> tuple[tuple[int, ...], ...]:
        """For each task of a complete split the clients that hold no training row in it, labelled or not."""
        return tuple(
            tuple(c for c, ids in enumerate(task) if len(ids) == 0 and not self.unlabelled_size(index, c))
            for index, task in enumerate(self.rows)
        )

    def size(self, task: int, client: int) -> int:
        """Labelled training rows of a client in a task; a drawn client's rows are not drawn for it."""
        return _length(self.train[task], client)

    def unlabelled_size(self, task: int, client: int) -> int:
        """Training rows of a client in a task whose labels are hidden."""
        return 0 if self.unlabelled is None else _length(self.unlabelled[task], client)

    def only(self, clients: Sequence[int]) -> Split:
        """The split of some clients alone: client ``i`` of it is ``clients[i]``; complete, as it holds their rows."""

        def held(tasks: tuple[tuple[Ids, ...] | Drawn, ...]) -> tuple[tuple[Ids, ...], ...]:
            return tuple(tuple(task[client] for client in clients) for task in tasks)

        test = None if self.test is None else held(self.test)
        without = None if self.unlabelled is None else held(self.unlabelled)
        clocks = None if self.clocks is None else self.clocks.only(clients)
        return replace(
            self, clients=len(clients), train=held(self.train), test=test, rule="", held_out=None, unlabelled=without,
            clocks=clocks,
        )  # fmt: skip

    def some(self, count: int) -> list[int]:
        """Up to ``count`` clients, always the same ones, ascending: to look at a drawn population."""
        from . import random as counter  # imports torch, which this module must not need at import time

        return counter.sample(self.clients, min(count, self.clients), "some clients")

    def counts(self) -> Ids:
        """(T, K, C) int64: labelled training rows of a complete split by task, client and label position."""
        return self._counted(self.rows)

    def unlabelled_counts(self) -> Ids:
        """As :meth:`counts`, of the rows whose labels are hidden, by their true label."""
        return self._counted(() if self.unlabelled is None else replace(self, train=self.unlabelled).rows)

    def held_counts(self) -> Ids:
        """As :meth:`counts`, of all training rows, labelled or not."""
        return self.counts() + self.unlabelled_counts()

    def _counted(self, rows: Sequence[Sequence[Ids]]) -> Ids:
        out = np.zeros((len(self.train), self.clients, self.num_classes), dtype=np.int64)
        for task, clients in enumerate(rows):
            for client, ids in enumerate(clients):
                out[task, client] = np.bincount(self.train_labels[ids], minlength=self.num_classes)
        return out


def _length(clients: tuple[Ids, ...] | Drawn, client: int) -> int:
    return len(clients[client]) if isinstance(clients, tuple) else clients.size(client)
