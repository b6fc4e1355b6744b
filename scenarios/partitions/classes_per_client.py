"""Label skew by class subsets: each client holds a fixed number of the task's classes."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.partitioning import Partition
from fedcl.stream import Ids
from fedcl.streams.population import Pool

from ._deal import class_sizes, deal_by_class, even_sizes


class ClassesPerClient(Partition):
    """``partition.classes`` = n of the task's C classes for each client (GLFC: 6 of 10; LN: n classes a
    client).

    Classes are dealt like cards: from shuffled decks of all C classes, one hand of n different classes after
    the other, so every class is held (K n >= C is asked for) and any two classes differ by at most one in
    their number of holders. The rows of a class are split evenly among its holders, whose random order says
    who gets one more.
    """

    name = "classes_per_client"
    summary = "partition.classes of the task's classes for each client, split evenly among the holders"
    card = Card(
        title="Federated Class-Incremental Learning",
        authors="Dong et al.",
        venue="CVPR",
        year=2022,
        notes="A balanced deal; GLFC's release draws each client's classes independently, which can leave a "
        "class without a holder; so does partition.size=n here: every client draws partition.classes of the task's "
        "classes and n images, evenly among them, and clients may share images.",
    )
    setting = "classes"
    remedy = "lower partition.min_size or federation.clients, or raise partition.classes"

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """A client cannot hold more classes than there are, and every class needs a holder."""
        present = len(np.unique(labels))
        if config.classes < 1:
            raise UsageError("partition.classes", config.classes, "at least 1")
        if present and config.classes > present:
            raise UsageError("partition.classes", config.classes, f"at most {present}: a task has {present} classes")
        if clients * config.classes < present:
            raise UsageError(
                "partition.classes",
                config.classes,
                f"at least {-(-present // clients)}: federation.clients={clients} times partition.classes "
                f"must reach the {present} classes of a task, or some would belong to no client",
            )

    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """Deals classes, then rows."""
        classes, sizes = class_sizes(labels)
        source = counter.Stream(*stream, "classes_per_client", "classes", attempt)
        holders = _deal_hands(source, len(classes), clients, config.classes) if classes else []
        counts = np.zeros((clients, len(classes)), dtype=np.int64)
        for column, size in enumerate(sizes):
            order = source.shuffle(holders[column])
            counts[order, column] = even_sizes(size, len(order))
        if counts.sum(axis=1).min() < config.min_size:
            return None
        return deal_by_class(labels, classes, counts, *stream, "classes_per_client")

    def check_client(self, pool: Pool, config: settings.Partition) -> None:
        """The smallest class must have the rows that a client takes of one class."""
        each, least = -(-config.size // config.classes), min(pool.sizes)
        if each > least:
            allowed = f"at most {least * config.classes}: the smallest class of a task has {least} training images"
            raise UsageError("partition.size", config.size, f"{allowed}, partition.classes={config.classes}")

    def draw_client(self, pool: Pool, size: int, config: settings.Partition, *stream: object) -> Ids:
        """A hand of classes, every one equally likely; a random order of it says which give one row more."""
        source = counter.Stream(*stream, "classes_per_client", "classes")
        hand = source.shuffle(list(range(len(pool.classes))))[: config.classes]
        counts = [0] * len(pool.classes)
        for column, rows in zip(hand, even_sizes(size, len(hand)), strict=True):
            counts[column] = rows
        return pool.take(counts, *stream, "classes_per_client")


def _deal_hands(source: counter.Stream, classes: int, clients: int, size: int) -> list[list[int]]:
    """For each class the clients that hold it; a card that a hand already has waits for the next client."""
    holders: list[list[int]] = [[] for _ in range(classes)]
    deck: list[int] = []
    for client in range(clients):
        hand: list[int] = []
        waiting: list[int] = []
        while len(hand) < size:
            if not deck:
                deck = source.shuffle(list(range(classes)))
            card = deck.pop(0)
            (waiting if card in hand else hand).append(card)
        deck = waiting + deck
        for card in hand:
            holders[card].append(client)
    return holders
