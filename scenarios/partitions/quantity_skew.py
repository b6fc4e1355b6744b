"""Quantity skew: clients differ in how much they hold, not in what."""

from __future__ import annotations

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.stream import Ids, Partition

from ._deal import check_concentration, cut_sizes, deal, dirichlet_logs, weights


class QuantitySkew(Partition):
    """Client sizes follow Dir(skew 1_K), labels are IID (Li et al. 2022, "quantity skew")."""

    name = "quantity_skew"
    summary = "client sizes by Dir(skew), labels IID"
    card = Card(
        title="Federated Learning on Non-IID Data Silos: An Experimental Study",
        authors="Li et al.",
        venue="ICDE",
        year=2022,
    )
    setting = "skew"
    remedy = "raise partition.skew, or lower partition.min_size or federation.clients"

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """``skew`` is finite and above zero."""
        check_concentration("partition.skew", config.skew)

    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """Client k's part ends at ``floor(N (w_0 + ... + w_k) / sum w)`` of one random order of the rows."""
        source = counter.Stream(*stream, "quantity_skew", "shares", attempt)
        logs = dirichlet_logs(source, config.skew, clients)
        sizes = cut_sizes(weights(logs, [True] * clients), len(labels))
        if min(sizes) < config.min_size:
            return None
        return deal(counter.permutation(len(labels), *stream, "quantity_skew", "rows"), sizes)
