"""Pictures of a run: accuracy curve, accuracy matrix, forgetting, and the comparison of runs.

Functions of plain data that write one PNG each. Values are accuracies in [0, 1] and are drawn in percent;
tasks are counted from 1. Undefined values leave a gap and are marked, never drawn as 0. Line colours are
those of Okabe and Ito, told apart with every common colour vision deficiency; each run also has a marker and
dashes of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedcl.errors import UsageError
from fedcl.metrics import matrix as mx
from fedcl.metrics.io import read_matrix
from fedcl.metrics.matrix import Counts, FloatArray, Matrix
from fedcl.plot_style import (
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    TEXT_SIZE,
    label_lines,
    luminance,
    new_figure,
    save,
    task_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, Matrix | Sequence[Matrix]]


def plot_accuracy_curve(runs: Runs, path: Path, title: str, test_counts: Counts | None = None) -> Path:
    """Accuracy on the tasks seen so far after each task, one line a run.

    Args:
        runs: for each name the accuracy matrix of a run, (T, T), or those of several seeds, (S, T, T), of
            which the mean is drawn, with a band of one sample standard deviation to both sides.
        path: PNG to write.
        title: dataset, scenario, strategy and seed, in the caller's words.
        test_counts: test samples of each task, (T,), of every run; then seen tasks are weighted by them.
            Without, they count alike.

    Returns:
        ``path``.

    Raises:
        ValueError: no run, or a run that is not made of accuracy matrices.
    """
    curves = _curves(_stacks(runs), test_counts)
    labels = _labels(runs, curves)
    with new_figure(6.8, 4.2, title, labels) as figure:
        axes = figure.subplots()
        _legend(figure, _draw_curves(axes, curves), labels)
        save(figure, path)
    return path


def plot_comparison(runs: Runs, path: Path, title: str, test_counts: Counts | None = None) -> Path:
    """Two panels: accuracy on seen tasks after each task, and the accuracy on each task after the last one.

    Arguments, result and errors are those of :func:`plot_accuracy_curve`.
    """
    stacks = _stacks(runs)
    curves = _curves(stacks, test_counts)
    labels = _labels(runs, curves)
    with new_figure(11.0, 4.4, title, labels) as figure:
        left, right = figure.subplots(1, 2)
        handles = _draw_curves(left, curves)
        left.set_title("While learning")
        _draw_final(right, stacks)
        right.set_title("At the end")
        _legend(figure, handles, labels)
        save(figure, path)
    return path


def plot_matrix(matrix: Matrix, path: Path, title: str) -> Path:
    """Heat map of an accuracy matrix, (T, T): rows after training on task i, columns tested on task j.

    Each cell holds its percentage where that can be read; undefined cells are hatched; a stepped line parts
    the tasks already learned from those still to come.

    Raises:
        ValueError: not an accuracy matrix.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    percent = 100 * mx.as_matrix(matrix)
    tasks = len(percent)
    side = min(max(0.46 * tasks, 3.0), 13.0)
    with new_figure(side + 1.45, side + 0.75, title, []) as figure:
        axes = figure.subplots()
        colours = colormaps["cividis"]
        image = axes.imshow(np.ma.masked_invalid(percent), cmap=colours, vmin=0, vmax=100, aspect="auto")
        # Three digits are about two font sizes wide and have to fit into one cell.
        size = min(TEXT_SIZE, 72 * side / tasks / 2.5)
        for (i, j), value in np.ndenumerate(percent):
            if np.isnan(value):
                corner = (j - 0.5, i - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=GREY, edgecolor="#7F7F7F", hatch="////", lw=0))
            elif size >= 4.5:
                ink = "black" if luminance(colours(value / 100)) > 0.18 else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=size, color=ink, in_layout=False)
        edge = np.repeat(np.arange(tasks + 1) - 0.5, 2)
        for colour, width in (("white", 3.0), ("black", 1.2)):
            axes.plot(edge[2:-1], edge[1:-2], color=colour, lw=width)
        figure.colorbar(image, ax=axes, fraction=0.25 / side, aspect=4 * side).set_label("Test accuracy (%)")
        axes.grid(visible=False)
        axes.set_xlim(-0.5, tasks - 0.5)
        axes.set_ylim(tasks - 0.5, -0.5)
        axes.set_xticks(*task_ticks(tasks, start=0))
        axes.set_yticks(*task_ticks(tasks, start=0))
        axes.set_xlabel("Tested on task" + ("\n(hatched: undefined)" if np.isnan(percent).any() else ""))
        axes.set_ylabel("After training on task")
        save(figure, path)
    return path


