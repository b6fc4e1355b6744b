"""Whole runs: repetition, agreement with plain centralised training, settings, and every file of the run folder."""

from __future__ import annotations

import csv
import json
import math
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
import torch.nn.functional as F

from fedcl.config import Config, load_config
from fedcl.errors import RunFailed, UsageError
from fedcl.run import execute, load, run
from fedcl.runfolder import RunFolder

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], Config]
HASHES = ("model_sha256", "state_sha256", "split_sha256")
STACK = {
    "strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning", "replay"],
    "federation.batch_min": 2,
}


def hashes(result: RunResult) -> list[str]:
    return [result.summary[name] for name in HASHES]


def without_time(result: RunResult) -> dict[str, Any]:
    return {n: v for n, v in result.summary.items() if n != "wall_seconds"}


# the same numbers again


@pytest.mark.parametrize("stack", [{"strategy": ["finetune"]}, STACK, {"strategy": ["replay", "fedewc"]}])
def test_same_seed_same_bits_other_seed_other_bits(tiny: Tiny, stack: dict[str, Any]) -> None:
    one, again, other = tiny(stack), tiny(stack), tiny({**stack, "seed": 1})
    assert without_time(one) == without_time(again)
    assert one.matrix == again.matrix
    stateless = stack["strategy"] == ["finetune"]
    for name in HASHES:
        assert (one.summary[name] != other.summary[name]) or (stateless and name == "state_sha256")


