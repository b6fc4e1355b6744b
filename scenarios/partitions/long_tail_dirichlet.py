"""Global long tail and local label skew: an exponential class profile, then Dirichlet."""

from __future__ import annotations

import math

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.partitioning import Partition
from fedcl.stream import Ids

from .dirichlet import Dirichlet


class LongTailDirichlet(Partition):
    """Class of rank r among C keeps ``floor(n imbalance^(-r / (C - 1)))`` rows, n those of the smallest class; the kept
    rows are then split as by ``dirichlet``.

    Ranks are over all classes of the stream: drawn by the seed (``partition.tail=shuffled``), or the order of exposure
    (``ordered``), so that later tasks are rarer. Rows that are not kept belong to nobody.
    """

    name = "long_tail_dirichlet"
    aliases = ("long_tail",)
    summary = "exponential long tail over the classes (partition.imbalance), then Dir(alpha) over the clients"
    card = Card(
        title="Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with Federated "
        "Features",
        authors="Shang et al.",
        venue="IJCAI",
        year=2022,
        notes="An imbalance of 100 is what papers write as IF=100 or IF=0.01. Test images stay balanced. The whole "
        "stream is split at once: partition.min_size and the rule of partition.balance count images of all tasks.",
    )
    once = True
    setting = Dirichlet.setting
    remedy = Dirichlet.remedy

    def check(self, labels: Ids, clients: int, config: settings.Partition) -> None:
        """The rarest class keeps an image."""
        Dirichlet().check(labels, clients, config)
        least = int(np.unique(labels, return_counts=True)[1].min(initial=len(labels)))
        if not 1 <= config.imbalance <= max(least, 1):
            allowed = f"must be from 1 to {least}: the smallest class has {least} training images"
            raise UsageError("partition.imbalance", config.imbalance, allowed)

    def draw(
        self, labels: Ids, clients: int, config: settings.Partition, attempt: int, *stream: object
    ) -> list[Ids] | None:
        """Cuts the tail, the same for every attempt, and deals what is kept."""
        kept = tail_rows(labels, config, *stream)
        parts = Dirichlet().draw(labels[kept], clients, config, attempt, *stream)
        return None if parts is None else [kept[part] for part in parts]


def tail_sizes(classes: int, largest: int, imbalance: float) -> list[int]:
    """Rows of each rank: ``floor(largest imbalance^(-r / (C - 1)))``.

    >>> tail_sizes(3, 500, 100)
    [500, 50, 5]
    """
    # A power that should be whole may come out a hair below it.
    return [math.floor(largest * imbalance ** (-rank / max(classes - 1, 1)) + 1e-6) for rank in range(classes)]


def tail_rows(labels: Ids, config: settings.Partition, *stream: object) -> Ids:
    """The rows that stay, ascending: of each class a random choice."""
    classes, sizes = np.unique(labels, return_counts=True)
    keep = np.zeros(len(labels), dtype=bool)
    if not len(classes):
        return np.flatnonzero(keep)
    order = np.arange(len(classes))
    if config.tail == "shuffled":
        order = counter.permutation(len(classes), *stream, "long_tail", "ranks")
    for place, size in zip(order, tail_sizes(len(classes), int(sizes.min()), config.imbalance), strict=True):
        rows = np.flatnonzero(labels == classes[place])
        keep[rows[counter.permutation(len(rows), *stream, "long_tail", "rows", int(classes[place]))[:size]]] = True
    return np.flatnonzero(keep)
