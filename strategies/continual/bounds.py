"""Bounds that break the rules on purpose: what training on everything seen so far would reach."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedcl.cards import Card
from fedcl.strategy import Strategy


class Cumulative(Strategy):
    """Federated averaging in which every client keeps all of its past images: the federated upper bound."""

    name = "cumulative"
    family = "bound"
    stackable = True
    repeats = True
    card = Card(
        title="A bound, no method",
        certainty="Certain.",
        client_state="all images of all tasks so far (in the simulation: their row numbers)",
        cost="The work of a round grows with the task.",
        notes="Breaks the rule of continual learning. A client's images of task t are those of its tasks 0 to "
        "t; an image that "
        "stands in several tasks is taken once.",
    )

    def arrange(self, split: list[list[Any]]) -> list[list[Any]]:
        clients = range(len(split[0]))
        return [[union(split[i][k] for i in range(t + 1)) for k in clients] for t in range(len(split))]


class Joint(Strategy):
    """One learner that holds the images of all clients and all tasks so far: the centralised upper bound."""

    name = "joint"
    family = "bound"
    stackable = True
    repeats = True
    centralised = True
    common_clock = "pools all clients into one learner with one clock"
    card = Card(
        title="A bound, no method",
        certainty="Certain.",
        client_state="all images",
        cost="No federation: bytes are undefined. The work of a round grows with task and clients.",
        notes="Breaks the rules of continual and of federated learning. Rounds and epochs are those of the "
        "settings, so a round "
        "is `federation.epochs` passes over all images of all tasks so far.",
    )

    def arrange(self, split: list[list[Any]]) -> list[list[Any]]:
        return [[union(ids for task in split[: t + 1] for ids in task)] for t in range(len(split))]


def union(parts: Any) -> Any:
    """The distinct rows of several (n_i,) int64 arrays, ascending."""
    return np.unique(np.concatenate(list(parts)))
