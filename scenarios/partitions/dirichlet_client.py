"""Label skew at equal sizes: each client draws its own class mix."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.partitioning import Partition
from fedcl.stream import Ids
from fedcl.streams.population import Pool

from ._deal import check_concentration, class_sizes, deal_by_class, dirichlet_logs, even_sizes, fill_quota


class DirichletClient(Partition):
    """Every client draws q_k ~ Dir(alpha 1_C) and fills a quota of N / K rows from it (FedBR).

    Rows are drawn one at a time without replacement: a class is drawn by q_k, renormalised over the classes
    that still have rows. Clients fill their quotas in order, so late clients are left with what remains. The
    first ``N mod K`` clients get one more.
    """

    name = "dirichlet_client"
    summary = "each client draws its class mix from Dir(alpha) and fills an equal quota"
    card = Card(
        title="FedBR: Improving Federated Learning on Heterogeneous Data via Local Learning Bias Reduction",
        authors="Guo et al.",
        venue="ICML",
        year=2023,
        notes="With partition.size=n every client fills a quota of n from all images of the task, independently of "
        "the others: they may share images.",
    )
    attempts = 1

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """``alpha`` is finite and above zero."""
        check_concentration("partition.alpha", config.alpha)

    def draw(self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object) -> list[Ids]:
        """Clients fill their quotas in order, each from what the earlier ones left."""
        classes, left = class_sizes(labels)
        counts = np.zeros((clients, len(classes)), dtype=np.int64)
        source = counter.Stream(*stream, "dirichlet_client", "shares")
        for client, quota in enumerate(even_sizes(len(labels), clients)):
            logs = dirichlet_logs(source, config.alpha, len(classes))
            counts[client] = fill_quota(source, logs, quota, left)
        return deal_by_class(labels, classes, counts, *stream, "dirichlet_client")

    def draw_client(self, pool: Pool, size: int, config: settings.Partition, *stream: object) -> Ids:
        """The same rule for one client that finds every row of the task still there."""
        source = counter.Stream(*stream, "dirichlet_client", "shares")
        logs = dirichlet_logs(source, config.alpha, len(pool.classes))
        return pool.take(fill_quota(source, logs, size, pool.sizes), *stream, "dirichlet_client")
