"""The run folder: every file in it, failed runs, and that one folder holds one run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedcl.config import Config, load_config
from fedcl.errors import RunFailed, UsageError
from fedcl.records.runfolder import RunFolder
from fedcl.run import execute, load, run

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], Config]


def test_run_folder_holds_what_the_contract_says(tiny: Tiny) -> None:
    result = tiny({"evaluate.every": 1, "output.plots": True, "partition.test": "same_mix"})
    folder = result.folder
    assert folder.parts[-2:] == ("run", "seed-0")
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert {"config.yaml", "environment.json", "events.jsonl", "rounds.csv", "accuracy_matrix.csv", "summary.json",
            "checkpoints", "plots"} <= names  # fmt: skip
    assert list((folder / "plots").glob("*.png"))
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".pickle")]
    summary = json.loads((folder / "summary.json").read_text())
    assert {"name", "seed", "strategy", "scenario", "num_tasks", "num_clients", "rounds", "average_accuracy",
            "average_incremental_accuracy", "forgetting", "forgetting_first_last", "backward_transfer",
            "forward_transfer", "bytes_up", "bytes_down", "wall_seconds", "model_sha256", "state_sha256", "status",
            "undefined"} <= set(summary)  # fmt: skip
    assert summary == result.summary
    assert (summary["status"], summary["num_tasks"], summary["num_clients"], summary["rounds"]) == (
        "done",
        2,
        3,
        4,
    )
    assert summary["wall_seconds"] > 0
    json.loads((folder / "environment.json").read_text())


def test_matrix_file_and_metrics_by_hand(tiny: Tiny) -> None:
    result = tiny({"scenario.tasks": 3, "federation.epochs": 3})
    with (result.folder / "accuracy_matrix.csv").open() as file:
        rows = [[float(cell) for cell in row] for row in csv.reader(file)]
    assert rows == result.matrix
    r = np.array(rows)
    assert r.shape == (3, 3)
    assert ((r >= 0) & (r <= 1)).all()
    s = result.summary
    assert s["average_accuracy"] == pytest.approx(r[2].mean())
    assert s["average_incremental_accuracy"] == pytest.approx(np.mean([r[i, : i + 1].mean() for i in range(3)]))
    assert s["forgetting"] == pytest.approx(np.mean([r[j:2, j].max() - r[2, j] for j in range(2)]))
    assert s["forgetting_first_last"] == pytest.approx(np.mean([r[j, j] - r[2, j] for j in range(2)]))
    assert s["backward_transfer"] == pytest.approx(-s["forgetting_first_last"])


def test_matrix_is_what_the_stored_model_scores(tiny: Tiny) -> None:
    from fedcl.build import build

    result = tiny({"federation.epochs": 3, "data.limit": 30})
    experiment = build(load_config(result.folder / "config.yaml"))
    for j, stage in enumerate(experiment.stream.stages):
        rows = torch.from_numpy(stage.test_ids)
        with torch.no_grad():
            predicted = result.model.double()(experiment.test.batch(rows, torch.float64)).logits.argmax(dim=1)
        truth = experiment.test.label_tensor[rows]
        assert result.matrix[1][j] == pytest.approx((predicted == truth).double().mean().item())


def test_events(tiny: Tiny) -> None:
    result = tiny({"checkpoint.every": 1})
    lines = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert all({"event", "time", "attempt", "task", "round"} <= set(line) for line in lines)
    assert {line["attempt"] for line in lines} == {1}
    assert [(e["task"], e["round"]) for e in lines if e["event"] == "round"] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [e["task"] for e in lines if e["event"] == "task"] == [0, 1]
    assert lines[-1]["event"] == "run_end"
    times = [line["time"] for line in lines]
    assert times == sorted(times)


def test_rounds_file(tiny: Tiny) -> None:
    result = tiny({"evaluate.every": 2, "federation.rounds": 5})
    with (result.folder / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["task"]), int(r["round"])) for r in rows] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert all(0 <= float(r["accuracy_seen"]) <= 1 and float(r["loss"]) > 0 for r in rows)
    assert not (tiny({"name": "none"}).folder / "rounds.csv").exists()
    every = tiny({"evaluate.every": 1, "name": "every"})
    with (every.folder / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(r["bytes_up"]) for r in rows) == every.summary["bytes_up"]
    seen = np.mean(every.matrix[1])  # equally many test images a task
    assert float(rows[-1]["accuracy_seen"]) == pytest.approx(seen, abs=0.02)


def test_undefined_metrics_are_null_and_named(tiny: Tiny) -> None:
    summary = tiny({}).summary
    assert summary["forward_transfer"] is None
    assert summary["validation_accuracy"] is None  # nothing was held out
    assert {"forward_transfer", "validation_accuracy"} <= set(summary["undefined"])
    assert all(summary[name] is not None for name in ("average_accuracy", "forgetting", "backward_transfer"))


def test_a_single_task_has_no_forgetting(tiny: Tiny) -> None:
    summary = tiny({"scenario.tasks": 1}).summary
    names = {"forgetting", "forgetting_first_last", "backward_transfer", "forward_transfer"}
    assert all(summary[name] is None for name in names)
    assert names <= set(summary["undefined"])
    assert summary["average_accuracy"] == summary["average_incremental_accuracy"] is not None


def test_scores_that_are_no_numbers_fail_the_run_without_a_number(tiny_config: TinyConfig, tmp_path: Path) -> None:
    path = tmp_path / "nan_scores.py"
    path.write_text(
        "from fedcl.strategy import Strategy\n"
        "class Broken(Strategy):\n"
        "    name = 'nan_scores'\n"
        "    def predict(self, predictor, x):\n"
        "        scores = predictor.forward(x).logits\n"
        "        return scores * float('nan') if len(predictor.known) > 5 else scores\n"
    )
    config = tiny_config({"strategy": ["nan_scores"], "plugins": [str(path)]})
    with pytest.raises(RunFailed, match="scores of known classes are not a number") as caught:
        run(config)
    assert caught.value.exit_code == 1
    folder = Path(config.output.dir) / "run" / "seed-0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "not a number" in summary["cause"]
    assert not [n for n, v in summary.items() if isinstance(v, float)]
    assert {"average_accuracy", "forgetting"} <= set(summary["undefined"])
    assert load(folder).matrix == []
    events = RunFolder.view(folder).events()
    assert events[-1]["event"] == "failed"


@pytest.mark.parametrize("shape", ["scores[:, :-1]", "scores[:1]", "scores.flatten()"])
def test_scores_of_a_wrong_shape_fail_the_run(tiny_config: TinyConfig, tmp_path: Path, shape: str) -> None:
    name = f"shape_{abs(hash(shape))}"
    path = tmp_path / f"{name}.py"
    path.write_text(
        "from fedcl.strategy import Strategy\n"
        "class Broken(Strategy):\n"
        f"    name = '{name}'\n"
        "    def predict(self, predictor, x):\n"
        "        scores = predictor.forward(x).logits\n"
        f"        return {shape}\n"
    )
    with pytest.raises(RunFailed, match="predict returned scores of shape"):
        run(tiny_config({"strategy": [name], "plugins": [str(path)]}))


# one folder, one run


def test_a_folder_with_a_run_is_refused_and_resume_named(tiny_config: TinyConfig) -> None:
    config = tiny_config({})
    first = run(config)
    before = (first.folder / "summary.json").read_bytes()
    with pytest.raises(UsageError, match="fedcl resume") as caught:
        run(config)
    assert caught.value.exit_code == 2
    assert (first.folder / "summary.json").read_bytes() == before


def test_a_folder_in_which_another_process_works_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from fedcl.run import resume
    from fedcl.tell.progress import QuietProgress

    result = tiny({})
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, pathlib\nfrom fedcl.records.runfolder import RunFolder\n"
         f"with RunFolder.open(pathlib.Path({str(result.folder)!r})):\n"
         "    print('held', flush=True)\n    sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process works in this folder"):
            resume(result.folder, progress=QuietProgress())
        with pytest.raises(UsageError, match=r"another process|resume"):
            execute(load_config(result.folder / "config.yaml"), progress=QuietProgress())
    finally:
        holder.stdin.close()
        assert holder.wait(timeout=60) == 0
        holder.stdout.close()


def test_wrong_settings_leave_no_folder(tiny_config: TinyConfig) -> None:
    config = tiny_config({})
    wrong = replace(config, strategy=["fintune"])
    with pytest.raises(UsageError, match="finetune"):
        run(wrong)
    assert not Path(config.output.dir).exists()
    assert os.listdir(Path(config.output.dir).parent) == []
