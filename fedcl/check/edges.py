"""Checks at the edge of what works: clients and streams that a method meets in a real partition sooner or later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .lab import EDGE, Lab
from .results import NotApplicable


@dataclass(frozen=True)
class Edge:
    """One case.

    Attributes:
        name: of the check.
        says: what the client or stream is like.
        images: classes and training images of each.
        changes: settings.
    """

    name: str
    says: str
    images: tuple[int, int]
    changes: Mapping[str, Any]


EDGES = (
    Edge(
        "empty client", "nine clients, some without an image", (4, 2),
        {"partition.name": "dirichlet", "partition.alpha": 0.3, "federation.clients": 9},
    ),
    Edge("one class", "a stream of one task with one class", (1, 9), {"scenario.tasks": 1}),
    Edge("one class a task", "two tasks of one class each", (2, 9), {}),
    Edge("one sample", "clients with one image of each task", (6, 1), {"partition.name": "iid"}),
    Edge("batch of 1", "one image a step", (4, 3), {"federation.batch_size": 1, "optimiser.lr": 0.01}),
    Edge(
        "class never seen", "each client has one class of each task", (6, 4),
        {"partition.name": "classes_per_client", "partition.classes": 1},
    ),
    Edge(
        "rare client", "clients that are sampled once, and some never", (6, 12),
        {"federation.participation": 0.34, "federation.rounds": 2},
    ),
)  # fmt: skip


def edge_check(edge: Edge) -> Callable[[Lab], str]:
    """The check of a case: a run that ends, or a refusal in words before it starts."""

    def check(lab: Lab) -> str:
        try:
            summary = lab.run({**EDGE, **edge.changes}, edge.images).summary
        except UsageError as error:
            raise NotApplicable(f"refused before the run: {error}") from error
        assert summary["status"] == "done"
        return edge.says

    return check
