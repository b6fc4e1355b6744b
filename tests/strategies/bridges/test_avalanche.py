"""Any plugin of Avalanche's by name: when its hooks are called, and what is refused."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedcl.config import Config
from fedcl.errors import Interrupted, RunFailed, UsageError
from fedcl.federation.server import Federation
from fedcl.run import RunResult, execute, resume
from fedcl.tell.progress import QuietProgress

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]

PROBE = """
from avalanche.training.plugins import SupervisedPlugin

SEEN = []


class Probe(SupervisedPlugin):
    def __init__(self, weight=0.0):
        super().__init__()
        self.weight, self.tasks = weight, 0

    def note(self, event, strategy):
        x, y, _ = strategy.experience.dataset[0]
        done = strategy.clock.train_exp_counter
        SEEN.append((event, done, self.tasks, len(strategy.experience.dataset), str(x.dtype)))

    def before_training_exp(self, strategy, **kwargs):
        self.note("begin", strategy)

    def after_training_epoch(self, strategy, **kwargs):
        self.note("epoch", strategy)

    def before_backward(self, strategy, **kwargs):
        strategy.loss += self.weight * self.tasks * strategy.mb_output.square().mean()

    def after_training_exp(self, strategy, **kwargs):
        self.note("end", strategy)
        self.tasks += 1
"""
PLUGIN = "options.avalanche.plugin"
ARGUMENTS = "options.avalanche.arguments"


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a run with a plugin that has no adapter."""
    name = f"probe_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    return {"strategy": ["avalanche"], PLUGIN: f"{name}.Probe", ARGUMENTS: {}}


def noted(settings: Mapping[str, Any]) -> list[Any]:
    seen: list[Any] = importlib.import_module(settings[PLUGIN].rpartition(".")[0]).SEEN
    return seen


def test_an_experience_is_a_task_of_the_client(tiny: Run, probe: dict[str, Any]) -> None:
    result = tiny({**probe, "federation.clients": 1, "partition.min_size": 1, "federation.epochs": 2})
    one_task = ["begin", "epoch", "epoch", "epoch", "epoch", "end"]
    seen = noted(probe)
    assert [event for event, *_ in seen] == one_task * 2
    assert [(counter, tasks) for _, counter, tasks, *_ in seen] == [(0, 0)] * 6 + [(1, 1)] * 6
    assert {(n, dtype) for *_, n, dtype in seen} == {(60, "torch.uint8")}
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    rounds = [e for e in events if e["event"] == "round"]
    assert [e["steps"] for e in rounds] == [16] * 4  # two epochs of 60 images in batches of 8
    with (result.folder / "costs.csv").open() as lines:
        costs = [(row["steps"], row["flops"]) for row in csv.DictReader(lines) if row["round"]]
    assert [flops for steps, flops in costs if steps == "16"] == [""] * 4  # unknown, which is not none
    assert all(e["losses"]["task"] > 0 and e["losses"]["avalanche.plugin"] == 0 for e in rounds)


def test_a_plugin_without_adapter_keeps_its_state_in_the_process(tiny: Run, oracle: ModuleType, probe: Any) -> None:
    averaged = oracle.final(tiny({"strategy": ["finetune"]}))
    assert oracle.distance(oracle.final(tiny(probe)), averaged) < 1e-9
    strong = {**probe, ARGUMENTS: {"weight": 1.0}}
    one, two = (oracle.final(tiny(strong)) for _ in range(2))
    assert oracle.distance(one, averaged) > 1e-3  # its count of tasks has reached the second task
    assert oracle.distance(one, two) == 0.0


def test_the_steps_of_a_round_can_be_set(tiny: Run, oracle: ModuleType) -> None:
    settings = {"federation.steps": 3, "federation.epochs": None}
    ours = tiny({"strategy": ["avalanche"], ARGUMENTS: {"ewc_lambda": 0.0}, **settings})
    assert oracle.distance(oracle.final(ours), oracle.final(tiny({"strategy": ["finetune"], **settings}))) < 1e-9
    replayed = tiny({"strategy": ["avalanche_replay"], **settings})
    lines = (replayed.folder / "events.jsonl").read_text().splitlines()
    assert [e["steps"] for e in map(json.loads, lines) if e["event"] == "round"] == [9] * 4


def test_a_plugin_of_avalanches_without_adapter_runs(tiny: Run, oracle: ModuleType) -> None:
    settings = {"strategy": ["avalanche"], PLUGIN: "avalanche.training.plugins.GEMPlugin"}
    result = tiny({**settings, ARGUMENTS: {"patterns_per_experience": 8, "memory_strength": 0.5}})
    assert oracle.distance(oracle.final(result), oracle.final(tiny({"strategy": ["finetune"]}))) > 1e-4


def test_resuming_a_plugin_without_adapter_is_refused(
    tiny_config: Configure, probe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Federation.finish_task

    def stopped(self: Any, state: Any) -> Any:
        if state.task == 1:
            raise KeyboardInterrupt
        return finish(self, state)

    config = tiny_config({**probe, "checkpoint.every": 1})
    with monkeypatch.context() as patched:
        patched.setattr(Federation, "finish_task", stopped)
        with pytest.raises(Interrupted):
            execute(config, progress=QuietProgress())
    folder = next(p.parent for p in Path(config.output.dir).rglob("config.yaml"))
    with pytest.raises(RunFailed, match=r"Probe has no state adapter, so that a run with it cannot be resumed"):
        resume(folder, progress=QuietProgress())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({PLUGIN: "avalanche.training.plugins.Nobody"}, "has no 'Nobody'"),
        ({PLUGIN: "torch.nn.Linear"}, "is no plugin of Avalanche's"),
        ({ARGUMENTS: {"lambda": 1}}, "cannot be made of these arguments"),
        ({"strategy": ["avalanche", "fedprox"]}, r"without fedprox \(its loss\): avalanche trains by"),
        ({"model.norm": "batch", "model.batch_norm": "local"}, "average or frozen"),
        ({"engine.dtype": "bf16"}, "float32 or float64"),
        ({"federation.passes": "once"}, "for its plugin, at the end of the task"),
        ({PLUGIN: "avalanche.training.plugins.GEMPlugin", "engine.runtime": "ray",
          ARGUMENTS: {"patterns_per_experience": 8, "memory_strength": 0.5}}, "nothing carries the state of GEMPlugin"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(tiny: Run, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tiny({"strategy": ["avalanche"], **settings})


def test_strategies_of_the_server_can_be_stacked(tiny: Run) -> None:
    by_means = tiny({"strategy": ["avalanche_ewc", "nearest_mean"], "data.limit": 40})
    assert by_means.summary["average_accuracy"] > tiny({"strategy": ["avalanche_ewc"]}).summary["average_accuracy"]
