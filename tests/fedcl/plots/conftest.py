"""Real tiny runs to be drawn, and run folders of sizes that would take hours to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedcl.measure.breakdown import class_csv, client_csv
from fedcl.records.runs import Run, as_run, find_runs

SETTINGS: dict[str, Any] = {
    "data.name": "digits", "data.limit": 12, "data.validation": 0.0, "data.augment": [], "scenario.tasks": 3,
    "scenario.base": 4, "scenario.increment": 3, "partition.name": "dirichlet", "partition.alpha": 1.0,
    "partition.min_size": 2, "partition.test": "same_mix", "model.name": "mlp", "model.width": 8, "model.depth": 1,
    "federation.clients": 3, "federation.rounds": 1, "federation.epochs": 1, "federation.batch_size": 8,
    "optimiser.lr": 0.1, "engine.device": "cpu", "engine.threads": 1, "output.plots": False,
    "evaluate.features": 40, "evaluate.probes": ["linear", "knn", "drift", "prototypes"],
}  # fmt: skip


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finetune (seeds 0 and 1) and replay (budgets 512 and 2048, seed 0) of three tasks each."""
    from fedcl.config import load_config
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress

    root = tmp_path_factory.mktemp("real")
    settings = dict(SETTINGS)
    del settings["scenario.tasks"]
    for name, seed, strategy, options in (
        ("finetune", 0, "finetune", {}),
        ("finetune", 1, "finetune", {}),
        ("small", 0, "replay", {"options.replay.budget": 512}),
        ("large", 0, "replay", {"options.replay.budget": 2048}),
    ):
        own = {"strategy": [strategy], "name": name, "seed": seed, "output.dir": str(root), **options}
        execute(load_config({"strategy": ["finetune"]}, {**settings, **own}), progress=QuietProgress())
    return root


@pytest.fixture(scope="session")
def one(real: Path) -> Run:
    """finetune with seed 0."""
    return as_run(real / "finetune" / "seed-0")


@pytest.fixture(scope="session")
def finetune(real: Path) -> tuple[Run, ...]:
    """finetune with both seeds."""
    return find_runs([real / "finetune"]).runs


@pytest.fixture(scope="session")
def everything(real: Path) -> tuple[Run, ...]:
    """All four runs."""
    return find_runs([real]).runs


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Run]:
    """``made(name, tasks, classes, clients, strategy=..., seed=...)``: a run folder with invented numbers."""

    def make(
        name: str, tasks: int, classes: int, clients: int, strategy: tuple[str, ...] = ("finetune",), seed: int = 0
    ) -> Run:
        from fedcl.config import load_config, to_yaml

        folder = tmp_path / name / f"seed-{seed}"
        folder.mkdir(parents=True)
        draw = np.random.Generator(np.random.Philox([seed, tasks, classes]))
        keys = {"name": name, "seed": seed, "scenario.tasks": tasks, "federation.clients": clients}
        (folder / "config.yaml").write_text(to_yaml(load_config({"strategy": list(strategy)}, keys)))
        matrix = np.tril(draw.random((tasks, tasks)))
        (folder / "accuracy_matrix.csv").write_text("".join(",".join(map(repr, r)) + "\n" for r in matrix.tolist()))
        summary = {
            "name": name, "seed": seed, "strategy": list(strategy), "scenario": "class_incremental", "status": "done",
            "num_tasks": tasks, "num_clients": clients, "average_accuracy": float(matrix[-1].mean()),
            "bytes_up": 10**6 * tasks, "bytes_down": 10**6 * tasks, "bytes_per_task": [[10**6, 10**6]] * tasks,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        each = classes // tasks
        rows = [(t, [7 * (c < (t + 1) * each) for c in range(classes)], [9 * (c < (t + 1) * each) for c in
                range(classes)]) for t in range(tasks)]  # fmt: skip
        (folder / "class_accuracy.csv").write_bytes(class_csv(rows, [f"class number {c}" for c in range(classes)]))
        total = draw.integers(1, 9, (clients, tasks))
        right = (total * draw.random((clients, 1))).astype(int).tolist()
        (folder / "client_accuracy.csv").write_bytes(client_csv([{"correct": right, "total": total.tolist()}] * tasks))
        values = ["task,probe,name,value"]
        for task in range(tasks):
            values += [f"{task},linear,accuracy,0.5", f"{task},drift,distance,{task or ''}"]
            values += [f"{task},drift,task_{old},{task - old}" for old in range(task)]
        (folder / "probes.csv").write_text("\n".join(values) + "\n")
        (folder / "events.jsonl").write_text("")
        return as_run(folder)

    return make


@pytest.fixture(scope="session", name="clashes")
def clashes_fixture() -> Callable[[Figure], list[str]]:
    """``clashes(figure)``: texts that are cut off, and tick labels that touch."""
    return clashes


def clashes(figure: Figure) -> list[str]:
    """Texts over the edge of the figure, and tick labels of an axis that touch one another."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    found = []
    singles = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        singles += [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
            low, high = sorted(axis.get_view_interval())
            inside = [t for t in ticks if low <= t.get_position()[axis is axes.yaxis] <= high]
            singles += inside
            boxes = [(t.get_text(), t.get_window_extent()) for t in inside]
            found += [f"{a} on {b}" for (a, x), (b, y) in combinations(boxes, 2) if x.overlaps(y)]
    for text in singles:
        if text is not None and text.get_text():
            box = text.get_window_extent()
            if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.width + 1 or box.y1 > figure.bbox.height + 1:
                found.append(f"cut: {text.get_text()}")
    return found
