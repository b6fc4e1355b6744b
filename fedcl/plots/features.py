"""A map of the feature space after some of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..measure.feature_log import Features, read_features
from ..metrics.matrix import FloatArray
from ..records.runs import Run
from .style import COLOURS, MARKERS, PAGE, add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options

MOST_PANELS = 4
MOST_COLOURS = 7


def features_figure(run: Run, options: Options) -> Figure:
    """Features of the same test images after some of the tasks, in two dimensions, a panel a task.

    A point is an image of a class learned so far, its colour and marker are the task of the class; a marker with a
    black rim is the mean of a class. Features have unit length: their direction is seen, not how they grow. All panels
    share their axes: the first two principal components of all points shown, or one t-SNE of them
    (``options.method``). With PCA a line leads to each mean from where it was when its class was learned.

    Raises:
        RunFailed: the run kept no features.
        UsageError: t-SNE without scikit-learn.
    """
    shown = sorted({round(x) for x in np.linspace(0, run.num_tasks - 1, min(MOST_PANELS, run.num_tasks))})
    kept = {task: _unit(read_features(run.folder, task)) for task in range(run.num_tasks)}
    seen = {task: kept[task].tasks <= task for task in kept}
    points = np.concatenate([kept[task].values[seen[task]] for task in shown])
    if options.method == "tsne":
        flat, axis_names, basis = _tsne(points), ["t-SNE 1", "t-SNE 2"], None
    else:
        basis = Plane.of(points)
        flat = basis.project(points)
        axis_names = [f"PC {i + 1} ({100 * share:.0f} %)" for i, share in enumerate(basis.shares)]
    ends = np.cumsum([int(seen[task].sum()) for task in shown])[:-1]
    across = len(shown)
    labels = [f"task {task + 1}" for task in range(run.num_tasks)] if run.num_tasks <= MOST_COLOURS else []
    side = min((PAGE - 0.4) / across, 3.0)
    width = max(across * side + 0.4, 3.5)
    title = options.title if options.title is not None else _title(run)
    with new_figure(width, side + 0.55, title, labels) as figure:
        panels = figure.subplots(1, across, squeeze=False, sharex=True, sharey=True)[0]
        for axes, task, places in zip(panels, shown, np.split(flat, ends), strict=True):
            _panel(axes, kept[task], seen[task], places, run.num_tasks)
            if basis is not None:
                _trails(axes, kept, task, basis, run.num_tasks)
            axes.set_title(f"after task {task + 1}", loc="left")
            axes.set_xlabel(axis_names[0])
        panels[0].set_ylabel(axis_names[1])
        if labels:
            add_legend(figure, [_handle(task, run.num_tasks) for task in range(run.num_tasks)], labels)
        else:
            _colour_bar(figure, panels, run.num_tasks)
    return figure


def _unit(kept: Features) -> Features:
    length = np.linalg.norm(kept.values, axis=1, keepdims=True)
    return replace(kept, values=np.divide(kept.values, length, out=np.zeros_like(kept.values), where=length > 0))


class Plane:
    """The plane of the two directions in which points vary most.

    Attributes:
        mean: (d,) of the points.
        axes: (2, d) orthonormal; the largest entry of each is positive, so that the same points give the same picture.
        shares: of the variance, (2,).
    """

    def __init__(self, mean: FloatArray, axes: FloatArray, shares: FloatArray) -> None:
        self.mean, self.axes, self.shares = mean, axes, shares

    @classmethod
    def of(cls, points: FloatArray) -> Plane:
        """Of points (n, d)."""
        mean = points.mean(axis=0)
        _, scale, axes = np.linalg.svd(points - mean, full_matrices=False)
        axes, variance = axes[:2], scale**2
        if len(axes) < 2:  # one point, or one feature
            axes = np.vstack([axes, np.zeros((2 - len(axes), points.shape[1]))])
            variance = np.append(variance, 0.0)
        largest = np.abs(axes).argmax(axis=1)
        signs = np.where(axes[np.arange(2), largest] < 0, -1.0, 1.0)
        total = variance.sum()
        return cls(mean, axes * signs[:, None], variance[:2] / total if total > 0 else np.zeros(2))

    def project(self, points: FloatArray) -> FloatArray:
        """(n, 2) of points (n, d)."""
        found: FloatArray = (points - self.mean) @ self.axes.T
        return found


def _tsne(points: FloatArray) -> FloatArray:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UsageError("--method", "tsne", "needs scikit-learn, which is not installed; pca needs nothing") from error
    if len(points) < 4:
        raise UsageError("--method", "tsne", f"needs four points at least, there are {len(points)}")
    perplexity = min(30.0, (len(points) - 1) / 3)
    found: FloatArray = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    return found


def _panel(axes: Axes, kept: Features, seen: Any, places: FloatArray, tasks: int) -> None:
    labels, owners = kept.labels[seen], kept.tasks[seen]
    size = 7 if len(labels) <= 400 else 3
    for task in np.unique(owners).tolist():
        own = owners == task
        axes.scatter(places[own, 0], places[own, 1], s=size, alpha=0.55, lw=0, **_look(task, tasks))
    for task, label in sorted(set(zip(owners.tolist(), labels.tolist(), strict=True))):
        mean = places[(owners == task) & (labels == label)].mean(axis=0)
        rim = 26 if tasks <= MOST_COLOURS else 9
        axes.scatter(mean[0], mean[1], s=rim, ec="black", lw=0.5, zorder=4, **_look(task, tasks))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)


def _trails(axes: Axes, kept: dict[int, Features], task: int, plane: Plane, tasks: int) -> None:
    """Lines from each class mean when it was learned to where it is after ``task``."""
    now = kept[task]
    for owner, label in sorted(set(zip(now.tasks.tolist(), now.labels.tolist(), strict=True))):
        if owner >= task:
            continue
        own = (now.tasks == owner) & (now.labels == label)
        # With many tasks the way would be a thicket: its ends are enough.
        steps = range(owner, task + 1) if tasks <= MOST_COLOURS else (owner, task)
        trail = np.array([plane.project(kept[step].values[own].mean(axis=0)[None])[0] for step in steps])
        thin: dict[str, Any] = {"lw": 0.6, "alpha": 0.7} if tasks <= MOST_COLOURS else {"lw": 0.3, "alpha": 0.5}
        axes.plot(trail[:, 0], trail[:, 1], color="black", zorder=3, **thin)


def _look(task: int, tasks: int) -> dict[str, Any]:
    from matplotlib import colormaps

    if tasks <= MOST_COLOURS:
        return {"color": COLOURS[task], "marker": MARKERS[task]}
    return {"color": colormaps["viridis"](task / (tasks - 1)), "marker": "o"}


def _handle(task: int, tasks: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="", ms=4.5, mec="black", mew=0.6, **_look(task, tasks))


def _colour_bar(figure: Figure, panels: Sequence[Axes], tasks: int) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    image = ScalarMappable(Normalize(1, tasks), colormaps["viridis"])
    figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01).set_label("Task of the class")


def _title(run: Run) -> str:
    parts = [run.summary.get("dataset"), str(run.summary.get("scenario")).replace("_", "-"), run.label]
    return ", ".join([*(str(part) for part in parts if part), f"seed {run.seed}"])
