"""Feature shift: every client sees one domain."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.partitioning import Partition
from fedcl.stream import Ids

from ._deal import class_sizes, deal_by_class, even_sizes


class FeatureShift(Partition):
    """One domain a client, the same in every task; the clients of a domain share its rows evenly and at random.

    The clients, in random order, go round the domains, so any two domains differ by at most one in their number of
    clients. ``partition.column`` names another column than ``domain``.
    """

    name = "feature_shift"
    aliases = ("domain",)
    summary = "one domain a client: partition.column (default: domain) of the dataset"
    card = Card(
        title="FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
        authors="Li et al.",
        venue="ICLR",
        year=2021,
        notes="Needs a dataset with domains (PACS, or a column of your own) and at least one client a domain. In a "
        "stream whose tasks are the domains, only the clients of a task's domain have images in it. "
        "partition.min_size counts a client's images of all tasks.",
    )
    once = True
    attempts = 1

    def column(self, config: settings.Partition) -> str:
        """``partition.column``, by default the domains."""
        return config.column or "domain"

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """Every domain needs a client."""
        domains = len(np.unique(labels))
        if clients < domains:
            allowed = f"must be at least {domains}, one a value of column {self.column(config)}, with partition.name="
            raise UsageError("federation.clients", clients, allowed + self.name)

    def draw(self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object) -> list[Ids]:
        """Client ``order[i]`` holds domain ``i mod D``; its first clients get one row more."""
        domains, sizes = class_sizes(labels)
        order = counter.permutation(clients, *stream, "feature_shift", "clients")
        counts = np.zeros((clients, len(domains)), dtype=np.int64)
        for column, size in enumerate(sizes):
            mine = order[column :: len(domains)]
            counts[mine, column] = even_sizes(size, len(mine))
        return deal_by_class(labels, domains, counts, *stream, "feature_shift")
