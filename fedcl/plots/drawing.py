"""One door to all plots: from finished runs to a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from ..errors import UsageError
from ..records.runs import Run
from .catalog import kind_of
from .methods import Method, methods_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODULES = {
    "accuracy": "curves", "matrix": "matrix", "forgetting": "forgetting", "clients": "clients", "split": "split",
    "bytes": "budgets", "memory": "budgets", "features": "features", "drift": "probes", "probes": "probes",
    "costs": "costs",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What may be chosen of a plot.

    Attributes:
        title: None for one that says data, stream and seeds; "" for none.
        by: settings that tell methods apart, as in ``fedcl compare --by``; empty: all that belong to a method.
        method: how ``features`` comes to two dimensions.
        key: the setting that ``memory`` has on its axis; "" for the budget in bytes that the stack has.
    """

    title: str | None = None
    by: tuple[str, ...] = ()
    method: Literal["pca", "tsne"] = "pca"
    key: str = ""


def draw(kind: str, runs: Sequence[Run], options: Options | None = None) -> Figure:
    """One figure of some finished runs; it is written nowhere.

    Args:
        kind: one of :data:`fedcl.plots.KINDS`.
        runs: from :func:`fedcl.records.runs.find_runs`; exactly one for kinds that show a run.
        options: None for the defaults.

    Raises:
        UsageError: no such kind, no run, or several where one is drawn, or options that do not fit.
        RunFailed: a run did not record what this plot shows; the message names the setting that does.
    """
    chosen = options or Options()
    found = kind_of(kind)
    if not runs:
        raise UsageError("DIR", "", "there is no finished run to draw")
    module = import_module(f".{MODULES[kind]}", __package__)
    if found.shows == "methods":
        methods: list[Method] = methods_of(runs, chosen.by)
        figure: Figure = getattr(module, f"{kind}_figure")(methods, chosen)
        return figure
    if len(runs) > 1:
        raise UsageError("DIR", ", ".join(str(run.folder) for run in runs), f"{kind} draws one run")
    if chosen.by:
        raise UsageError("--by", ",".join(chosen.by), f"{kind} draws one run, so there is nothing to tell apart")
    figure = getattr(module, f"{kind}_figure")(runs[0], chosen)
    return figure
