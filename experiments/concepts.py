"""Draws the picture of ``docs/concepts.md``: ``python -m fedcl.experiments.concepts [FILE]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcl.plots.style import COLOURS, GREY, INK, PAGE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

FILE = Path(__file__).resolve().parents[1] / "docs" / "images" / "concepts.png"
# Made up, to be read: images of each of the two classes of a task at three clients, and an accuracy matrix.
HOLDINGS = np.array([[[5, 1], [2, 4], [0, 5]], [[2, 5], [4, 0], [3, 2]], [[1, 2], [3, 3], [5, 1]]])
ACCURACY = np.array([[92, 0, 0], [61, 90, 0], [43, 66, 89]])


def concepts() -> Figure:
    """Three panels: who holds what and when, one round, what is measured."""
    with new_figure(PAGE, 2.6, "", []) as figure:
        stream, one_round, matrix = figure.subplots(1, 3, width_ratios=[1.15, 1.1, 1])
        _stream(stream)
        _round(one_round)
        _matrix(matrix)
    return figure


def _heading(axes: Axes, text: str, below: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", color="black")
    axes.set_axis_off()
    axes.text(0, -0.02, below, transform=axes.transAxes, va="top", color=INK)


def _stream(axes: Axes) -> None:
    """Tasks from left to right, clients from top to bottom, a bar for each class that a client holds."""
    _heading(axes, "1  stream and partition", "A task brings classes; each client\nholds a share of their images.")
    axes.set(xlim=(-0.9, 3.1), ylim=(3.35, -0.75))
    for task in range(3):
        axes.text(task + 0.5, -0.3, f"task {task + 1}", ha="center")
        for client in range(3):
            axes.add_patch(_box(task + 0.04, client + 0.04, 0.92, 0.92, "white"))
            for place, images in enumerate(HOLDINGS[client, task]):
                height = 0.14 * images
                left, colour = task + 0.2 + 0.34 * place, COLOURS[2 * task + place]
                axes.bar(left, -height, 0.26, bottom=client + 0.92, align="edge", color=colour)
    for client in range(3):
        axes.text(-0.08, client + 0.5, f"client {client + 1}", ha="right", va="center")
    axes.annotate("", (3.0, 3.2), (0.0, 3.2), arrowprops={"arrowstyle": "->", "color": INK})


def _round(axes: Axes) -> None:
    """The server above, clients below, an arrow each way."""
    _heading(axes, "2  a round", "Down: the model and broadcasts.\nUp: weights and declared arrays.")
    axes.set(xlim=(0, 3), ylim=(3.35, -0.75))
    axes.add_patch(_box(0.1, -0.45, 2.8, 1.0, GREY))
    axes.text(1.5, -0.12, "server", ha="center", va="center", fontweight="bold")
    axes.text(1.5, 0.28, "encoder + projector + head", ha="center", va="center")
    for client in range(3):
        left = client + 0.06
        axes.add_patch(_box(left, 2.25, 0.88, 0.95, "white"))
        axes.text(left + 0.44, 2.55, f"client {client + 1}", ha="center", va="center", fontweight="bold")
        axes.text(left + 0.44, 2.9, "trains", ha="center", va="center")
        for x, ends in ((left + 0.34, (0.6, 2.2)), (left + 0.54, (2.2, 0.6))):
            axes.annotate("", (x, ends[1]), (x, ends[0]), arrowprops={"arrowstyle": "->", "color": INK})
    for x, text in ((0.32, "down"), (0.68, "up")):
        axes.text(x, 1.4, text, ha="right" if text == "down" else "left", va="center", color=INK)


def _matrix(axes: Axes) -> None:
    """Accuracy on task j after task i, and what was forgotten of the first."""
    _heading(axes, "3  what is measured", "Accuracy after and on each task.\nTask 1 forgot 92 - 43 = 49 points.")
    axes.set(xlim=(-0.9, 3.1), ylim=(3.35, -0.75))
    for i in range(3):
        axes.text(-0.08, i + 0.5, f"after {i + 1}", ha="right", va="center")
        axes.text(i + 0.5, -0.3, f"on {i + 1}", ha="center")
        for j in range(3):
            share = ACCURACY[i, j] / 100
            colour = tuple(1 - share * (1 - channel) for channel in (0.34, 0.71, 0.91))
            axes.add_patch(_box(j + 0.04, i + 0.04, 0.92, 0.92, colour))
            axes.text(j + 0.5, i + 0.5, f"{ACCURACY[i, j]} %", ha="center", va="center")


def _box(x: float, y: float, width: float, height: float, colour: str | tuple[float, ...]) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.7)


if __name__ == "__main__":
    save(concepts(), Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
