"""Natural partition: a column of the dataset says whose images they are."""

from __future__ import annotations

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.owners import rows_by_owner
from fedcl.partitioning import Partition
from fedcl.stream import Ids

from ._deal import even_sizes


class Natural(Partition):
    """``partition.column`` names a writer, drawer, patient or site: all images of one go to one client, in every task.

    With as many clients as values each is a client. With fewer clients the values are dealt in random order, and any
    two clients differ by at most one in how many they get.
    """

    name = "natural"
    aliases = ("by_column",)
    summary = "whose images they are by partition.column of the dataset (writer, drawer, site)"
    card = Card(
        title="LEAF: A Benchmark for Federated Settings",
        authors="Caldas et al.",
        venue="NeurIPS Workshops",
        year=2019,
        notes="LEAF makes each writer a client: set federation.clients to the number of values of the column that "
        "training images have. More clients than values is refused. partition.min_size counts a client's images of "
        "all tasks; where clients are fewer than values it redraws who gets which.",
    )
    once = True
    setting = "column"
    remedy = "lower partition.min_size or federation.clients"

    def column(self, config: settings.Partition) -> str:
        """``partition.column``, which must be given."""
        if not config.column:
            allowed = "must name a column of the dataset with partition.name=natural, for example drawer"
            raise UsageError("partition.column", config.column, allowed)
        return config.column

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """A client needs a value of its own."""
        values = len(np.unique(labels))
        if clients > values:
            allowed = f"must be at most {values}: the training images have {values} values of column {config.column}"
            raise UsageError("federation.clients", clients, allowed)

    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """The values in random order, cut in client order; the first clients get one value more."""
        values, place = np.unique(labels, return_inverse=True)
        order = counter.permutation(len(values), *stream, "natural", "values", attempt)
        holder = np.empty(len(values), dtype=np.int64)
        holder[order] = np.repeat(np.arange(clients), even_sizes(len(values), clients))
        return rows_by_owner(holder[place], clients)
