"""Looking at a split: the class x client x task table, its warnings and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .stream import Ids, Split, Stream

MOST_COLUMNS = 20
"""Clients shown in the terminal; the JSON object holds all."""

SOME = 20
"""Clients that stand for a drawn population in table, picture and JSON object."""

MOST_DISCS = 30
"""Clients, and classes a task, up to which the picture draws discs."""


EMPTY_SHADE = "0.9"


def split_summary(split: Split, stream: Stream, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """The split as one JSON-able object.

    Args:
        class_names: by original class id; default: the ids.

    Returns:
        ``tasks``: for each task its ``classes`` (position, original id, name, images by client), client
        ``sizes``, ``test_sizes`` of personal test sets (or null), ``validation`` and ``test`` images,
        ``empty`` clients; ``clients``, ``num_classes``, ``test_store`` and ``warnings``. Of a drawn population
        ``shown`` lists the clients that all lists by client are about; it is null for a complete split. ``held_out``
        has, for each task, the images of each client that never trains; null without such clients.
    """
    population, (split, shown) = split, looked_at(split)
    counts = split.counts()
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
                        "name": _name(stream, position, class_names),
                        "clients": by_class[:, position].tolist(),
                    }
                    for position in _shown(stage.classes, by_class)
                ],
                "sizes": by_class.sum(axis=1).tolist(),
                "test_sizes": None if split.test is None else [len(ids) for ids in split.test[stage.index]],
                "validation": len(stage.validation_ids),
                "test": len(stage.test_ids),
                "empty": [shown[place] for place in split.empty[stage.index]],
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


def split_warnings(split: Split, stream: Stream, class_names: Sequence[str] = ()) -> list[str]:
    """One line a problem: clients without images (in a task, in all tasks), classes that nobody holds.

    Of a drawn population one line says what it is; whether some client is empty would need all of them.
    """
    if split.rule:
        return [
            f"partition.size: each of the {split.clients} clients draws its images independently of the others, so two "
            "may hold the same image, and an image may belong to nobody"
        ]
    counts = split.counts()
    lines = []
    for stage in stream.stages:
        if empty := split.empty[stage.index]:
            verb = "client holds" if len(empty) == 1 else "clients hold"
            lines.append(f"task {stage.index + 1}: {len(empty)} {verb} no training image: {_some(empty)}")
        if split.test is not None:
            untested = [
                client
                for client, ids in enumerate(split.test[stage.index])
                if len(ids) == 0 and len(split.train[stage.index][client]) > 0
            ]
            if untested:
                lines.append(f"task {stage.index + 1}: no personal test image for client {_some(untested)}")
        held = counts[stage.index].sum(axis=0)
        if missing := [c for c in stage.classes if held[c] == 0]:
            names = [_name(stream, c, class_names) for c in missing]
            lines.append(f"task {stage.index + 1}: no client holds class {_some(names)}")
    never = np.flatnonzero(counts.sum(axis=(0, 2)) == 0).tolist()
    if never and stream.num_tasks > 1:
        lines.append(f"clients without a training image in any task: {_some(never)}")
    return lines


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
        lines.append(
            f"Task {task['task'] + 1}: {sum(task['sizes'])} training images{whose}{held_out}, {task['test']} for test"
        )
        header = ["class", *(f"c{client}" for client in numbers[:shown])]
        rows = [[_label(entry), *_cells(entry["clients"], shown)] for entry in task["classes"]]
        rows.append(["all", *_cells(task["sizes"], shown)])
        if task["test_sizes"] is not None:
            rows.append(["own test", *_cells(task["test_sizes"], shown)])
        if split.clients > shown:
            header.append(f"{split.clients - shown} more")
        lines += [*_aligned([[*header, "sum"], *rows]), ""]
    if data["held_out"] is not None:
        sizes = [sum(task) for task in zip(*data["held_out"], strict=True)]
        lines += [f"Held out, never trained: {len(sizes)} clients with {_some(sizes)} images in all tasks", ""]
    lines += [f"Warning: {line}" for line in data["warnings"]]
    return "\n".join(lines).rstrip() + "\n"


def draw_split(split: Split, stream: Stream, class_names: Sequence[str], path: Path) -> None:
    """Writes a PNG: a panel a task, a row a class, a column a client.

    Up to ``MOST_DISCS`` clients a cell is a disc: its area is the number of training images (one scale for
    all panels, in the legend), its shade the client's share of the class. With more, cells are shaded by the
    number of images. Columns of clients without images in a task are grey. A drawn population is shown by some of
    its clients.

    Args:
        class_names: by original class id; empty: the ids.
        path: the file to write; its folder exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    population, (split, numbers) = split, looked_at(split)
    counts = split.counts()
    rows = [_shown(stage.classes, counts[stage.index]) for stage in stream.stages]
    most_rows = max(1, *(len(shown) for shown in rows))
    discs = split.clients <= MOST_DISCS and most_rows <= MOST_DISCS
    cell = 0.30 if max(split.clients, most_rows) <= 12 else 0.2 if discs else 0.1
    width, height = min(max(1.7, cell * split.clients), 8.0), min(max(0.8, cell * most_rows), 8.0)
    longest = max((len(_tick(stream, c, class_names)) for shown in rows for c in shown), default=1)
    across = max(1, min(stream.num_tasks, int(14 / (width + 0.6))))
    down = math.ceil(stream.num_tasks / across)
    size = (1.4 + across * (width + 0.35 + 0.075 * longest), 1.3 + down * (height + 0.6))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False)
    largest = max(1, int(counts.max()))
    full = (cell * 72 * 0.95) ** 2  # the area, in points, of a disc that just fits its cell
    image: Any = None
    for index, axes in enumerate(panels.ravel()):
        if index >= stream.num_tasks:
            axes.set_visible(False)
            continue
        grid = counts[index][:, rows[index]].T
        image = _discs(axes, grid, largest, full) if discs else _heat(axes, grid, largest)
        _mark_empty(axes, split.empty[index])
        _label_panel(axes, numbers, [_tick(stream, c, class_names) for c in rows[index]])
        axes.set_title(f"task {index + 1} ({int(grid.sum())} images)", fontsize=8)
        if index + across >= stream.num_tasks:
            axes.set_xlabel("client", fontsize=8)
        if index % across == 0:
            axes.set_ylabel("class", fontsize=8)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01, aspect=25)
    share = "share of the shown images of the class" if population.rule else "share of the class"
    bar.set_label(share if discs else "training images", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _legend(figure, largest, full if discs else None, any(split.empty))
    whose = f" ({split.clients} of {population.clients} clients)" if population.rule else ""
    whose += f"; {population.held_out.clients} more clients are held out" if population.held_out else ""
    figure.suptitle(f"{stream.name}: training images by class, client and task{whose}", fontsize=10)
    figure.savefig(path, metadata={"Software": None})


def _discs(axes: Any, grid: Ids, largest: int, full: float) -> Any:
    row, client = np.nonzero(grid)
    held = grid[row, client]
    return axes.scatter(
        client,
        row,
        s=np.maximum(full * held / largest, 1.0),
        c=held / grid.sum(axis=1)[row],
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


def _label_panel(axes: Any, numbers: Sequence[int], names: list[str]) -> None:
    clients = len(numbers)
    axes.set_xlim(-0.6, clients - 0.4)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    each = max(1, math.ceil(clients / 10))
    if isinstance(numbers, range):
        axes.set_xticks(range(0, clients, each))
    else:
        axes.set_xticks(range(clients), [str(number) for number in numbers], rotation=90)
    step = max(1, math.ceil(len(names) / 25))
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.tick_params(labelsize=7, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, largest: int, full: float | None, empty: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for step in sorted({max(1, round(largest * part)) for part in (0.1, 0.5, 1.0)}) if full else []:
        # a line's marker is measured across, a scatter's by area
        across = max(math.sqrt((full or 0.0) * step / largest), 1.0)
        label = f"{step} image" + "s" * (step > 1)
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=across, label=label))
        handles[-1].set(markerfacecolor="0.75", markeredgecolor="0.25", markeredgewidth=0.3)
    if empty:
        handles.append(Patch(facecolor=EMPTY_SHADE, label="client without an image in the task"))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            fontsize=8,
            frameon=False,
            borderpad=0.9,
        )


def _shown(classes: tuple[int, ...], by_class: Ids) -> list[int]:
    """Positions to list for a task: those it exposes and those that its images show."""
    return sorted({*classes, *np.flatnonzero(by_class.sum(axis=0)).tolist()})


def _name(stream: Stream, position: int, class_names: Sequence[str]) -> str:
    original = stream.class_order[position]
    return class_names[original] if class_names else str(original)


def _tick(stream: Stream, position: int, class_names: Sequence[str]) -> str:
    name = _name(stream, position, class_names)
    return name if len(name) <= 14 else name[:13] + "…"


def _label(entry: dict[str, Any]) -> str:
    name = str(entry["name"])
    short = name if len(name) <= 20 else name[:19] + "…"
    return short if name == str(entry["class"]) else f"{entry['class']} {short}"


def _cells(values: Sequence[int], shown: int) -> list[str]:
    cells = [str(value) if value else "." for value in values[:shown]]
    if len(values) > shown:
        cells.append(str(sum(values[shown:])))
    return [*cells, str(sum(values))]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _some(items: Sequence[object]) -> str:
    text = ", ".join(str(item) for item in items[:10])
    return text + (f" and {len(items) - 10} more" if len(items) > 10 else "")
