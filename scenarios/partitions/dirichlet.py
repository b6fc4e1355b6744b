"""Label skew: each class is cut over the clients by a Dirichlet draw."""

from __future__ import annotations

import math

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.partitioning import Partition
from fedcl.stream import Ids
from fedcl.streams.population import Pool

from ._deal import check_concentration, class_sizes, cut_sizes, deal_by_class, dirichlet_logs, fill_quota, weights


class Dirichlet(Partition):
    """For each class c, q ~ Dir(alpha 1_K); the rows of c are cut by q (Hsu et al. 2019; Li et al. 2021).

    ``partition.balance=true`` is the rule of MOON and TARGET: classes are cut in ascending order, and a
    client that already holds at least N / K rows gets none of the next class; the other shares are
    renormalised. All classes are redrawn until the smallest client holds ``partition.min_size`` rows.
    """

    name = "dirichlet"
    summary = "each class cut by Dir(alpha) over the clients; balance=true is the TARGET/MOON rule"
    card = Card(
        title="Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        authors="Hsu et al.",
        venue="arXiv:1909.06335",
        year=2019,
        notes="TARGET uses min_size=1, most others 10; alpha=0 there means IID: use partition.name=iid. "
        "The balancing rule is that of MOON (Li et al., CVPR 2021) and TARGET (Zhang et al., ICCV 2023). "
        "With partition.size=n every client draws its label mix, Dir(alpha 1_C) weighed by the sizes of the C classes, "
        "and n images of it, independently of the others: they may share images.",
    )
    setting = "alpha"
    remedy = "raise partition.alpha, set partition.balance=true, or lower partition.min_size or federation.clients"

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """``alpha`` is finite and above zero."""
        check_concentration("partition.alpha", config.alpha)

    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """Client k's part of class c ends at ``floor(n_c (w_0 + ... + w_k) / sum w)``, w = q in units of
        2^-40 max q.
        """
        classes, sizes = class_sizes(labels)
        counts = np.zeros((clients, len(classes)), dtype=np.int64)
        source = counter.Stream(*stream, "dirichlet", "shares", attempt)
        held = [0] * clients
        for column, size in enumerate(sizes):
            logs = dirichlet_logs(source, config.alpha, clients)
            # held_k < N / K, in integers
            allowed = [not config.balance or have * clients < len(labels) for have in held]
            parts = cut_sizes(weights(logs, allowed), size)
            counts[:, column] = parts
            held = [have + part for have, part in zip(held, parts, strict=True)]
        if min(held) < config.min_size:
            return None
        return deal_by_class(labels, classes, counts, *stream, "dirichlet")

    def draw_client(self, pool: Pool, size: int, config: settings.Partition, *stream: object) -> Ids:
        """Label mix ``n_c g_c``, g_c ~ Gamma(alpha): what a client of a large population holds of each class.

        A client's share of class c is ``g_c / (g_c + those of the K - 1 others)``, whose denominator tends to
        ``K alpha`` for every class.
        """
        source = counter.Stream(*stream, "dirichlet", "shares")
        gammas = dirichlet_logs(source, config.alpha, len(pool.classes))
        logs = [gamma + math.log(rows) for gamma, rows in zip(gammas, pool.sizes, strict=True)]
        return pool.take(fill_quota(source, logs, size, pool.sizes), *stream, "dirichlet")
