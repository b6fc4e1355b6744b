"""Forgetting of each task and of each class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunFailed
from ..measure.breakdown import CLASSES_CSV, read_classes
from ..metrics import matrix as mx
from ..metrics.matrix import FloatArray
from ..records.runs import Run
from .methods import Method, describe, over_seeds, spread, told
from .style import (
    COLOURS,
    COLUMN,
    GREY,
    INK,
    MARKERS,
    PAGE,
    add_legend,
    new_figure,
    shortened,
    task_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options

MEANING = "Forgetting (points)"
MOST_STEMS = 60


def forgetting_figure(methods: Sequence[Method], options: Options) -> Figure:
    """What each task lost from its best to the end, and below it each class, in percentage points.

    A stem with a marker is the mean over seeds, its whisker one standard deviation; below 0 it improved. A class counts
    on the test images of the tasks so far. Runs of older versions did not record classes: then tasks alone are drawn.

    Raises:
        RunFailed: there is one task only, or some of the runs recorded classes and others did not.
    """
    tasks = [100 * over_seeds(m, lambda run: mx.per_task_forgetting(run.matrix), "number of tasks") for m in methods]
    if not max(table.shape[1] for table in tasks):
        raise RunFailed("forgetting needs two tasks; these runs have one")
    names, classes = _classes(methods)
    most = max(table.shape[1] for table in (*tasks, *classes))
    width = COLUMN if most * (1 + 0.5 * len(methods)) <= 18 else PAGE
    labels = told(methods)
    # Stems of many methods side by side are a thicket: then a class is a cell of a strip.
    strips = bool(classes) and len(methods) > 1 and len(methods) * most > MOST_STEMS
    heights = [1.75, *([0.35 + 0.2 * len(methods) if strips else 1.75] if classes else [])]
    size = (width, sum(heights) + 0.4)
    with new_figure(*size, describe(methods, options.title), labels) as figure:
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        handles = _stems(panels[0], tasks)
        last = max(table.shape[1] for table in tasks)
        panels[0].set_xticks(*task_ticks(last, start=1, width=0.8 * width))
        panels[0].set_xlabel("Task (the last one cannot be forgotten yet)")
        panels[0].set_ylabel(MEANING)
        if strips:
            _strips(panels[1], classes, labels)
        elif classes:
            _stems(panels[1], classes)
            panels[1].set_ylabel(MEANING)
        if classes:
            _name_classes(panels[1], names, classes, width)
        add_legend(figure, handles, labels)
    return figure


def class_forgetting(accuracy: FloatArray) -> FloatArray:
    """``max_{i<T-1} A[i, c] - A[T-1, c]`` of each class, (C,); NaN for a class that was tested once or never.

    Args:
        accuracy: (T, C) of each class after each task, NaN where undefined.

    >>> class_forgetting(np.array([[0.75, np.nan], [0.5, np.nan], [0.25, 0.5]])).tolist()
    [0.5, nan]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a class without an earlier test: NaN is meant
        lost: FloatArray = np.nanmax(accuracy[:-1], axis=0) - accuracy[-1]
    return lost


def bars_figure(points: FloatArray, title: str) -> Figure:
    """Forgetting (T-1,) of the tasks of one run in percentage points, as bars with their numbers."""
    tasks = len(points) + 1
    width = COLUMN if tasks <= 14 else PAGE
    with new_figure(width, 2.3, title, []) as figure:
        axes = figure.subplots()
        axes.set_xlabel("Task (the last one cannot be forgotten yet)")
        axes.set_ylabel(MEANING)
        if tasks == 1:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.text(0.5, 0.5, "Undefined: forgetting needs two tasks", ha="center", transform=axes.transAxes)
            return figure
        place, defined = np.arange(1, tasks), ~np.isnan(points)
        for chosen, colour in ((defined & (points >= 0), COLOURS[1]), (defined & (points < 0), COLOURS[0])):
            if chosen.any():
                axes.bar(place[chosen], points[chosen], width=0.75, color=colour)
        for x, value in zip(place.tolist(), points.tolist(), strict=True):
            if tasks <= 40 or np.isnan(value):
                _number(axes, x, value, 7.0 if tasks <= 20 else 5.0)
        axes.axhline(0, color="black", lw=0.8)
        if defined.any():
            mean = float(points[defined].mean())
            label = f"{'mean' if defined.all() else 'mean of the defined tasks'} {mean:+.1f}"
            axes.axhline(mean, color=INK, lw=1, ls="--", zorder=0.9, label=label)
            figure.legend(loc="outside lower center")
        axes.set_xlim(0.4, tasks - 0.4)
        axes.margins(y=0.15)
        axes.set_xticks(*task_ticks(tasks - 1, start=1, width=0.8 * width))
        axes.grid(visible=False, axis="x")
    return figure


