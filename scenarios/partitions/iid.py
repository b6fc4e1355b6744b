"""Every client draws from the same distribution."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.partitioning import Partition
from fedcl.stream import Ids
from fedcl.streams.population import Pool

from ._deal import deal, even_sizes


class IID(Partition):
    """All rows in random order, cut into sizes that differ by at most one (McMahan et al. 2017, "IID")."""

    name = "iid"
    summary = "random rows, equal sizes"
    card = Card(
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        authors="McMahan et al.",
        venue="AISTATS",
        year=2017,
        notes="With partition.size=n every client draws n different images of the task, independently of the others: "
        "they may share images.",
    )
    attempts = 1

    def draw(self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object) -> list[Ids]:
        """One random order of the rows, dealt in client order; the first ``N mod K`` clients get one more."""
        order = counter.permutation(len(labels), *stream, "iid", "rows")
        return deal(np.asarray(order), even_sizes(len(labels), clients))

    def draw_client(self, pool: Pool, size: int, config: settings.Partition, *stream: object) -> Ids:
        """``size`` rows, every set of them equally likely."""
        return np.array(counter.sample(pool.size, size, *stream, "iid", "rows"), dtype=np.int64)
