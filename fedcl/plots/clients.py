"""How far apart the clients are on test images of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..measure.breakdown import read_clients
from ..metrics.matrix import FloatArray
from ..records.runs import Run
from .curves import over_tasks, percent_axis
from .methods import Method, describe, over_seeds, told
from .style import COLOURS, INK, MARKERS, PAGE, add_legend, line_look, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options

MOST_BANDS = 3
MOST_LINES = 30


def clients_figure(methods: Sequence[Method], options: Options) -> Figure:
    """Left, over tasks: the mean client, and where four fifths of the clients lie. Right: each client at the end.

    A client's accuracy is that on its own test images of the tasks so far. Clients of all seeds are pooled, each counts
    alike, and one without test images is left out. The box goes from the first to the third quartile, its line is the
    median, its whiskers go to the lowest and the highest client.

    Raises:
        RunFailed: the runs had no personal test sets.
    """
    tables = [_pooled(method) for method in methods]
    labels = [_label(name, table) for name, table in zip(told(methods), tables, strict=True)]
    with new_figure(PAGE, 2.5, describe(methods, options.title, "clients"), labels) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        handles = _over_tasks(left, tables)
        _at_the_end(right, tables)
        add_legend(figure, handles, labels)
    return figure


def _pooled(method: Method) -> FloatArray:
    """(T, S K) accuracy in percent of the clients of all seeds."""

    def seen(run: Run) -> FloatArray:
        return 100 * read_clients(run.folder, run.num_tasks, int(run.summary["num_clients"])).seen()

    seeds = over_seeds(method, seen, "tasks or clients")
    return np.concatenate(list(seeds), axis=1)


def _label(name: str, table: FloatArray) -> str:
    without = int(np.isnan(table).all(axis=0).sum())
    return f"{name} ({without} of {table.shape[1]} clients without test images)" if without else name


def _over_tasks(axes: Axes, tables: Sequence[FloatArray]) -> list[Any]:
    handles: list[Any] = []
    longest = max(len(table) for table in tables)
    for index, table in enumerate(tables):
        after, colour = np.arange(1, len(table) + 1), COLOURS[index % len(COLOURS)]
        mean = _by_row(table, np.mean)
        if len(tables) == 1 and table.shape[1] <= MOST_LINES:
            axes.plot(after, table, color=INK, lw=0.5, alpha=0.5)
        if len(tables) <= MOST_BANDS:
            low, high = (_by_row(table, lambda row, q=q: np.percentile(row, q)) for q in (10, 90))
            axes.fill_between(after, low, high, color=colour, alpha=0.18, lw=0)
        size = 4 if longest <= 20 else 2.5
        handles += axes.plot(after, mean, **line_look(index), ms=size, clip_on=False, zorder=3)
    over_tasks(axes, longest, 0.5 * PAGE)
    percent_axis(axes)
    banded = ", band: 10th to 90th percentile" if len(tables) <= MOST_BANDS else ""
    axes.set_title(f"Mean over clients{banded}", loc="left")
    axes.set_ylabel("Accuracy on own images (%)")
    return handles


def _by_row(table: FloatArray, reduce: Any) -> FloatArray:
    """A statistic of the defined entries of each row; NaN for a row without any."""
    rows = [row[~np.isnan(row)] for row in table]
    return np.array([reduce(row) if len(row) else np.nan for row in rows])


def _at_the_end(axes: Axes, tables: Sequence[FloatArray]) -> None:
    for index, table in enumerate(tables):
        values = np.sort(table[-1][~np.isnan(table[-1])])
        colour = COLOURS[index % len(COLOURS)]
        # Multiples of the golden ratio spread neighbours in height without a random draw.
        aside = (np.arange(len(values)) * 0.6180339887 % 1.0 - 0.5) * 0.5
        size = 12 if len(values) <= 60 else 5
        axes.scatter(
            index + 1 + aside, values, s=size, color=colour, marker=MARKERS[index % len(MARKERS)], alpha=0.55, lw=0,
            clip_on=False,
        )  # fmt: skip
        if len(values):
            axes.boxplot(
                [values], positions=[index + 1], widths=0.62, whis=(0, 100), showfliers=False, zorder=4,
                boxprops={"color": INK, "lw": 0.9}, whiskerprops={"color": INK, "lw": 0.9},
                capprops={"color": INK, "lw": 0.9}, medianprops={"color": "black", "lw": 1.6},
            )  # fmt: skip
    margin = 0.6 if len(tables) > 1 else 1.2
    axes.set_xlim(1 - margin, len(tables) + margin)
    axes.set_xticks([])
    axes.grid(visible=False, axis="x")
    axes.set_title("Each client after the last task", loc="left")
    axes.set_xlabel("Methods, as in the legend" if len(tables) > 1 else "")
