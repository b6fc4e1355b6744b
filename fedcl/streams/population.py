"""Populations too large to be dealt out: what a client holds is drawn when it is asked for.

A complete split deals every training image to exactly one client, and so is as large as the data and needs every
client at once. With ``partition.size`` a client's rows are instead a pure function of (seed, task, client): a
million clients cost nothing until they are sampled. Clients draw independently of one another, so two may hold the
same image and an image may belong to nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import ClassVar

import numpy as np

from .. import config as settings
from .. import random as counter
from .. import registry
from ..errors import UsageError
from ..partitioning import Partition, held_out_clients
from ..stream import Ids, Split, Stream

CACHED = 1024
"""Clients whose rows stay in memory: those of a round or two."""

MOST_HELD_OUT = 10_000
"""Clients that never train are drawn when a run starts, so they must be few."""

SHAPED_BY = ("size", "min_size", "alpha", "classes", "skew")
"""Keys of the partition section that decide what a client draws."""


@dataclass(frozen=True)
class Pool:
    """The training rows of one task, by class.

    Attributes:
        size: how many rows, N.
        classes: the label positions that occur, ascending.
        rows: for each of them its places in ``range(N)``, ascending.
    """

    size: int
    classes: tuple[int, ...]
    rows: tuple[Ids, ...]

    @classmethod
    def of(cls, labels: Ids) -> Pool:
        """The pool of (N,) int64 label positions."""
        present, sizes = np.unique(labels, return_counts=True)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        return cls(len(labels), tuple(present.tolist()), tuple(np.split(order, np.cumsum(sizes)[:-1])))

    @property
    def sizes(self) -> list[int]:
        """Rows of each class."""
        return [len(rows) for rows in self.rows]

    def take(self, counts: Sequence[int], *stream: object) -> Ids:
        """``counts[j]`` different random rows of class ``classes[j]``, in any order; ``stream`` names the draw."""
        found = [np.empty(0, dtype=np.int64)]
        for label, rows, count in zip(self.classes, self.rows, counts, strict=True):
            if count:
                found.append(rows[counter.sample(len(rows), count, *stream, "rows", label)])
        return np.concatenate(found)


class Drawn:
    """The clients' training rows of one task, each drawn when it is asked for: ``drawn[client]``.

    It has a length and an index, and cannot be iterated: a loop over the population is an error where it is
    written, not a run that never starts.

    Args:
        clients: how many there are.
        rows: client -> its rows of the training store, ascending.
        size: client -> how many they are, without drawing them.
    """

    __iter__: ClassVar[None] = None
    __reversed__: ClassVar[None] = None
    __contains__: ClassVar[None] = None

    def __init__(self, clients: int, rows: Callable[[int], Ids], size: Callable[[int], int]) -> None:
        self._clients, self._rows, self._size = clients, rows, size

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, client: int) -> Ids:
        return self._rows(self._number(client))

    def size(self, client: int) -> int:
        """How many rows a client holds."""
        return self._size(self._number(client))

    def _number(self, client: int) -> int:
        if not 0 <= client < self._clients:
            raise IndexError(f"client {client} of {self._clients}")
        return int(client)


def can_draw(partition: type[Partition]) -> bool:
    """Whether a rule can draw one client without the others."""
    return partition.draw_client is not Partition.draw_client


def draw_population(stream: Stream, partition: Partition, config: settings.Partition, clients: int, seed: int) -> Split:
    """The split in which each client draws its own rows of each task, ``partition.size`` of them.

    Takes time and memory of the data's size, whatever ``clients`` is. The clients that ``partition.held_out`` takes
    out are the last ones: all draw alike.

    Raises:
        UsageError: the rule needs all clients at once, or a task has too few rows.
    """
    if not can_draw(type(partition)):
        names = [n for n in registry.names("partitions") if can_draw(registry.load("partitions", n))]
        allowed = f"must be 0 with partition.name={partition.name}, which deals to all clients at once; the rules "
        allowed += f"that can draw a client by itself are {', '.join(names)}"
        raise UsageError("partition.size", config.size, allowed, names)
    newcomers = held_out_clients(config, clients)
    if newcomers > MOST_HELD_OUT:
        allowed = f"must be at most {MOST_HELD_OUT} clients with partition.size"
        raise UsageError("partition.held_out", config.held_out, allowed)
    if stream.repeats:
        allowed = f"must be 0 with scenario.name={stream.name}, whose tasks hold images of earlier ones"
        raise UsageError("partition.size", config.size, allowed)
    pools = [Pool.of(stream.train_labels[stage.train_ids]) for stage in stream.stages]
    for task, pool in enumerate(pools):
        if config.size > pool.size:
            allowed = f"at most {pool.size}: task {task + 1} has {pool.size} training images"
            raise UsageError("partition.size", config.size, allowed)
        partition.check(stream.train_labels[stream.stages[task].train_ids], clients, config)
        partition.check_client(pool, config)

    def size(task: int, client: int) -> int:
        return partition.client_size(pools[task], config, seed, "partition", task, "client", client)

    @lru_cache(CACHED)
    def rows(task: int, client: int) -> Ids:
        name = (seed, "partition", task, "client", client)
        part = partition.draw_client(pools[task], size(task, client), config, *name)
        return stream.stages[task].train_ids[np.sort(part)]

    shape = {key: value for key, value in asdict(config).items() if key in SHAPED_BY}
    rule = {"partition": partition.name, "clients": clients, "seed": seed, **shape}
    trained = clients - newcomers
    split = Split(
        clients=trained,
        train=tuple(Drawn(trained, partial(rows, task), partial(size, task)) for task in range(len(pools))),
        test=None,
        test_store=None,
        num_classes=stream.num_classes,
        train_labels=stream.train_labels,
        rule=json.dumps(rule, sort_keys=True),
    )
    if not newcomers:
        return split
    never = tuple(tuple(rows(task, client) for client in range(trained, clients)) for task in range(len(pools)))
    return replace(split, held_out=replace(split, clients=newcomers, train=never, rule=""))
