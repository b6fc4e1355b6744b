"""Label skew and quantity skew at once: clients differ in what they hold and in how much."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.stream import Ids
from fedcl.streams.population import Pool

from ._deal import check_concentration, class_sizes, cut_sizes, deal_by_class, dirichlet_logs, fill_quota, weights
from .quantity_skew import QuantitySkew


class LabelQuantitySkew(QuantitySkew):
    """Client sizes follow Dir(skew 1_K); each client fills its size from a label mix of its own, Dir(alpha 1_C).

    Rows are drawn one at a time without replacement, as in ``dirichlet_client``: clients fill their sizes in order, so
    late clients are left with what remains.
    """

    name = "label_quantity_skew"
    summary = "client sizes by Dir(skew), each filled from the client's own label mix Dir(alpha)"
    card = Card(
        title="Federated Learning on Non-IID Data Silos: An Experimental Study",
        authors="Li et al.",
        venue="ICDE",
        year=2022,
        notes="The paper asks for mixed skews; this form, the sizes of quantity_skew with the label mixes of "
        "dirichlet_client, keeps the two knobs apart: partition.skew for how much, partition.alpha for what. With "
        "partition.size=n a client's size is drawn as in quantity_skew and filled from all images of the task; clients "
        "may share images.",
    )

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """``skew`` and ``alpha`` are finite and above zero."""
        super().check(labels, clients, config)
        check_concentration("partition.alpha", config.alpha)

    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """Sizes are cut as in ``quantity_skew``; clients then fill them in order from what the earlier ones left."""
        source = counter.Stream(*stream, "label_quantity_skew", "sizes", attempt)
        sizes = cut_sizes(weights(dirichlet_logs(source, config.skew, clients), [True] * clients), len(labels))
        if min(sizes) < config.min_size:
            return None
        classes, left = class_sizes(labels)
        counts = np.zeros((clients, len(classes)), dtype=np.int64)
        source = counter.Stream(*stream, "label_quantity_skew", "mixes")
        for client, quota in enumerate(sizes):
            logs = dirichlet_logs(source, config.alpha, len(classes))
            counts[client] = fill_quota(source, logs, quota, left)
        return deal_by_class(labels, classes, counts, *stream, "label_quantity_skew")

    def draw_client(self, pool: Pool, size: int, config: settings.Partition, *stream: object) -> Ids:
        """The client's own label mix over all rows of the task."""
        source = counter.Stream(*stream, "label_quantity_skew", "mixes")
        logs = dirichlet_logs(source, config.alpha, len(pool.classes))
        return pool.take(fill_quota(source, logs, size, pool.sizes), *stream, "label_quantity_skew")
