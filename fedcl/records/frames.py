"""Results as pandas frames; pandas is an optional extra and imported when a frame is asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .events import read_events
from .runfolder import EVENTS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def require_pandas() -> Any:
    """pandas.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import pandas
    except ImportError:
        allowed = "pandas is not installed; it comes with the extra: pip install 'fedcl-sim[notebook]'"
        raise UsageError("frame", "pandas", allowed) from None
    return pandas


def matrix_frame(matrix: Sequence[Sequence[float | None]]) -> pd.DataFrame:
    """(T, T) accuracies in [0, 1]: the index is the task learned last, the columns the task tested, both from 1."""
    pandas = require_pandas()
    rows = [[math.nan if value is None else value for value in row] for row in matrix]
    columns = range(1, 1 + max((len(row) for row in rows), default=0))
    frame: pd.DataFrame = pandas.DataFrame(rows, dtype="float64", index=range(1, 1 + len(rows)), columns=columns)
    return frame.rename_axis(index="after task", columns="task")


def rounds_frame(folder: Path) -> pd.DataFrame:
    """A row for each round of a run, indexed by (task, round), both from 1; a loss term is a column ``loss.TERM``."""
    pandas = require_pandas()
    rows = []
    for event in read_events(folder / EVENTS):
        if event["event"] == "round":
            losses = event.get("losses", {})
            place = {"task": event["task"] + 1, "round": event["round"] + 1}
            numbers = {n: v for n, v in event.items() if isinstance(v, int | float) and n not in ("attempt", "time")}
            terms = {f"loss.{name}": value for name, value in losses.items()}
            rows.append({**numbers, **place, "loss": sum(losses.values()) if losses else math.nan, **terms})
    frame: pd.DataFrame = pandas.DataFrame(rows)
    return frame.set_index(["task", "round"]) if rows else frame


def summary_frame(summaries: Sequence[tuple[Path, Mapping[str, Any]]]) -> pd.DataFrame:
    """A row for each run: the strategy stack as "a + b", numbers and texts of the summary, and its folder."""
    pandas = require_pandas()
    rows = []
    for folder, summary in summaries:
        row: dict[str, Any] = {"folder": str(folder)}
        for name, value in _plain(summary):
            row[name] = " + ".join(value) if name == "strategy" else math.nan if value is None else value
        rows.append(row)
    frame: pd.DataFrame = pandas.DataFrame(rows)
    return frame


def frames(paths: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """The summaries of all finished runs below some folders, a row each; see :func:`summary_frame`.

    Folders of runs that did not end are left out with a warning that says why.

    Args:
        paths: run folders, or folders in which run folders are looked for.

    Raises:
        UsageError: a path without any run, or pandas is not installed.
    """
    from .runs import find_runs

    require_pandas()
    given = [paths] if isinstance(paths, str | Path) else paths
    found = find_runs([Path(path) for path in given])
    for broken in found.broken:
        warnings.warn(f"{broken.folder} is left out: {broken.why}", stacklevel=2)
    return summary_frame([(run.folder, run.summary) for run in found.runs])


def figure_of(kind: str, folder: Path) -> Figure:
    """A plot of one finished run; see :func:`fedcl.plots.draw`."""
    from ..plots import draw
    from ..tell.notebook import show_figures
    from .runs import as_run

    show_figures()
    return draw(kind, [as_run(folder)])


def _plain(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a summary that fits into a cell; of lists only the strategy stack."""
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from _plain(value, f"{prefix}{name}.")
        elif not isinstance(value, list) or (not prefix and name == "strategy"):
            yield prefix + name, value
