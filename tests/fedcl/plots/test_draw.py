"""Every plot of real runs: what is drawn are the numbers of the run folders."""

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedcl.errors import RunFailed, UsageError
from fedcl.measure.breakdown import read_classes, read_clients
from fedcl.measure.feature_log import read_features
from fedcl.metrics.matrix import per_task_forgetting, seen_accuracy_weighted
from fedcl.plots import KINDS, Options, draw
from fedcl.plots.costs import TIMES, seconds
from fedcl.plots.features import Plane
from fedcl.plots.forgetting import class_forgetting
from fedcl.plots.probes import read_probes
from fedcl.plots.style import FORMATS, picture
from fedcl.records.runs import Run, as_run

Clashes = Callable[[Figure], list[str]]
METHODS = [name for name, kind in KINDS.items() if kind.shows == "methods"]


def seen(run: Run) -> np.ndarray:
    return 100 * np.array(seen_accuracy_weighted(run.matrix, run.summary["test_counts"]))


def texts(figure: Figure) -> list[str]:
    return [
        text.get_text().replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ") for text in figure.legends[0].get_texts()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_real_runs(kind: str, everything: tuple[Run, ...], one: Run, clashes: Clashes) -> None:
    figure = draw(kind, everything if kind in METHODS else [one])
    assert figure.axes
    assert clashes(figure) == []
    assert figure.get_suptitle()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
def test_one_run_is_enough(kind: str, one: Run, clashes: Clashes) -> None:
    assert clashes(draw(kind, [one], Options(title=""))) == []


@pytest.mark.parametrize("ending", FORMATS)
def test_the_same_run_gives_the_same_bytes(ending: str, one: Run) -> None:
    first = picture(draw("features", [one]), ending)
    assert picture(draw("features", [as_run(one.folder)]), ending) == first
    if ending == "svg":
        assert b"after task 1</text>" in first  # text is text


def test_accuracy_is_mean_and_deviation_over_seeds(finetune: tuple[Run, ...]) -> None:
    axes = draw("accuracy", finetune).axes[0]
    curves = np.array([seen(run) for run in finetune])
    assert axes.lines[0].get_ydata() == pytest.approx(curves.mean(axis=0))
    edges = axes.collections[0].get_paths()[0].vertices
    at_first = edges[edges[:, 0] == 1][:, 1]
    middle, half = curves[:, 0].mean(), curves[:, 0].std(ddof=1)
    assert half > 1
    assert [at_first.min(), at_first.max()] == pytest.approx([middle - half, middle + half])


def test_methods_are_told_apart_without_colour(everything: tuple[Run, ...]) -> None:
    figure = draw("accuracy", everything)
    looks = {(line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(figure.axes[0].lines) == len(looks) == 3
    assert texts(figure)[0] == "finetune (2 seeds)"
    assert [text.startswith("replay (budget=") for text in texts(figure)[1:]] == [True, True]
    assert "512" in texts(figure)[1]
    assert "2048" in texts(figure)[2]


def test_by_puts_runs_together(everything: tuple[Run, ...]) -> None:
    assert len(draw("accuracy", everything, Options(by=("name",))).axes[0].lines) == 3
    with pytest.raises(UsageError, match="budget"):
        draw("accuracy", everything, Options(by=("strategy",)))
    with pytest.raises(UsageError, match="--by"):
        draw("split", everything[:1], Options(by=("name",)))


def test_matrix_panels_are_the_mean_matrices(everything: tuple[Run, ...], finetune: tuple[Run, ...]) -> None:
    figure = draw("matrix", everything)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 3
    mean = np.mean([100 * np.array(run.matrix) for run in finetune], axis=0)
    assert images[0].get_array().data == pytest.approx(mean)


def test_forgetting_of_tasks_and_classes(one: Run) -> None:
    figure = draw("forgetting", [one])
    by_task, by_class = (axes.lines[0] for axes in figure.axes)
    assert by_task.get_ydata() == pytest.approx(100 * np.array(per_task_forgetting(one.matrix)))
    table = read_classes(one.folder, 3)
    expected = 100 * class_forgetting(table.accuracy)
    assert by_class.get_ydata() == pytest.approx(expected[~np.isnan(expected)])
    assert by_class.get_xdata().tolist() == list(range(1, 8))
    assert [text.get_text() for text in figure.axes[1].texts] == ["n/a"] * 3  # classes of the last task
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == list(table.names)


def test_class_accuracies_make_up_the_matrix(one: Run) -> None:
    table = read_classes(one.folder, 3)
    counts = one.summary["test_counts"]
    assert np.isnan(table.accuracy[0]).sum() == 6
    # Three test images of each class, so that the mean over classes is the accuracy on all images seen.
    assert 100 * np.nanmean(table.accuracy, axis=1) == pytest.approx(seen(one))
    assert counts == [12, 9, 9]


def test_clients_are_drawn_one_by_one(one: Run, finetune: tuple[Run, ...]) -> None:
    left, right = draw("clients", finetune).axes
    tables = [100 * read_clients(run.folder, 3, 3).seen() for run in finetune]
    assert left.lines[-1].get_ydata() == pytest.approx(np.concatenate(tables, axis=1).mean(axis=1))
    drawn = np.sort(np.asarray(right.collections[0].get_offsets())[:, 1])
    assert drawn == pytest.approx(np.sort(np.concatenate([table[-1] for table in tables])))
    weighted = one.summary["personal"]["average_accuracy"]
    found = read_clients(one.folder, 3, 3)
    by_task = found.correct[-1] / found.total[-1]
    assert by_task.mean(axis=1).mean() == pytest.approx(weighted["mean"])


def test_bytes_end_at_all_that_was_sent(everything: tuple[Run, ...], one: Run) -> None:
    axes = draw("bytes", [one]).axes[0]
    line, last = axes.lines
    assert line.get_xdata()[-1] == one.summary["bytes_up"] + one.summary["bytes_down"]
    assert np.diff(line.get_xdata()).min() > 0
    assert line.get_ydata() == pytest.approx(seen(one))
    assert last.get_xydata()[0].tolist() == line.get_xydata()[-1].tolist()
    assert len(draw("bytes", everything).axes[0].lines) == 6


def test_memory_has_a_line_a_stack(everything: tuple[Run, ...]) -> None:
    figure = draw("memory", everything)
    line, level = figure.axes[0].lines[0], figure.axes[0].lines[-1]
    finals = {run.settings["options.replay.budget"]: run for run in everything if run.label == "replay"}
    assert line.get_xdata().tolist() == [512, 2048]
    assert line.get_ydata() == pytest.approx([100 * finals[k].summary["average_accuracy"] for k in (512, 2048)])
    finetune = [100 * run.summary["average_accuracy"] for run in everything if run.label == "finetune"]
    assert level.get_ydata() == pytest.approx([np.mean(finetune)] * 2)
    assert texts(figure) == ["replay", "finetune (no such memory)"]
    held = draw("memory", everything, Options(key="costs.exemplar_bytes.clients")).axes[0].lines
    assert max(held[-1].get_xdata()) == finals[2048].metric("costs.exemplar_bytes.clients") > 0


def test_probes_beside_the_model_itself(one: Run) -> None:
    figure = draw("probes", [one])
    model, knn, linear = (line.get_ydata() for line in figure.axes[0].lines)
    table = read_probes(one)
    assert model == pytest.approx(seen(one))
    assert knn == pytest.approx(100 * table["knn"]["accuracy"])
    assert linear == pytest.approx(100 * table["linear"]["accuracy"])
    assert linear[-1] == pytest.approx(100 * one.summary["probes"]["linear"]["accuracy"])
    assert texts(figure) == ["the model itself", "encoder, nearest neighbours", "encoder, linear layer"]


def test_drift_of_each_old_task(one: Run, everything: tuple[Run, ...]) -> None:
    left, right = draw("drift", [one]).axes
    table = read_probes(one)
    assert len(left.lines) == 2
    assert left.lines[0].get_ydata() == pytest.approx([0, *table["drift"]["task_0"][1:]])
    assert right.lines[0].get_ydata()[1:] == pytest.approx(table["prototypes"]["relative"][1:])
    assert len(draw("drift", everything).axes[0].lines) == 3


def test_features_are_points_of_seen_classes(one: Run) -> None:
    figure = draw("features", [one])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["after task 1", "after task 2", "after task 3"]
    kept = [read_features(one.folder, task) for task in range(3)]
    assert len(kept[0].labels) == 30  # forty images of ten classes are no more than three of each
    assert all((a.labels == b.labels).all() for a, b in combinations(kept, 2))
    for axes, found, task in zip(figure.axes, kept, range(3), strict=True):
        points = sum(len(c.get_offsets()) for c in axes.collections if len(c.get_offsets()) > 1)
        assert points == (found.tasks <= task).sum()
    assert len({tuple(axes.get_xlim()) for axes in figure.axes}) == 1


def test_features_are_those_of_the_model(one: Run) -> None:
    import torch

    from fedcl.build import build
    from fedcl.config import load_config
    from fedcl.federation.call import below
    from fedcl.measure.probing import panel_rows
    from fedcl.records.checkpoint import load_newest

    experiment = build(load_config(one.folder / "config.yaml"))
    checkpoint = load_newest(one.folder / "checkpoints", lambda text: None)
    assert checkpoint is not None
    stages = [stage.test_ids for stage in experiment.stream.stages]
    rows, _ = panel_rows(stages, experiment.stream.test_labels, 4, one.seed, "features")
    images = experiment.test.batch(torch.from_numpy(rows), torch.float32)
    with torch.no_grad():
        expected = experiment.node.forward(below(checkpoint.arrays, "model/"), images, "eval").features
    assert read_features(one.folder, 2).values == pytest.approx(expected.numpy(), abs=2e-3 * float(expected.max()))


def test_a_plane_is_the_first_two_principal_components() -> None:
    points = np.random.Generator(np.random.Philox(0)).normal(size=(50, 4)) * [9.0, 5.0, 1.0, 0.1]
    plane = Plane.of(points)
    values, vectors = np.linalg.eigh(np.cov(points.T))
    assert np.abs(plane.axes @ vectors[:, [-1, -2]]) == pytest.approx(np.eye(2), abs=1e-9)
    assert plane.shares == pytest.approx(values[[-1, -2]] / values.sum())
    assert plane.axes.max(axis=1) == pytest.approx(np.abs(plane.axes).max(axis=1))
    assert Plane.of(points[:1]).project(points[:1]) == pytest.approx(np.zeros((1, 2)))


def test_tsne_is_the_same_twice(one: Run) -> None:
    pytest.importorskip("sklearn")
    options = Options(method="tsne")
    assert picture(draw("features", [one], options), "png") == picture(draw("features", [one], options), "png")


def test_costs_are_those_of_the_run(one: Run) -> None:
    figure = draw("costs", [one])
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([one.summary["bytes_up"], one.summary["bytes_down"]])
    spent = seconds(one)
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx(spent)
    assert 0 < spent.sum() <= one.events()[-1]["time"] - one.events()[0]["time"] + 1e-6
    assert spent[TIMES.index("probes")] > 0


def test_seconds_of_a_resumed_run_leave_the_pause_out(one: Run, tmp_path: Path) -> None:
    lines = [
        {"event": "run_start", "attempt": 1, "time": 0.0},
        {"event": "costs", "task": 0, "round": 0, "attempt": 1, "time": 1.5},
        {"event": "round", "task": 0, "round": 0, "attempt": 1, "time": 2.0},
        {"event": "round", "task": 0, "round": 1, "attempt": 1, "time": 3.0},
        {"event": "run_start", "attempt": 2, "time": 100.0},
        {"event": "round", "task": 0, "round": 1, "attempt": 2, "time": 104.0},
        {"event": "probes", "task": 0, "attempt": 2, "time": 106.0, "seconds": 0.5},
        {"event": "task", "task": 0, "attempt": 2, "time": 107.0},
        {"event": "checkpoint", "attempt": 2, "time": 107.25},
    ]
    copy = shutil.copytree(one.folder, tmp_path / "run")
    (copy / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds(as_run(copy)).tolist() == [6.0, 2.5, 0.5, 0.25]


def test_split_is_the_one_of_the_run(one: Run, tmp_path: Path) -> None:
    figure = draw("split", [one])
    assert sum(axes.get_title(loc="left").startswith("task ") for axes in figure.axes) == 3
    copy = shutil.copytree(one.folder, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("alpha: 1.0", "alpha: 2.0"))
    with pytest.raises(RunFailed, match="not those this run began with"):
        draw("split", [as_run(copy)])