def _number(axes: Axes, x: float, value: float, size: float) -> None:
    below = value < 0
    axes.annotate(
        "n/a" if np.isnan(value) else f"{value:+.0f}",
        (x, 0 if np.isnan(value) else value),
        xytext=(0, -2 if below else 2),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        fontsize=size,
    )


def _classes(methods: Sequence[Method]) -> tuple[list[str], list[FloatArray]]:
    """Names of the classes, and each method's forgetting (S, C) in points; nothing where no run recorded classes."""
    runs = [run for method in methods for run in method.runs.values()]
    if not any((run.folder / CLASSES_CSV).is_file() for run in runs):
        return [], []
    found = {run: read_classes(run.folder, run.num_tasks) for run in runs}

    def of(run: Run) -> Any:
        return class_forgetting(found[run].accuracy)

    names = {table.names for table in found.values()}
    # Each seed may have a class order of its own: then the k-th class is no class in particular.
    shown = list(names.pop()) if len(names) == 1 else []
    return shown, [100 * over_seeds(method, of, "classes") for method in methods]


def _stems(axes: Axes, tables: Sequence[FloatArray]) -> list[Any]:
    """Stems of tables (S, n), side by side; returns a handle a table."""
    from matplotlib.lines import Line2D

    longest = max(table.shape[1] for table in tables)
    step = 0.72 / len(tables)
    size = 4.0 if longest * len(tables) <= 40 else 2.5
    handles = []
    for index, table in enumerate(tables):
        place = np.arange(1, table.shape[1] + 1) + (index - (len(tables) - 1) / 2) * step
        mean, half = table.mean(axis=0), spread(table)
        colour = COLOURS[index % len(COLOURS)]
        held = ~np.isnan(mean)
        axes.vlines(place[held], 0, mean[held], color=colour, lw=0.7 * size, alpha=0.35)
        if len(table) > 1:
            axes.errorbar(place, mean, yerr=half, fmt="none", ecolor=INK, elinewidth=0.7)
        look: dict[str, Any] = {
            "ls": "",
            "marker": MARKERS[index % len(MARKERS)],
            "color": colour,
            "mew": 0.4,
            "mec": "white",
        }
        axes.plot(place[held], mean[held], **look, ms=size, clip_on=False, zorder=3)
        handles.append(Line2D([], [], **look, ms=5))
    defined = np.zeros((len(tables), longest), dtype=bool)
    for index, table in enumerate(tables):
        defined[index, : table.shape[1]] = ~np.isnan(table.mean(axis=0))
    for index, column in zip(*np.nonzero(~defined), strict=True):
        nobody = not defined[:, column].any()
        if index == 0 or not nobody:  # one mark in the middle where no method has a value
            x = column + 1 + (0 if nobody else (index - (len(tables) - 1) / 2) * step)
            axes.annotate(
                "n/a", (x, 0), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=5, rotation=90
            )
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(0.4, longest + 0.6)
    axes.margins(y=0.1)
    axes.grid(visible=False, axis="x")
    return handles


def _strips(axes: Axes, tables: Sequence[FloatArray], labels: Sequence[str]) -> None:
    """A row of cells a table (S, n): its mean; white is nothing forgotten, a grey cell is undefined."""
    longest = max(table.shape[1] for table in tables)
    cells = np.full((len(tables), longest), np.nan)
    for row, table in enumerate(tables):
        cells[row, : table.shape[1]] = table.mean(axis=0)
    edges = (np.arange(longest + 1) + 0.5, np.arange(len(tables) + 1) - 0.5)
    axes.set_facecolor(GREY)
    image = axes.pcolormesh(*edges, np.ma.masked_invalid(cells), cmap="PuOr_r", vmin=-100, vmax=100)
    axes.set_ylim(len(tables) - 0.5, -0.5)
    axes.set_yticks(range(len(tables)), [shortened(label, 24) for label in labels], fontsize=7)
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01).set_label("points", fontsize=7)


def _name_classes(axes: Axes, names: Sequence[str], tables: Sequence[FloatArray], width: float) -> None:
    count = max(table.shape[1] for table in tables)
    if names and count <= 8 * width:
        texts = [shortened(name, 14) for name in names]
        upright = max(map(len, texts)) * count * 0.075 > 0.8 * width
        axes.set_xticks(range(1, count + 1), texts, rotation=90 if upright else 0)
        axes.set_xlabel("Class, in the order of exposure")
        return
    axes.set_xticks(*task_ticks(count, start=1, width=0.8 * width))
    orders = "" if names else "; each seed has an order of its own"
    axes.set_xlabel(f"Class, by its place in the order of exposure{orders}")