def plot_forgetting(matrix: Matrix, path: Path, title: str) -> Path:
    """Bars of the forgetting of each task but the last, in percentage points; below 0 the task improved.

    See :func:`fedcl.metrics.matrix.per_task_forgetting` for the formula. Undefined tasks are marked ``n/a``.

    Raises:
        ValueError: not an accuracy matrix.
    """
    points = 100 * np.array(mx.per_task_forgetting(matrix), dtype=np.float64)
    tasks = len(points) + 1
    with new_figure(max(6.4, min(0.22 * tasks, 11.0)), 4.0, title, []) as figure:
        axes = figure.subplots()
        axes.set_xlabel("Task (the last one cannot be forgotten yet)")
        axes.set_ylabel("Forgetting (percentage points)\nbest before the last task − at the end")
        if tasks == 1:
            axes.set_xticks([])
            axes.set_yticks([])
            message = "Undefined: forgetting needs two tasks"
            axes.text(0.5, 0.5, message, ha="center", transform=axes.transAxes)
            save(figure, path)
            return path
        place = np.arange(1, tasks)
        defined = ~np.isnan(points)
        for chosen, colour, name in (
            (defined & (points >= 0), COLOURS[1], "forgotten"),
            (defined & (points < 0), COLOURS[0], "improved"),
        ):
            if chosen.any():
                axes.bar(place[chosen], points[chosen], width=0.75, color=colour, label=name)
        size = TEXT_SIZE if tasks <= 20 else 5.5
        for x, value in zip(place, points, strict=True):
            text = "n/a" if np.isnan(value) else f"{value:+.0f}"
            if tasks > 60 and not np.isnan(value):
                continue
            below = value < 0
            axes.annotate(
                text,
                (x, 0 if np.isnan(value) else value),
                xytext=(0, -2 if below else 2),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=size,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3},
            )
        axes.axhline(0, color="black", lw=1)
        if defined.any():
            mean = float(points[defined].mean())
            label = "mean" if defined.all() else "mean of the defined tasks"
            axes.axhline(mean, color="#555555", lw=1.2, ls="--", zorder=0.9, label=f"{label} {mean:+.1f}")
            figure.legend(loc="outside lower center", ncols=3)
        axes.set_xlim(0.4, tasks - 0.4)
        axes.margins(y=0.12)
        axes.set_xticks(*task_ticks(tasks - 1, start=1))
        axes.grid(visible=False, axis="x")
        save(figure, path)
    return path


