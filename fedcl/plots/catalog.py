"""The kinds of plots, without anything heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError


@dataclass(frozen=True)
class PlotKind:
    """One kind of plot.

    Attributes:
        name: as on the command line.
        summary: one line.
        shows: ``methods`` puts all runs into one picture, seeds of a method together; ``run`` draws one run.
        needs: the setting that records what it draws; empty where every run has it.
    """

    name: str
    summary: str
    shows: Literal["methods", "run"]
    needs: str = ""


KINDS: dict[str, PlotKind] = {
    kind.name: kind
    for kind in (
        PlotKind("accuracy", "accuracy on the tasks seen so far, with a band over seeds", "methods"),
        PlotKind("matrix", "heat map of the accuracy matrix, a panel a method, mean over seeds", "methods"),
        PlotKind("forgetting", "forgetting of each task and of each class", "methods"),
        PlotKind(
            "clients",
            "spread of the clients' accuracy on their own test images",
            "methods",
            "partition.test=same_mix or holdout(p)",
        ),
        PlotKind("split", "who holds how many images of which class in which task", "run"),
        PlotKind("bytes", "accuracy against bytes sent so far", "methods"),
        PlotKind("memory", "accuracy against the memory budget of a client", "methods", "runs with several budgets"),
        PlotKind("features", "map of test features after some tasks: PCA or t-SNE", "run", "evaluate.features=500"),
        PlotKind("drift", "drift of old features and prototypes", "methods", "evaluate.probes=[drift,prototypes]"),
        PlotKind(
            "probes",
            "what the encoder knows against what the head says",
            "methods",
            "evaluate.probes=[linear] or knn, nearest_mean",
        ),
        PlotKind("costs", "bytes up and down, and seconds by what they went into", "methods"),
    )
}


def kind_of(name: str) -> PlotKind:
    """The kind of a name.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    if name not in KINDS:
        raise UsageError("KIND", name, f"must be one of {', '.join(KINDS)}", KINDS)
    return KINDS[name]
