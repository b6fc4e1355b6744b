"""Quantity skew: clients differ in how much they hold, not in what."""

from __future__ import annotations

import math

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.partitioning import Partition
from fedcl.stream import Ids
from fedcl.streams.population import Pool

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
        notes="With partition.size=n a client's size is n g / skew, g ~ Gamma(skew), of mean n; a size below "
        "partition.min_size or above the task's images is redrawn. Clients draw independently: they may share images.",
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

    def check_client(self, pool: Pool, config: settings.Partition) -> None:
        """Sizes within the bounds must be likely enough to be drawn; one client stands for all."""
        self.client_size(pool, config, "probe")

    def client_size(self, pool: Pool, config: settings.Partition, *stream: object) -> int:
        """What a client of a large population holds under Dir(skew 1_K), whose shares are Gamma(skew) / (K skew)."""
        source = counter.Stream(*stream, "quantity_skew", "size")
        for _ in range(self.attempts):
            log_share = source.log_gamma_draw(config.skew) - math.log(config.skew)
            size = round(config.size * math.exp(min(log_share, 600.0)))
            if config.min_size <= size <= pool.size:
                return size
        raise UsageError(
            "partition.min_size",
            config.min_size,
            f"no client size from it to {pool.size} in {self.attempts} draws of partition.skew={config.skew} and "
            f"partition.size={config.size}; raise partition.skew",
        )

    def draw_client(self, pool: Pool, size: int, config: settings.Partition, *stream: object) -> Ids:
        """``size`` rows, every set of them equally likely."""
        return np.array(counter.sample(pool.size, size, *stream, "quantity_skew", "rows"), dtype=np.int64)
