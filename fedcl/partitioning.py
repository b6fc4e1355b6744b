"""Partitions: rules that split the rows of a task over the clients, and what clients are tested on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .cards import Card
from .errors import UsageError
from .owners import owners, rows_by_owner
from .settings import schema as settings
from .stream import Ids, Split, Stage, Store, Stream

if TYPE_CHECKING:
    from .streams.population import Pool


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

    once: ClassVar[bool] = False
    """Whether the rows of all tasks are split in one draw, so that what belongs together stays with one client in
    every task. ``partition.min_size`` then counts a client's images of all tasks."""

    def column(self, config: settings.Partition) -> str:
        """Column of the dataset whose values a rule with ``once`` sees as its labels; empty: the classes."""
        return ""

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """Raises UsageError where the rule's own settings cannot be met; the default accepts all."""
        return None

    @abstractmethod
    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """One draw of the rule: rows of ``labels`` for each client, in any order; rows may be left to nobody.

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
            K arrays of indices into ``range(N)``: disjoint, each ascending, together complete unless the rule
            says that it leaves rows out. A client may be empty.

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

    def check_client(self, pool: Pool, config: settings.Partition) -> None:
        """Raises UsageError where :meth:`draw_client` cannot draw from a task; the default accepts all."""
        return None

    def client_size(self, pool: Pool, config: settings.Partition, *stream: object) -> int:
        """How many rows the client that ``stream`` names holds, at most ``pool.size``; ``config.size`` by default."""
        return config.size

    def draw_client(self, pool: Pool, size: int, config: settings.Partition, *stream: object) -> Ids:
        """What one client holds of a task, drawn without the other clients: ``partition.size`` needs it.

        A rule that deals all rows out at once does not define it.

        Args:
            pool: the rows of the task.
            size: how many different places of ``range(pool.size)`` to return, in any order.
            stream: name of the client's own random stream.
        """
        raise NotImplementedError


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


def held_out_clients(config: settings.Partition, clients: int) -> int:
    """How many of ``clients`` never train: ``partition.held_out``, a number or a share below 1, rounded up.

    >>> held_out_clients(settings.Partition(held_out=0.25), 10)
    3

    Raises:
        UsageError: nobody would be left to train.
    """
    asked = config.held_out
    # the decimal text is taken exactly: 0.2 of 10 clients are 2, not ceil(2.0000000000000002)
    count = math.ceil(Fraction(str(asked)) * clients) if asked < 1 else int(asked)
    if count >= clients:
        raise UsageError("partition.held_out", asked, f"must leave one of federation.clients={clients} to train")
    return count


def partition_stream(
    stream: Stream,
    partition: Partition,
    config: settings.Partition,
    clients: int,
    seed: int,
    columns: Mapping[str, Ids] | None = None,
) -> Split:
    """Splits every task of a stream over the clients, each drawn anew by the same rule, or all at once where the rule
    says so (:attr:`Partition.once`).

    Args:
        clients: number of clients K, with those that ``partition.held_out`` takes out: they are drawn at random, and
            the others are numbered anew in their order.
        columns: (N,) int64 columns of the training store beside the labels, such as ``domain``, by name.

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
    if stream.repeats and parse_test_rule(config.test)[0] == "holdout":
        allowed = f"global or same_mix with scenario.name={stream.name}: a later task trains on the images again"
        raise UsageError("partition.test", config.test, allowed)
    parts = _parts(stream, partition, config, clients, seed, columns or {})
    held = [[stage.train_ids[part] for part in task] for stage, task in zip(stream.stages, parts, strict=True)]
    return split_of(stream, stream.stages, held, config, clients, seed)


def split_of(
    stream: Stream,
    stages: Sequence[Stage],
    rows: Sequence[Sequence[Ids]],
    config: settings.Partition,
    clients: int,
    seed: int,
) -> Split:
    """The split of rows that are dealt already: personal test sets are cut out, held-out clients taken out.

    Args:
        stages: the images that each task draws its ``same_mix`` test sets from.
        rows: ``rows[task][client]`` of the training store, ascending.
        clients: number of clients K, with those that ``partition.held_out`` takes out.
    """
    kind, share = parse_test_rule(config.test)
    train: list[tuple[Ids, ...]] = []
    test: list[tuple[Ids, ...]] = []
    for stage, task in zip(stages, rows, strict=True):
        held = list(task)
        if kind == "holdout":
            cut = [_hold_out(ids, share, seed, stage.index, k) for k, ids in enumerate(held)]
            held = [kept for kept, _ in cut]
            test.append(tuple(out for _, out in cut))
        elif kind == "same_mix":
            test.append(tuple(_same_mix(stream, stage, held, seed)))
        train.append(tuple(held))
    stores: dict[str, Store | None] = {"global": None, "same_mix": "test", "holdout": "train"}
    whole = Split(
        clients=clients,
        train=tuple(train),
        test=None if kind == "global" else tuple(test),
        test_store=stores[kind],
        num_classes=stream.num_classes,
        train_labels=stream.train_labels,
    )
    out = never_trained(config, clients, seed)
    if not out:
        return whole
    return replace(whole.only([k for k in range(clients) if k not in set(out)]), held_out=whole.only(out))


def never_trained(config: settings.Partition, clients: int, seed: int) -> list[int]:
    """The clients that ``partition.held_out`` takes out, by their numbers before, ascending."""
    from . import random as counter  # imports torch, which this module must not need at import time

    return counter.sample(clients, held_out_clients(config, clients), seed, "partition", "held out")


def _parts(
    stream: Stream,
    partition: Partition,
    config: settings.Partition,
    clients: int,
    seed: int,
    columns: Mapping[str, Ids],
) -> list[list[Ids]]:
    """For each task and client the places of its rows in the task's ``train_ids``, ascending."""
    owner = np.full(len(stream.train_labels), -1, dtype=np.int64)
    if not partition.once:
        dealt = np.zeros(len(owner), dtype=bool)
        for stage in stream.stages:  # rows of an earlier task stay with their client
            rows = stage.train_ids[~dealt[stage.train_ids]]
            dealt[rows] = True
            if len(rows):
                parts = partition.split(stream.train_labels[rows], clients, config, seed, "partition", stage.index)
                owner[rows] = owners(parts, len(rows))
        return [rows_by_owner(owner[stage.train_ids], clients) for stage in stream.stages]
    name = partition.column(config)
    if name and name not in columns:
        listed = ", ".join(columns) or "none"
        raise UsageError("partition.column", name, f"must be a column of the dataset; it has {listed}", columns)
    values = columns[name] if name else stream.train_labels
    rows = np.unique(np.concatenate([stage.train_ids for stage in stream.stages]))
    owner[rows] = owners(partition.split(values[rows], clients, config, seed, "partition"), len(rows))
    return [rows_by_owner(owner[stage.train_ids], clients) for stage in stream.stages]


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