def write_run_plots(run_dir: Path) -> list[Path]:
    """Draw ``plots/accuracy.png``, ``plots/matrix.png`` and ``plots/forgetting.png`` of a run folder.

    Reads ``accuracy_matrix.csv`` and ``summary.json``: ``name``, ``seed``, ``strategy`` (list),
    ``scenario``, and where they are given ``dataset`` and ``test_counts`` (test samples of each task).

    Raises:
        UsageError: one of the two files is missing or broken.
    """
    file = run_dir / "summary.json"
    if not file.is_file():
        raise UsageError("RUN_DIR", str(run_dir), "the folder of a finished run: there is no summary.json in it")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        about = [str(summary[key]) for key in ("dataset",) if summary.get(key)]
        strategy = " + ".join(summary["strategy"])
        about += [str(summary["scenario"]), strategy, f"seed {summary['seed']}"]
        title = f"{summary['name']}: " + ", ".join(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        allowed = f"the summary.json of a run, with name, seed, strategy, scenario ({error!r})"
        raise UsageError("summary", str(file), allowed) from None
    matrix, counts = read_matrix(run_dir / "accuracy_matrix.csv"), summary.get("test_counts")
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    return [
        plot_accuracy_curve({strategy: matrix}, folder / "accuracy.png", title, counts),
        plot_matrix(matrix, folder / "matrix.png", title),
        plot_forgetting(matrix, folder / "forgetting.png", title),
    ]


def _stacks(runs: Runs) -> list[FloatArray]:
    """Accuracy matrices of each run, (S, T, T)."""
    if not runs:
        raise ValueError("no run to draw")
    stacks = []
    for given in runs.values():
        seeds = [given] if np.ndim(cast(Any, given[0])) == 1 else given
        stacks.append(np.stack([mx.as_matrix(cast(Matrix, seed)) for seed in seeds]))
    return stacks


def _curves(stacks: Sequence[FloatArray], test_counts: Counts | None) -> list[FloatArray]:
    """Accuracy on seen tasks of each run, (S, T), in percent."""
    if test_counts is None:
        return [100 * np.array([mx.seen_accuracy(r) for r in stack], dtype=np.float64) for stack in stacks]
    return [
        100 * np.array([mx.seen_accuracy_weighted(r, test_counts) for r in stack], dtype=np.float64) for stack in stacks
    ]


def _labels(names: Iterable[str], curves: Sequence[FloatArray]) -> list[str]:
    """Legend entries: name, what the band is, and where the curve is undefined."""
    labels = []
    for name, curve in zip(names, curves, strict=True):
        gaps = (np.flatnonzero(np.isnan(curve).any(axis=0)) + 1).tolist()
        notes = [f"mean ± 1 s.d. of {len(curve)} seeds"] if len(curve) > 1 else []
        if len(gaps) > 2 and gaps[-1] - gaps[0] == len(gaps) - 1:
            notes.append(f"undefined after {gaps[0]}–{gaps[-1]} tasks")
        elif gaps:
            notes.append(f"undefined after {', '.join(map(str, gaps))} tasks")
        labels.append(f"{name} ({'; '.join(notes)})" if notes else name)
    return labels


def _draw_curves(axes: Axes, curves: Sequence[FloatArray]) -> list[Any]:
    handles = []
    longest = max(curve.shape[1] for curve in curves)
    for index, curve in enumerate(curves):
        after, mean = np.arange(1, curve.shape[1] + 1), curve.mean(axis=0)
        colour = COLOURS[index % len(COLOURS)]
        handles += axes.plot(
            after,
            mean,
            color=colour,
            ls=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            ms=5 if longest <= 20 else 3,
            lw=1.8,
            clip_on=False,
            zorder=3,
        )
        if len(curve) > 1:
            spread = curve.std(axis=0, ddof=1)
            axes.fill_between(after, mean - spread, mean + spread, color=colour, alpha=0.18, lw=0)
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_ylim(0, 100)
    axes.set_xticks(*task_ticks(longest, start=1))
    axes.set_xlabel("Tasks learned")
    axes.set_ylabel("Accuracy on all tasks seen so far (%)")
    return handles


def _draw_final(axes: Axes, stacks: Sequence[FloatArray]) -> None:
    longest = max(stack.shape[1] for stack in stacks)
    width = 0.84 / len(stacks)
    for index, stack in enumerate(stacks):
        percent = 100 * stack[:, -1]
        place = np.arange(1, stack.shape[1] + 1) + (index - (len(stacks) - 1) / 2) * width
        mean = percent.mean(axis=0)
        axes.bar(place, mean, width=width, color=COLOURS[index % len(COLOURS)], edgecolor="white", lw=0.4)
        spread = percent.std(axis=0, ddof=1) if len(stack) > 1 else np.zeros_like(mean)
        if len(stack) > 1:
            axes.errorbar(place, mean, yerr=spread, fmt="none", ecolor="#333333", elinewidth=1)
        for x, value, top in zip(place, mean, mean + spread, strict=True):
            if np.isnan(value):
                axes.text(x, 1, "n/a", ha="center", va="bottom", fontsize=7.5, rotation=90)
            elif longest * len(stacks) <= 20:
                axes.text(x, top + 1, f"{value:.0f}", ha="center", va="bottom", fontsize=7.5)
    margin = 0.6 if longest > 2 else 1.5
    axes.set_xlim(1 - margin, longest + margin)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xticks(*task_ticks(longest, start=1))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("Task")
    axes.set_ylabel("Accuracy on the task after the last one (%)")


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    texts = ["\n".join(label_lines(label, figure.get_figwidth())) for label in labels]
    figure.legend(handles, texts, loc="outside lower left", handlelength=3.2)
