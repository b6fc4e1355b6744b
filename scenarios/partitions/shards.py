"""Pathological label skew: a few shards of label-sorted rows each."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.partitioning import Partition
from fedcl.stream import Ids

from ._deal import deal, even_sizes


class Shards(Partition):
    """Rows sorted by label, cut into ``shards * K`` shards, ``shards`` of them to each client (FedAvg).

    Rows of equal label stand in random order. Shard sizes differ by at most one, the first are the larger
    ones; with fewer rows than shards the last shards are empty.
    """

    name = "shards"
    summary = "label-sorted rows cut into shards, partition.shards of them to each client"
    card = Card(
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        authors="McMahan et al.",
        venue="AISTATS",
        year=2017,
        notes="partition.min_size redraws which shards a client gets.",
    )
    setting = "shards"
    remedy = "lower partition.min_size, partition.shards or federation.clients"

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """At least one shard a client."""
        if config.shards < 1:
            raise UsageError("partition.shards", config.shards, "at least 1")

    def draw(self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object) -> list[Ids]:
        """Client k gets the shards at places ``k s`` to ``k s + s - 1`` of a random order of the shards."""
        mixed = counter.permutation(len(labels), *stream, "shards", "rows")
        ordered = mixed[np.argsort(labels[mixed], kind="stable")]
        shards = deal(ordered, even_sizes(len(labels), clients * config.shards))
        order = counter.permutation(len(shards), *stream, "shards", "order", attempt).tolist()
        return [
            np.concatenate([shards[place] for place in order[start : start + config.shards]])
            for start in range(0, len(order), config.shards)
        ]
