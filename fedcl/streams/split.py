"""Looking at a split: the class x client x task table, its warnings and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..stream import Ids, Split, Stage, Stream
from .split_cells import aligned, cells, label, own_tasks
from .split_notes import class_name, some_of
from .split_notes import split_warnings as split_warnings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_COLUMNS = 20
"""Clients shown in the terminal; the JSON object holds all."""

SOME = 20
"""Clients that stand for a drawn population in table, picture and JSON object."""

MOST_DISCS = 30
"""Clients, and classes a task, up to which the picture draws discs."""


EMPTY_SHADE = "0.9"
ABSENT: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.6", "hatch": "////", "zorder": 0.5, "linewidth": 0}


def split_summary(split: Split, stream: Stream, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """The split as one JSON-able object.

    Args:
        class_names: by original class id; default: the ids.

    Returns:
        ``tasks``: for each task its ``classes`` (position, original id, name, images by client and how many of these
        are ``labelled``), client ``sizes`` and ``labelled`` sizes, ``public`` images of the server (or null),
        ``test_sizes`` of personal test sets (or null), ``validation`` and ``test`` images,
        ``empty`` clients that are there, ``own`` task index of each client (null: absent; null for all where nobody
        is absent and all are in step); ``clients``, ``num_classes``, ``test_store`` and ``warnings``. Of a drawn
        population ``shown`` lists the clients that all lists by client are about; it is null for a complete split.
        ``held_out`` has, for each task, the images of each client that never trains; null without such clients.
    """
    population, (split, shown) = split, looked_at(split)
    counts, labelled = split.held_counts(), split.counts()
    tasks = []
    for stage in stream.stages:
        by_class = counts[stage.index]
        tasks.append(
            {
                "task": stage.index,
                "classes": [
                    {
                        "position": position,
                        "class": stream.class_order[position],
                        "name": class_name(stream, position, class_names),
                        "clients": by_class[:, position].tolist(),
                        "labelled": labelled[stage.index][:, position].tolist(),
                    }
                    for position in _shown(split, stage, by_class)
                ],
                "sizes": by_class.sum(axis=1).tolist(),
                "labelled": labelled[stage.index].sum(axis=1).tolist(),
                "public": None if split.public is None else len(split.public[stage.index]),
                "test_sizes": None if split.test is None else [len(ids) for ids in split.test[stage.index]],
                "validation": len(stage.validation_ids),
                "test": len(stage.test_ids),
                "empty": [shown[place] for place in split.empty[stage.index] if place in split.present(stage.index)],
                "own": None if split.clocks is None else [None if i < 0 else i for i in split.clocks.own[stage.index]],
            }
        )
    return {
        "scenario": stream.name,
        "clients": population.clients,
        "shown": list(shown) if population.rule else None,
        "num_classes": split.num_classes,
        "test_store": split.test_store,
        "held_out": _held_out_sizes(population),
        "tasks": tasks,
        "warnings": split_warnings(population, stream, class_names),
    }


def _held_out_sizes(split: Split) -> list[list[int]] | None:
    never = split.held_out
    return None if never is None else [[len(ids) for ids in task] for task in never.rows]


def looked_at(split: Split) -> tuple[Split, Sequence[int]]:
    """A complete split to look at, and the clients that it is of: ``SOME`` clients of a drawn population."""
    if not split.rule:
        return split, range(split.clients)
    shown = split.some(SOME)
    return split.only(shown), shown


def split_table(split: Split, stream: Stream, class_names: Sequence[str] = ()) -> str:
    """The table for a terminal: for each task a row a class, a column a client, with sums.

    With more than ``MOST_COLUMNS`` clients the columns are those of the first ones, and a last column sums
    the others.
    """
    data = split_summary(split, stream, class_names)
    population, (split, numbers) = split, looked_at(split)
    shown = min(split.clients, MOST_COLUMNS)
    lines: list[str] = []
    for task in data["tasks"]:
        held_out = f", {task['validation']} for validation" if task["validation"] else ""
        whose = f" held by {split.clients} of the {population.clients} clients" if population.rule else ""
        named = f" ({sum(task['labelled'])} labelled)" if split.unlabelled is not None else ""
        head = f"{_unit(split)} {task['task'] + 1}: {sum(task['sizes'])} training images{named}{whose}"
        head += f", {task['public']} held by the server" if task["public"] is not None else ""
        lines.append(head if split.own_clocks else f"{head}{held_out}, {task['test']} for test")
        header = ["class", *(f"c{client}" for client in numbers[:shown])]
        own = [] if task["own"] is None else [["own task", *own_tasks(task["own"], shown)]]
        hides = split.unlabelled is not None
        parts = [(label(entry), entry["clients"], entry["labelled"]) for entry in task["classes"]]
        parts.append(("all", task["sizes"], task["labelled"]))
        rows = [[name, *cells(held, shown, known if hides else None)] for name, held, known in parts]
        if task["test_sizes"] is not None:
            rows.append(["own test", *cells(task["test_sizes"], shown)])
        if split.clients > shown:
            header.append(f"{split.clients - shown} more")
        lines += [*aligned([[*header, "sum"], *own, *rows]), ""]
    if data["held_out"] is not None:
        sizes = [sum(task) for task in zip(*data["held_out"], strict=True)]
        clients = "1 client" if len(sizes) == 1 else f"{len(sizes)} clients"
        lines += [f"Held out, never trained: {clients} with {some_of(sizes)} images in all tasks", ""]
    if split.unlabelled is not None:
        lines += ["Cells: images with a label + images without", ""]
    return "\n".join(lines).rstrip() + "\n"


def draw_split(split: Split, stream: Stream, class_names: Sequence[str], path: Path) -> None:
    """Writes :func:`split_picture` to a PNG, SVG or PDF; the folder of ``path`` exists."""
    from ..plots.style import save

    save(split_picture(split, stream, class_names), path)


def split_picture(split: Split, stream: Stream, class_names: Sequence[str], title: str | None = None) -> Figure:
    """Training images by class, client and task: a panel a task, a row a class, a column a client.

    Up to ``MOST_DISCS`` clients a cell is a disc: its area is the number of training images (one scale for
    all panels, in the legend), white for those without a label, its shade the client's share of the class. With
    more, cells are shaded by the
    number of images. Columns of clients without images in a task are grey. A drawn population is shown by some of
    its clients.

    Args:
        class_names: by original class id; empty: the ids.
        title: None for one that says what is shown.
    """
    from ..plots.style import PAGE, new_figure

    population, (split, numbers) = split, looked_at(split)
    counts, labelled = split.held_counts(), split.counts()
    rows = [_shown(split, stage, counts[stage.index]) for stage in stream.stages]
    most_rows = max(1, *(len(shown) for shown in rows))
    discs = split.clients <= MOST_DISCS and most_rows <= MOST_DISCS
    cell = 0.21 if max(split.clients, most_rows) <= 12 else 0.15 if discs else 0.08
    width, height = min(max(0.9, cell * split.clients), 5.2), min(max(0.6, cell * most_rows), 7.0)
    longest = max((len(_tick(stream, c, class_names)) for shown in rows for c in shown), default=1)
    slot = width + 0.2 + 0.07 * longest
    across = max(1, min(stream.num_tasks, int((PAGE - 0.8) / slot)))
    down = math.ceil(stream.num_tasks / across)
    across = math.ceil(stream.num_tasks / down)
    whose = f" ({split.clients} of {population.clients} clients)" if population.rule else ""
    whose += f"; held out: {population.held_out.clients} more" if population.held_out else ""
    if title is None:
        title = f"{stream.name}: training images by class, client and task{whose}"
    with new_figure(max(0.9 + across * slot, 3.5), 0.6 + down * (height + 0.45), title, []) as figure:
        panels = figure.subplots(down, across, squeeze=False)
        largest = max(1, int(counts.max()))
        full = (cell * 72 * 0.9) ** 2  # the area, in points, of a disc that just fits its cell
        image: Any = None
        for index, axes in enumerate(panels.ravel()):
            if index >= stream.num_tasks:
                axes.set_visible(False)
                continue
            grid = counts[index][:, rows[index]].T
            known = labelled[index][:, rows[index]].T
            image = _discs(axes, grid, known, largest, full) if discs else _heat(axes, grid, largest)
            _mark_empty(axes, split.empty[index])
            _mark_absent(axes, split, index)
            _label_panel(axes, numbers, [_tick(stream, c, class_names) for c in rows[index]], width)
            axes.set_title(f"{_unit(split).lower()} {index + 1} ({_told(grid, known)})", loc="left")
            if index + across >= stream.num_tasks:
                axes.set_xlabel("client")
            if index % across == 0:
                axes.set_ylabel("class")
        bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01, aspect=20)
        share = "share of the shown images of the class" if population.rule else "share of the class"
        bar.set_label(share if discs else "training images")
        bar.ax.tick_params(labelsize=7)
        lone = [k for s, task in enumerate(split.empty) for k in task if k in split.present(s)]
        _legend(figure, largest, full if discs else None, bool(lone), split)
    return figure


def _told(grid: Ids, known: Ids) -> str:
    held, named = int(grid.sum()), int(known.sum())
    return f"{held} images" if held == named else f"{named}+{held - named}"


def _discs(axes: Any, grid: Ids, known: Ids, largest: int, full: float) -> Any:
    """Discs of all images, white but for their labelled part."""
    row, client = np.nonzero(grid)
    if (grid != known).any():
        size = np.maximum(full * grid[row, client] / largest, 1.0)
        axes.scatter(client, row, s=size, c="white", edgecolors="0.25", linewidths=0.3)
        row, client = np.nonzero(known)
    return axes.scatter(
        client,
        row,
        s=np.maximum(full * known[row, client] / largest, 1.0),
        c=(grid / np.maximum(grid.sum(axis=1, keepdims=True), 1))[row, client],
        cmap="cividis_r",
        vmin=0.0,
        vmax=1.0,
        edgecolors="0.25",
        linewidths=0.3,
    )


def _heat(axes: Any, grid: Ids, largest: int) -> Any:
    shaded = np.ma.masked_equal(grid, 0)  # no image stays white
    edges = [np.arange(size + 1) - 0.5 for size in grid.shape]
    return axes.pcolormesh(edges[1], edges[0], shaded, cmap="cividis_r", vmin=0, vmax=largest)


def _mark_empty(axes: Any, empty: tuple[int, ...]) -> None:
    for client in empty:
        axes.axvspan(client - 0.5, client + 0.5, color=EMPTY_SHADE, zorder=0, linewidth=0)


def _mark_absent(axes: Any, split: Split, stage: int) -> None:
    there = split.present(stage)
    for client in (k for k in range(split.clients) if k not in there):
        axes.axvspan(client - 0.5, client + 0.5, **ABSENT)


def _label_panel(axes: Any, numbers: Sequence[int], names: list[str], width: float) -> None:
    clients = len(numbers)
    axes.grid(visible=False)
    axes.set_xlim(-0.6, clients - 0.4)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    if isinstance(numbers, range):
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, clients) if clients / s <= 5 * width or s == clients)
        axes.set_xticks(range(0, clients, step))
    else:
        axes.set_xticks(range(clients), [str(number) for number in numbers], rotation=90)
    step = max(1, math.ceil(len(names) / 25))
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.tick_params(labelsize=7, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, largest: int, full: float | None, empty: bool, split: Split) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for step in sorted({max(1, round(largest * part)) for part in (0.1, 0.5, 1.0)}) if full else []:
        # a line's marker is measured across, a scatter's by area
        across = max(math.sqrt((full or 0.0) * step / largest), 1.0)
        label = f"{step} image" + "s" * (step > 1)
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=across, label=label))
        handles[-1].set(markerfacecolor="0.75", markeredgecolor="0.25", markeredgewidth=0.3)
    if split.unlabelled is not None and full:
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=9, label="white: no label"))
        handles[-1].set(markerfacecolor="white", markeredgecolor="0.25", markeredgewidth=0.3)
    if empty:
        handles.append(Patch(facecolor=EMPTY_SHADE, label="client without an image in the task"))
    if split.clocks is not None and any(-1 in stage for stage in split.clocks.own):
        handles.append(Patch(**ABSENT, label="absent client"))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles) if len(handles) < 5 else 3,
            borderpad=0.9,
        )


def _unit(split: Split) -> str:
    """What the table has a part for."""
    return "Task" if split.own_clocks is None else "Stage"


def _shown(split: Split, stage: Stage, by_class: Ids) -> list[int]:
    """Positions to list for a task: those it exposes, if it is everybody's, and those that its images show."""
    classes = stage.classes if split.own_clocks is None else ()
    return sorted({*classes, *np.flatnonzero(by_class.sum(axis=0)).tolist()})


def _tick(stream: Stream, position: int, class_names: Sequence[str]) -> str:
    name = class_name(stream, position, class_names)
    return name if len(name) <= 14 else name[:13] + "…"