def test_the_stored_config_repeats_the_run(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny({**STACK, "engine.threads": 0, "engine.device": "auto", "engine.dtype": "float32"})
    stored = load_config(first.folder / "config.yaml")
    assert stored.engine.threads > 0
    assert "auto" not in (stored.engine.device, stored.engine.path, stored.engine.memory_format)
    again = run(first.folder / "config.yaml", overrides={"output.dir": str(tmp_path / "again")})
    assert without_time(again) == without_time(first)


@pytest.mark.slow
def test_the_command_line_repeats_a_stored_config(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny({"strategy": ["replay"]})
    command = [
        sys.executable,
        "-m",
        "fedcl",
        "run",
        str(first.folder / "config.yaml"),
        "--out",
        str(tmp_path / "cli"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    again = json.loads(done.stdout)
    assert [again[name] for name in HASHES] == hashes(first)


def test_what_is_not_a_setting_of_the_numbers_changes_none(tiny: Tiny) -> None:
    plain = tiny({})
    for other in ({"evaluate.every": 1}, {"checkpoint.every": 1}, {"evaluate.batch_size": 3}, {"name": "b"}):
        assert hashes(tiny(other)) == hashes(plain), other


# one client is plain training


def literal_training(config: Config) -> dict[str, torch.Tensor]:
    """Cross entropy on an mlp in a plain PyTorch loop with torch's own modules and SGD.

    Only what is random is taken from the engine: initial values, the split and the order of the images.
    """
    from fedcl.build import build
    from fedcl.training import plan

    experiment = build(config)
    node, stages = experiment.node, experiment.stream.stages
    linear, head = torch.nn.Linear(64, 8).double(), None
    linear.load_state_dict(
        {
            n.removeprefix("encoder.1.").removeprefix("encoder.0."): a
            for n, a in experiment.initial.items()
            if n.startswith("encoder.")
        }
    )
    store = node.store
    for task, stage in enumerate(stages):
        width = len(experiment.stream.known(task))
        grown = torch.nn.Linear(8, width).double()
        with torch.no_grad():
            for name, parameter in grown.named_parameters():
                parameter.copy_(node.grown(f"head.{name}", experiment.initial[f"head.{name}"], width, "initial"))
                if head is not None:
                    parameter[: len(head.bias)] = dict(head.named_parameters())[name]
        head = grown
        ids = torch.from_numpy(experiment.split.train[task][0])
        assert sorted(ids.tolist()) == sorted(stage.train_ids.tolist())
        for round_ in range(config.federation.rounds):
            parameters = [*linear.parameters(), *head.parameters()]
            optimiser = torch.optim.SGD(parameters, lr=config.optimiser.lr, momentum=0.9, weight_decay=1e-3)
            batches, _ = plan(len(ids), config, (config.seed, "client", 0, task, round_))
            for picked in batches:
                rows = ids[picked]
                x, y = store.batch(rows, torch.float64), store.label_tensor[rows]
                logits = head(F.relu(linear(x.flatten(1))))
                optimiser.zero_grad()
                F.cross_entropy(logits, y).backward()
                optimiser.step()
    assert head is not None
    return {"encoder": linear.weight.detach(), "head": head.weight.detach(), "bias": head.bias.detach()}


def test_one_client_is_plain_centralised_training(tiny: Tiny) -> None:
    overrides = {
        "federation.clients": 1,
        "federation.epochs": 3,
        "data.limit": 40,
        "optimiser.weight_decay": 1e-3,
    }
    result = tiny(overrides)
    expected = literal_training(load_config(result.folder / "config.yaml"))
    arrays = dict(result.model.named_parameters())
    weight = next(a for n, a in arrays.items() if n.startswith("encoder.") and n.endswith("weight"))
    assert (weight - expected["encoder"]).abs().max() < 1e-8
    assert (arrays["head.weight"] - expected["head"]).abs().max() < 1e-8
    assert (arrays["head.bias"] - expected["bias"]).abs().max() < 1e-8
    assert (
        hashes(tiny({**overrides, "strategy": ["joint"], "scenario.tasks": 1}))[0]
        == hashes(tiny({**overrides, "scenario.tasks": 1}))[0]
    )


# federation and optimiser settings


def test_partial_participation_samples_the_stated_cohort(tiny: Tiny) -> None:
    result = tiny({"federation.clients": 6, "federation.participation": 0.5, "federation.rounds": 4})
    rounds = [e for e in RunFolder.view(result.folder).events() if e["event"] == "round"]
    assert [e["clients"] for e in rounds] == [3] * 8
    assert len({e["samples"] for e in rounds}) > 2  # other clients each time
    assert tiny({"federation.clients": 6, "federation.participation": 0.01}).summary["bytes_up"] > 0  # never nobody


def test_steps_in_place_of_epochs(tiny: Tiny) -> None:
    result = tiny({"federation.epochs": None, "federation.steps": 7})
    rounds = [e for e in RunFolder.view(result.folder).events() if e["event"] == "round"]
    assert [e["steps"] for e in rounds] == [3 * 7] * 4


def test_uniform_weighting_differs_from_weighting_by_samples(tiny: Tiny) -> None:
    assert hashes(tiny({"federation.weighting": "uniform"}))[0] != hashes(tiny({}))[0]
    one = {"federation.clients": 1}
    pair = [tiny({**one, "federation.weighting": w}).model.state_dict() for w in ("uniform", "samples")]
    assert all(torch.allclose(pair[0][n], pair[1][n], rtol=1e-10, atol=1e-12) for n in pair[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"optimiser.name": "adam", "optimiser.lr": 0.01},
        {"optimiser.name": "adamw", "optimiser.lr": 0.01, "optimiser.weight_decay": 0.1},
        {"optimiser.nesterov": True},
        {"optimiser.clip": 0.01},
        {"optimiser.schedule": "cosine", "optimiser.per": "step"},
        {"optimiser.schedule": "linear", "optimiser.per": "round"},
        {"optimiser.schedule": "step", "optimiser.milestones": [1], "optimiser.per": "task"},
        {"optimiser.warmup": 2},
    ],
)
def test_each_optimiser_setting_runs_and_acts(tiny: Tiny, settings: dict[str, Any]) -> None:
    result = tiny({**settings, "name": "it"})
    assert result.summary["status"] == "done"
    assert hashes(result)[0] != hashes(tiny({}))[0]


def test_a_schedule_over_rounds_is_the_stated_rate(tiny: Tiny) -> None:
    """With linear decay to 0 over one round a task of two, the second round trains at half the rate."""
    linear = tiny(
        {"optimiser.schedule": "linear", "federation.clients": 1, "scenario.tasks": 1, "federation.rounds": 1}
    )
    constant = tiny({"federation.clients": 1, "scenario.tasks": 1, "federation.rounds": 1})
    assert hashes(linear)[0] == hashes(constant)[0]  # the first round has the whole rate


# the run folder


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


# a start from elsewhere


def test_init_from_another_runs_base_session(tiny: Tiny) -> None:
    from safetensors.torch import load_file

    base = tiny({"name": "base"})
    encoder = load_file(base.folder / "base.safetensors")
    settings = {
        "federation.participation": 0.34,
        "federation.rounds": 1,
        "optimiser.lr": 1e-30,
        "scenario.tasks": 1,
    }
    started = tiny({**settings, "init": f"{base.folder}@task0"})
    arrays = started.model.state_dict()
    for name in (n for n in encoder if n.startswith("encoder.")):
        assert torch.allclose(arrays[name], encoder[name], atol=1e-20)
    assert not torch.allclose(arrays["head.weight"][:5], encoder["head.weight"])  # the head is the run's own
    assert (
        hashes(tiny({**settings, "init": str(base.folder / "base.safetensors"), "name": "f"}))[0] == hashes(started)[0]
    )
    final = tiny({**settings, "init": str(base.folder), "name": "g"})
    assert hashes(final)[0] != hashes(started)[0]  # a folder alone is its last state


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere@task0", "does not exist"),
        ("nowhere.safetensors", "does not exist"),
        ("nowhere@task3", "RUN@task0"),
    ],
)
def test_init_from_nowhere_is_a_usage_error(tiny: Tiny, source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        tiny({"init": source})
    assert caught.value.key == "init"


def test_init_of_another_width_is_a_usage_error(tiny: Tiny) -> None:
    base = tiny({"name": "base"})
    with pytest.raises(UsageError, match="shape"):
        tiny({"init": f"{base.folder}@task0", "model.width": 16})


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
    from fedcl.progress import QuietProgress
    from fedcl.run import resume

    result = tiny({})
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, pathlib\nfrom fedcl.runfolder import RunFolder\n"
         f"with RunFolder.open(pathlib.Path({str(result.folder)!r})):\n    print('held', flush=True)\n    sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process works in this folder"):
            resume(result.folder, progress=QuietProgress())
        with pytest.raises(UsageError, match="another process|resume"):
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


def test_summary_numbers_are_finite(tiny: Tiny) -> None:
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for v in value.values():
                walk(v)
        elif isinstance(value, list):
            for v in value:
                walk(v)
        elif isinstance(value, float):
            assert math.isfinite(value)

    walk(tiny({**STACK, "partition.test": "same_mix"}).summary)
