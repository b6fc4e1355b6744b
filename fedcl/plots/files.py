"""Pictures of plain matrices, written to files: what a run leaves in its folder, and what ``fedcl demo`` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..errors import UsageError
from ..metrics import matrix as mx
from ..metrics.io import read_matrix
from ..metrics.matrix import Counts, FloatArray, Matrix
from .curves import curve_figure, draw_curves, percent_axis, with_gaps
from .forgetting import bars_figure
from .matrix import heat_figure
from .methods import spread
from .style import COLOURS, COLUMN, HATCHES, INK, PAGE, add_legend, new_figure, save, task_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = Mapping[str, Matrix | Sequence[Matrix]]


def plot_accuracy_curve(runs: Runs, path: Path, title: str, test_counts: Counts | None = None) -> Path:
    """Accuracy on the tasks seen so far after each task, one line a run.

    Args:
        runs: for each name the accuracy matrix of a run, (T, T), or those of several seeds, (S, T, T), of
            which the mean is drawn, with a band of one sample standard deviation to both sides.
        path: PNG, SVG or PDF to write.
        title: dataset, scenario, strategy and seed, in the caller's words.
        test_counts: test samples of each task, (T,), of every run; then seen tasks are weighted by them.
            Without, they count alike.

    Returns:
        ``path``.

    Raises:
        ValueError: no run, or a run that is not made of accuracy matrices.
    """
    curves = _curves(_stacks(runs), test_counts)
    save(curve_figure(_labels(runs, curves), curves, title, COLUMN), path)
    return path


def plot_comparison(runs: Runs, path: Path, title: str, test_counts: Counts | None = None) -> Path:
    """Two panels: accuracy on seen tasks after each task, and the accuracy on each task after the last one.

    Arguments, result and errors are those of :func:`plot_accuracy_curve`.
    """
    stacks = _stacks(runs)
    curves = _curves(stacks, test_counts)
    labels = _labels(runs, curves)
    with new_figure(PAGE, 2.7, title, labels) as figure:
        left, right = figure.subplots(1, 2)
        handles = draw_curves(left, curves, PAGE / 2)
        left.set_title("While learning")
        _draw_final(right, stacks)
        right.set_title("At the end")
        add_legend(figure, handles, labels)
    save(figure, path)
    return path


def plot_matrix(matrix: Matrix, path: Path, title: str) -> Path:
    """Heat map of an accuracy matrix, (T, T): rows after training on task i, columns tested on task j.

    Raises:
        ValueError: not an accuracy matrix.
    """
    save(heat_figure([100 * mx.as_matrix(matrix)], [""], title), path)
    return path


def plot_forgetting(matrix: Matrix, path: Path, title: str) -> Path:
    """Bars of the forgetting of each task but the last, in percentage points; below 0 the task improved.

    See :func:`fedcl.metrics.matrix.per_task_forgetting` for the formula. Undefined tasks are marked ``n/a``.

    Raises:
        ValueError: not an accuracy matrix.
    """
    points = 100 * np.array(mx.per_task_forgetting(matrix), dtype=np.float64)
    save(bars_figure(points, title), path)
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


def _labels(runs: Runs, curves: Sequence[FloatArray]) -> list[str]:
    names = [
        f"{name} (mean ± 1 s.d. of {len(curve)} seeds)" if len(curve) > 1 else name
        for name, curve in zip(runs, curves, strict=True)
    ]
    return with_gaps(names, curves)


def _draw_final(axes: Axes, stacks: Sequence[FloatArray]) -> None:
    longest = max(stack.shape[1] for stack in stacks)
    width = 0.84 / len(stacks)
    for index, stack in enumerate(stacks):
        percent = 100 * stack[:, -1]
        place = np.arange(1, stack.shape[1] + 1) + (index - (len(stacks) - 1) / 2) * width
        mean = percent.mean(axis=0)
        colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
        axes.bar(place, mean, width=width, color=colour, edgecolor="white", lw=0.4, hatch=hatch)
        half = spread(percent)
        if len(stack) > 1:
            axes.errorbar(place, mean, yerr=half, fmt="none", ecolor=INK, elinewidth=1)
        for x, value, top in zip(place, mean, mean + half, strict=True):
            if np.isnan(value):
                axes.text(x, 1, "n/a", ha="center", va="bottom", fontsize=7, rotation=90)
            elif longest * len(stacks) <= 14:
                axes.text(x, top + 1, f"{value:.0f}", ha="center", va="bottom", fontsize=7)
    margin = 0.6 if longest > 2 else 1.5
    percent_axis(axes)
    axes.set_xlim(1 - margin, longest + margin)
    axes.set_ylim(0, 108)
    axes.set_xticks(*task_ticks(longest, start=1, width=0.4 * PAGE))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("Task")
    axes.set_ylabel("Accuracy after the last task (%)")
