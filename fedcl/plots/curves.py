"""Accuracy over tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.matrix import FloatArray
from .methods import Method, describe, over_seeds, seen_accuracy, spread, told
from .style import COLOURS, COLUMN, add_legend, line_look, new_figure, task_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options


def accuracy_figure(methods: Sequence[Method], options: Options) -> Figure:
    """Accuracy on the tasks seen so far after each task, one line a method, a band of one s.d. over seeds."""
    curves = [100 * over_seeds(method, seen_accuracy, "number of tasks") for method in methods]
    return curve_figure(with_gaps(told(methods), curves), curves, describe(methods, options.title), COLUMN)


def curve_figure(labels: Sequence[str], curves: Sequence[FloatArray], title: str, width: float) -> Figure:
    """The figure of curves (S, T) in percent."""
    with new_figure(width, 0.66 * width, title, labels) as figure:
        axes = figure.subplots()
        add_legend(figure, draw_curves(axes, curves, width), labels)
    return figure


def with_gaps(names: Iterable[str], curves: Sequence[FloatArray]) -> list[str]:
    """Legend entries that say where a curve is undefined."""
    labels = []
    for name, curve in zip(names, curves, strict=True):
        gaps = (np.flatnonzero(np.isnan(curve).any(axis=0)) + 1).tolist()
        if len(gaps) > 2 and gaps[-1] - gaps[0] == len(gaps) - 1:
            labels.append(f"{name} (undefined after {gaps[0]}–{gaps[-1]} tasks)")
        elif gaps:
            labels.append(f"{name} (undefined after {', '.join(map(str, gaps))} tasks)")
        else:
            labels.append(name)
    return labels


def draw_curves(axes: Axes, curves: Sequence[FloatArray], width: float) -> list[Any]:
    """Lines and bands of curves (S, T) in percent over tasks; returns the lines.

    Args:
        width: of the axes, in inches.
    """
    handles: list[Any] = []
    longest = max(curve.shape[1] for curve in curves)
    for index, curve in enumerate(curves):
        after, mean = np.arange(1, curve.shape[1] + 1), curve.mean(axis=0)
        size = 4 if longest <= 20 else 2.5
        handles += axes.plot(after, mean, **line_look(index), ms=size, clip_on=False, zorder=3)
        if len(curve) > 1:
            band(axes, after, mean, spread(curve), index)
    over_tasks(axes, longest, width)
    percent_axis(axes)
    axes.set_ylabel("Accuracy on seen tasks (%)")
    return handles


def band(axes: Axes, places: Any, mean: FloatArray, half: FloatArray, index: int) -> None:
    """A band of ``mean`` ± ``half`` in the colour of line ``index``."""
    low, high = mean - half, mean + half
    axes.fill_between(places, low, high, color=COLOURS[index % len(COLOURS)], alpha=0.18, lw=0)


def over_tasks(axes: Axes, tasks: int, width: float) -> None:
    """The x axis of ``tasks`` tasks."""
    axes.set_xlim(0.5, tasks + 0.5)
    axes.set_xticks(*task_ticks(tasks, start=1, width=0.8 * width))
    axes.set_xlabel("Tasks learned")


def percent_axis(axes: Axes) -> None:
    """A y axis of all accuracies."""
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
