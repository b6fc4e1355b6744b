"""What the frozen encoder still knows, and how far its features drift."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunFailed
from ..metrics.matrix import FloatArray
from ..records.runs import Run
from .curves import band, over_tasks, percent_axis
from .methods import Method, describe, over_seeds, seen_accuracy, spread, told
from .style import COLUMN, MARKERS, PAGE, TEXT_SIZE, add_legend, line_look, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options

READERS = {"nearest_mean": "nearest class mean", "knn": "nearest neighbours", "linear": "linear layer"}
"""Probes that read the classes off the features, in the words of the legend."""

MOST_TASKS = 12

Probes = Mapping[str, Mapping[str, FloatArray]]


def probes_figure(methods: Sequence[Method], options: Options) -> Figure:
    """Accuracy on seen tasks of the model itself and of probes of its frozen encoder, a panel a method.

    What lies between the lines is in the features but not in what the head says.

    Raises:
        RunFailed: the runs have no such probe.
    """
    tables = {run: read_probes(run) for method in methods for run in method.runs.values()}
    shown = [name for name in READERS if all(name in table for table in tables.values())]
    if not shown:
        some = next(iter(tables))
        raise RunFailed(
            f"{some.folder} and the others have no probe in common that reads classes: "
            "evaluate.probes=[linear], knn and nearest_mean do"
        )
    labels = ["the model itself", *(f"encoder, {READERS[name]}" for name in shown)]
    across = min(len(methods), 3)
    down = -(-len(methods) // across)
    width = COLUMN if across == 1 else PAGE
    side = width / across
    heads = [wrap(name, 72 * (side - 0.6), TEXT_SIZE) for name in told(methods)] if len(methods) > 1 else [[]]
    height = down * (min(0.66 * side, 2.1) + 0.35) + 0.14 * max(map(len, heads)) * down
    with new_figure(width, height, describe(methods, options.title), labels) as figure:
        panels = figure.subplots(down, across, squeeze=False, sharey=True)
        handles: list[Any] = []
        for index, axes in enumerate(panels.ravel()):
            if index >= len(methods):
                axes.set_visible(False)
                continue
            method = methods[index]
            curves = [100 * over_seeds(method, seen_accuracy, "number of tasks")]
            curves += [100 * over_seeds(method, _values(tables, name, "accuracy"), "number of tasks") for name in shown]
            handles = lines(axes, curves, side)
            percent_axis(axes)
            axes.set_title("\n".join(heads[index]), loc="left")
            if index % across == 0:
                axes.set_ylabel("Accuracy on seen tasks (%)" if down == 1 else "Accuracy (%)")
        add_legend(figure, handles, labels)
    return figure


def drift_figure(methods: Sequence[Method], options: Options) -> Figure:
    """How far the features of old images have moved since they were learned, and how wrong stored prototypes are.

    Left, mean distance of the features of old tasks' test images to those when their task was learned: for one method a
    line for each task, for several the mean over the old tasks. Right, error of the class means that were stored when a
    class was learned, relative to the spread within a class: at 1 a stored mean is as far off as an image is.

    Raises:
        RunFailed: the runs have neither probe, or one task only.
    """
    tables = {run: read_probes(run) for method in methods for run in method.runs.values()}
    have = [name for name in ("drift", "prototypes") if all(name in table for table in tables.values())]
    if not have:
        some = next(iter(tables))
        raise RunFailed(
            f"{some.folder} and the others have no probe of drift: evaluate.probes=[drift,prototypes] has it"
        )
    if max(run.num_tasks for run in tables) == 1:
        raise RunFailed("drift needs two tasks; these runs have one")
    labels = told(methods)
    width = PAGE if len(have) == 2 else COLUMN
    alone = len(methods) == 1
    with new_figure(width, 2.4, describe(methods, options.title), [] if alone else labels) as figure:
        panels = figure.subplots(1, len(have), squeeze=False)[0]
        handles: list[Any] = []
        for axes, name in zip(panels, have, strict=True):
            value = "distance" if name == "drift" else "relative"
            curves = [over_seeds(method, _values(tables, name, value), "number of tasks") for method in methods]
            if alone and name == "drift":
                _drift_by_task(axes, methods[0], tables, 0.5 * width)
            else:
                handles = lines(axes, curves, 0.5 * width)
            drawn = [line.get_ydata() for line in axes.lines]
            highest = max((float(np.nanmax(y)) for y in drawn if not np.isnan(y).all()), default=0.0)
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.06 * highest) or 1.0)
            axes.set_ylabel("Distance since learned" if name == "drift" else "Error of old means / spread")
            axes.set_title("Features of old images" if name == "drift" else "Prototypes when learned", loc="left")
        if not alone:
            add_legend(figure, handles, labels)
    return figure


def read_probes(run: Run) -> Probes:
    """Values of ``probes.csv`` by probe and name, (T,) each, NaN where undefined.

    Raises:
        RunFailed: the run has no probes, or the file is damaged.
    """
    path: Path = run.folder / "probes.csv"
    if not path.is_file():
        raise RunFailed(f"{run.folder} has no probes: evaluate.probes=[linear,knn,drift,prototypes] records them")
    found: dict[str, dict[str, FloatArray]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as rows:
            for row in csv.DictReader(rows, strict=True):
                values = found.setdefault(row["probe"], {})
                values.setdefault(row["name"], np.full(run.num_tasks, np.nan))
                values[row["name"]][int(row["task"])] = float(row["value"]) if row["value"] else np.nan
    except (KeyError, ValueError, IndexError, TypeError, csv.Error) as error:
        raise RunFailed(f"{path} is damaged ({error})") from error
    return found


def lines(axes: Axes, curves: Sequence[FloatArray], width: float) -> list[Any]:
    """Lines with bands over tasks of curves (S, T); returns the lines."""
    handles: list[Any] = []
    longest = max(curve.shape[1] for curve in curves)
    for index, curve in enumerate(curves):
        after, mean = np.arange(1, curve.shape[1] + 1), curve.mean(axis=0)
        handles += axes.plot(after, mean, **line_look(index), ms=4 if longest <= 20 else 2, zorder=3)
        if len(curve) > 1:
            band(axes, after, mean, spread(curve), index)
    over_tasks(axes, longest, width)
    return handles


def _values(tables: Mapping[Run, Probes], probe: str, name: str) -> Callable[[Run], FloatArray]:
    """The values of a name over the tasks of a run; NaN where the probe has none of that name."""
    return lambda run: tables[run][probe].get(name, np.full(run.num_tasks, np.nan))


def _drift_by_task(axes: Axes, method: Method, tables: Mapping[Run, Probes], width: float) -> None:
    """A line for each learned task, or for ``MOST_TASKS`` of them, that starts at 0 where the task is learned."""
    from matplotlib import colormaps

    tasks = next(iter(method.runs.values())).num_tasks
    shown = sorted({round(x) for x in np.linspace(0, tasks - 2, min(MOST_TASKS, tasks - 1))})
    after = np.arange(1, tasks + 1)
    ends: dict[int, float] = {}
    highest = 0.0
    for number, task in enumerate(shown):
        mean = over_seeds(method, _values(tables, "drift", f"task_{task}"), "number of tasks").mean(axis=0)
        mean[task] = 0.0
        colour = colormaps["viridis"](task / max(1, tasks - 2) * 0.85)
        look: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "ms": 3} if tasks <= 20 else {}
        axes.plot(after[task:], mean[task:], color=colour, ls="-", lw=1.1, clip_on=False, **look)
        highest = max(highest, float(np.nanmax(mean)))
        if not np.isnan(mean[-1]):
            ends[task] = float(mean[-1])
    gap = 0.06 * highest
    for task, height in _apart(ends, gap).items():
        text: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
        axes.annotate(f"{task + 1}", (tasks, height), annotation_clip=False, **text)
    over_tasks(axes, tasks, width)
    which = "each old task" if len(shown) == tasks - 1 else "some old tasks"
    axes.set_xlabel(f"Tasks learned (a line for {which})")


def _apart(heights: Mapping[int, float], gap: float) -> dict[int, float]:
    """Heights for labels that are at least ``gap`` apart, in the same order.

    >>> _apart({1: 5.0, 2: 5.2, 3: 9.0}, 1.0)
    {1: 5.0, 2: 6.0, 3: 9.0}
    """
    found: dict[int, float] = {}
    last = -np.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = max(height, last + gap)
        found[name] = float(last)
    return found
