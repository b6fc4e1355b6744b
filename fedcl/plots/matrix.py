"""Heat map of the accuracy matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.matrix import FloatArray
from .methods import Method, describe, over_seeds, told
from .style import GREY, INK, PAGE, TEXT_SIZE, luminance, new_figure, task_ticks, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options

GAP, BAR = 0.45, 0.75  # inches: tick labels of a panel, the colour bar with its label


def matrix_figure(methods: Sequence[Method], options: Options) -> Figure:
    """Mean over seeds of R[i, j], a panel a method: rows after training on task i, columns tested on task j."""
    tables = [100 * over_seeds(method, lambda run: run.matrix, "number of tasks").mean(axis=0) for method in methods]
    return heat_figure(tables, told(methods) if len(methods) > 1 else [""], describe(methods, options.title, "mean"))


def heat_figure(tables: Sequence[FloatArray], names: Sequence[str], title: str) -> Figure:
    """Panels of matrices (T, T) in percent.

    Each cell holds its percentage where that can be read; undefined cells are hatched; a stepped line parts the tasks
    already learned from those still to come.
    """
    tasks = max(len(table) for table in tables)
    # Up to three panels beside one another; their numbers go before the panels get too small to compare.
    side = min(max(0.27 * tasks, 1.4 if len(tables) > 1 else 1.8), (PAGE - BAR) / min(len(tables), 3) - GAP)
    across = max(1, min(len(tables), int((PAGE - BAR) / (side + GAP))))
    down = -(-len(tables) // across)
    across = -(-len(tables) // down)
    heads = [wrap(name, 72 * side, TEXT_SIZE) for name in names]
    lines = [max(len(head) for head in heads[row * across : (row + 1) * across]) for row in range(down)]
    width = max(across * (side + GAP) + BAR, 2.6)
    height = down * (side + 0.3) + sum(lines) * TEXT_SIZE * 1.3 / 72 + 0.25
    with new_figure(width, height, title, []) as figure:
        panels = figure.subplots(down, across, squeeze=False)
        image: Any = None
        for index, axes in enumerate(panels.ravel()):
            if index >= len(tables):
                axes.set_visible(False)
                continue
            image = _draw(axes, tables[index], side)
            axes.set_title("\n".join(heads[index]), loc="left")
        bar = figure.colorbar(image, ax=panels, fraction=0.3 / width, aspect=down * side / 0.12)
        bar.set_label("Test accuracy (%)")
        undefined = any(np.isnan(table).any() for table in tables)
        tested = "Tested on task" + (" (hatched: undefined)" if undefined else "")
        if len(tables) == 1:
            panels[0, 0].set_xlabel(tested)
            panels[0, 0].set_ylabel("After training on task")
        else:
            figure.supxlabel(tested, fontsize=TEXT_SIZE)
            figure.supylabel("After training on task", fontsize=TEXT_SIZE)
    return figure


def _draw(axes: Axes, percent: FloatArray, side: float) -> Any:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    tasks = len(percent)
    colours = colormaps["cividis"]
    image = axes.imshow(np.ma.masked_invalid(percent), cmap=colours, vmin=0, vmax=100, aspect="equal")
    # Three digits are about two font sizes wide and have to fit into one cell.
    size = min(TEXT_SIZE, 72 * side / tasks / 2.4)
    for (i, j), value in np.ndenumerate(percent):
        if np.isnan(value):
            corner = (j - 0.5, i - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=GREY, edgecolor="#7F7F7F", hatch="////", lw=0))
        elif size >= 4.5:
            ink = "black" if luminance(colours(value / 100)) > 0.18 else "white"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=size, color=ink, in_layout=False)
    edge = np.repeat(np.arange(tasks + 1) - 0.5, 2)
    for colour, width in (("white", 2.2), (INK, 0.9)):
        axes.plot(edge[2:-1], edge[1:-2], color=colour, lw=width)
    axes.grid(visible=False)
    axes.set_xlim(-0.5, tasks - 0.5)
    axes.set_ylim(tasks - 0.5, -0.5)
    axes.set_xticks(*task_ticks(tasks, start=0, width=side))
    axes.set_yticks(*task_ticks(tasks, start=0, width=side))
    return image
