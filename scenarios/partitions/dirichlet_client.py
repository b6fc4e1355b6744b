"""Label skew at equal sizes: each client draws its own class mix."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.stream import Ids, Partition

from ._deal import check_concentration, class_sizes, deal_by_class, dirichlet_logs, even_sizes, weights


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
    )
    attempts = 1

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """``alpha`` is finite and above zero."""
        check_concentration("partition.alpha", config.alpha)

    def draw(self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object) -> list[Ids]:
        """A word r picks the first class whose cumulative integer weight exceeds ``r sum(w) / 2^64``."""
        classes, left = class_sizes(labels)
        counts = np.zeros((clients, len(classes)), dtype=np.int64)
        source = counter.Stream(*stream, "dirichlet_client", "shares")
        for client, quota in enumerate(even_sizes(len(labels), clients)):
            logs = dirichlet_logs(source, config.alpha, len(classes))
            ends: list[int] = []
            mine = [0] * len(classes)
            for _ in range(quota):
                if not ends:
                    ends = list(accumulate(weights(logs, [rows > 0 for rows in left])))
                pick = bisect_right(ends, source.below(ends[-1]))
                mine[pick] += 1
                left[pick] -= 1
                if left[pick] == 0:
                    ends = []
            counts[client] = mine
        return deal_by_class(labels, classes, counts, *stream, "dirichlet_client")
