"""Runs to be reported, their reports, and a real browser to open them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedcl import random as counter
from fedcl.measure.breakdown import class_csv, client_csv
from fedcl.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTINGS: dict[str, Any] = {
    "data.name": "digits", "data.limit": 12, "data.augment": [], "scenario.base": 4,
    "scenario.increment": 3, "partition.name": "dirichlet", "partition.alpha": 1.0, "partition.min_size": 2,
    "partition.test": "same_mix", "model.name": "mlp", "model.width": 8, "model.depth": 1, "federation.clients": 3,
    "federation.rounds": 2, "federation.epochs": 1, "federation.batch_size": 8, "optimiser.lr": 0.1,
    "engine.device": "cpu", "engine.threads": 1, "output.plots": False, "evaluate.features": 40, "evaluate.every": 1,
    "evaluate.probes": ["linear", "drift", "prototypes"],
}  # fmt: skip


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of three tasks, with probes, features and personal test sets."""
    from fedcl.config import load_config
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress

    own = {"name": "whole", "output.dir": str(tmp_path_factory.mktemp("real"))}
    result = execute(load_config({"strategy": ["replay"]}, {**SETTINGS, **own}), progress=QuietProgress())
    return result.folder


@pytest.fixture(scope="session")
def single(real: Path) -> Path:
    """The report of the real run."""
    return write_report([real]).path


def add_tables(folder: Path, classes: int, tasks: int, clients: int) -> None:
    """Accuracy by class and by client for a made run, with as many classes a task."""
    draws = iter(counter.uniform(tasks * (classes + clients * tasks), 0, folder.parent.name, folder.name).tolist())
    met = [classes * (task + 1) // tasks for task in range(tasks)]
    right = [[int(20 * next(draws)) if c < met[t] else 0 for c in range(classes)] for t in range(tasks)]
    every = [[20 if c < met[t] else 0 for c in range(classes)] for t in range(tasks)]
    (folder / "class_accuracy.csv").write_bytes(
        class_csv(list(zip(range(tasks), right, every, strict=True)), [f"c{c}" for c in range(classes)])
    )
    own = [
        {"correct": [[int(8 * next(draws)) for _ in range(tasks)] for _ in range(clients)],
         "total": [[8] * tasks] * clients}
        for _ in range(tasks)
    ]  # fmt: skip
    (folder / "client_accuracy.csv").write_bytes(client_csv(own))


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory, made_runs: ModuleType) -> Path:
    """A folder with two methods of seven seeds each, with tables by class and client, and a broken run."""
    root = tmp_path_factory.mktemp("many")
    for seed in range(7):
        for name, settings, accuracy in (
            ("plain", {"strategy": ["finetune"]}, 0.3 + 0.01 * seed),
            ("memory", {"strategy": ["replay"], "options.replay.budget": 2048}, 0.6 + 0.02 * (seed % 3)),
        ):
            folder = made_runs.make_run(root, name, seed, accuracy, settings, {"num_clients": 3})
            add_tables(folder, 4, made_runs.TASKS, 3)
    (root / "plain" / "seed-9").mkdir()
    (root / "plain" / "seed-9" / "config.yaml").write_text("name: plain\n")
    return root


@pytest.fixture(scope="session")
def comparison(many: Path) -> Path:
    """The report that compares them."""
    return write_report([many]).path


@pytest.fixture(scope="session")
def huge(tmp_path_factory: pytest.TempPathFactory, made_runs: ModuleType) -> Path:
    """The folder of a made run of 100 classes, 20 tasks, 100 clients and 1,000 rounds."""
    tasks, summary = 20, {"num_tasks": 20, "num_clients": 100, "test_counts": [100] * 20}
    folder = made_runs.make_run(tmp_path_factory.mktemp("huge"), "huge", 0, 0.5, {"strategy": ["replay"]}, summary)
    add_tables(folder, 100, tasks, 100)
    lines = [",".join(f"{(i * j % 97) / 97:.6f}" for j in range(tasks)) for i in range(tasks)]
    (folder / "accuracy_matrix.csv").write_text("\n".join(lines) + "\n")
    with (folder / "events.jsonl").open("w") as events:
        for task in range(tasks):
            for round_ in range(60):
                event = {"event": "round", "time": 1e9 + task * 60 + round_, "attempt": 1, "task": task,
                         "round": round_, "clients": 100, "samples": 12345, "steps": 678, "losses": {"task": 1.2345678},
                         "bytes_up": 123456789, "bytes_down": 123456789}  # fmt: skip
                events.write(json.dumps(event) + "\n")
    return folder


# Not longer: while Playwright runs, no other event loop can be started in this thread.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; without one the test is skipped, or fails where FEDCL_REQUIRE names ``browser``."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    missing = "" if program else f"none of {', '.join(BROWSERS)} is on the path"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "playwright is not installed"
    if missing:
        if "browser" in os.environ.get("FEDCL_REQUIRE", "").split(","):
            pytest.fail(f"FEDCL_REQUIRE=browser, but {missing}")
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
