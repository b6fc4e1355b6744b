"""Strategies that cannot be trained stacked: found out before the first round, told, and trained one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import RunFailed
from fedcl.records.checkpoint import load_newest
from fedcl.run import execute, resume
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

TinyConfig = Callable[[Mapping[str, Any]], "Config"]

MASK = """
    def loss(self, step):
        hard = step.output.logits[step.y > 2]
        return {"hard": (hard**2).sum()}
"""
BRANCH = """
    def loss(self, step):
        if step.y[0] > 2:
            return {"first": step.params["head.weight"].pow(2).sum()}
        return {"first": step.params["head.weight"].abs().sum()}
"""
LEAK = """
    def loss(self, step):
        kept = self.kept if int(step.index) else step.params["head.weight"]
        self.kept = step.params["head.weight"].detach()
        return {"drift": (step.params["head.weight"] - kept).pow(2).sum()}
"""
HIDDEN_LEAK = """
    reductions = {"mean": "mean"}

    def loss(self, step):
        self.notes = {"last": [step.x.detach()]}
        return {}

    def end_round(self, ctx, trained, steps):
        return {"mean": self.notes["last"][0].mean()}, ctx.state
"""
COUNTING = """
    calls = 0

    def loss(self, step):
        self.calls += 1
        return {"growing": self.calls * step.params["head.weight"].pow(2).sum()}
"""
SOME_HAVE_STATE = """
    def loss(self, step):
        if "drift" not in step.state:
            return {"drift": 0.0 * step.params["head.weight"].sum()}
        return {"drift": step.state["drift"] * step.params["head.weight"].pow(2).sum()}

    def end_round(self, ctx, trained, steps):
        return {}, {"drift": torch.tensor(0.1 * (ctx.client + 1), dtype=torch.float64)}
"""


class Listening(QuietProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def events(result: RunResult, kind: str) -> list[dict[str, Any]]:
    lines = (result.folder / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def hashes(result: RunResult) -> tuple[str, str]:
    return result.summary["model_sha256"], result.summary["state_sha256"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (MASK, "vmap"),
        (BRANCH, "vmap|data-dependent"),
        (LEAK, "keeps a tensor of a step in self.kept"),
        (HIDDEN_LEAK, "keeps a tensor of a step in self.notes"),
        (COUNTING, "after one step|the loss"),
    ],
    ids=["mask", "branch", "leak", "hidden leak", "silently different"],
)
def test_a_strategy_that_cannot_be_stacked_goes_on_one_by_one(
    body: str, why: str, plugin: Any, tiny_config: TinyConfig
) -> None:
    settings = plugin(body)
    alone = execute(tiny_config(settings), progress=QuietProgress())
    listener = Listening()
    together = execute(tiny_config({**settings, "engine.path": "stacked"}), progress=listener)
    assert hashes(together) == hashes(alone)
    assert together.matrix == alone.matrix
    changed = events(together, "engine")
    assert [(c["path"], c["task"], c["round"]) for c in changed] == [("sequential", 0, 0)]
    assert re.search(why, changed[0]["why"]), changed[0]["why"]
    told = [m for m in listener.messages if "clients one by one" in m]
    assert len(told) == 1
    assert changed[0]["why"] in told[0]
    assert "\n" not in told[0]
    assert events(alone, "engine") == []


def test_a_strategy_that_can_be_stacked_is(plugin: Any, tiny_config: TinyConfig) -> None:
    settings = plugin("""
    def loss(self, step):
        return {"decay": step.params["head.weight"].pow(2).sum()}
    """)
    together = execute(tiny_config({**settings, "engine.path": "stacked"}), progress=QuietProgress())
    assert events(together, "engine") == []


def test_clients_of_which_only_some_have_a_state(plugin: Any, tiny_config: TinyConfig) -> None:
    """In the first round none has one, so that the trial sees nothing; later some have taken part already."""
    settings = plugin(
        SOME_HAVE_STATE,
        **{"federation.clients": 6, "federation.participation": 0.5, "federation.rounds": 4, "scenario.tasks": 1},
    )
    alone = execute(tiny_config(settings), progress=QuietProgress())
    together = execute(tiny_config({**settings, "engine.path": "stacked"}), progress=QuietProgress())
    first, second = alone.model.state_dict(), together.model.state_dict()
    for name, array in first.items():
        assert (second[name] - array).norm() <= 1e-8 * array.norm(), name
    changed = events(together, "engine")
    assert [c["path"] for c in changed] == ["sequential"]
    assert changed[0]["round"] > 0
    assert "'drift'" in changed[0]["why"]


@pytest.mark.parametrize("body", [MASK, LEAK, COUNTING], ids=["mask", "leak", "silently different"])
def test_a_strategy_that_says_it_can_be_stacked_but_cannot(body: str, plugin: Any, tiny_config: TinyConfig) -> None:
    settings = plugin("    stackable = True\n" + body)
    config = tiny_config({**settings, "engine.path": "stacked"})
    with pytest.raises(RunFailed, match=r"finetune|probe") as caught:
        execute(config, progress=QuietProgress())
    text = str(caught.value)
    assert settings["strategy"][0] in text
    assert "declared as stackable, but training stacked is not training one by one" in text
    assert text.endswith("engine.path=sequential goes on without")
    assert "\n" not in text
    assert caught.value.exit_code == 1


def test_stragglers_that_take_no_step_are_tried_out_all_the_same(plugin: Any, tiny_config: TinyConfig) -> None:
    late = {"time.stragglers": 1.0, "time.straggler_policy": "drop", "partition.name": "iid", "federation.rounds": 1}
    run = execute(tiny_config(plugin(COUNTING, **late, **{"engine.path": "stacked"})), progress=QuietProgress())
    assert [(c["path"], c["task"]) for c in events(run, "engine")] == [("sequential", 0)]


def test_a_resumed_run_stays_one_by_one(plugin: Any, tiny_config: TinyConfig, children: Any) -> None:
    settings = plugin(MASK, **{"engine.path": "stacked", "federation.rounds": 3, "checkpoint.every": 1})
    whole = execute(tiny_config(settings), progress=QuietProgress())
    config = tiny_config(settings)
    folder = Path(config.output.dir) / config.name / f"seed-{config.seed}"
    # Interrupted in the second round of a task: the strategy is tried out in first rounds only.
    fault = {"functions": ["fedcl.federation.server:merge_measured"], "at": 2, "match": "'engine'", "action": "kill"}
    answer = children.start({"settings": asdict(config), "faults": [fault]})
    assert answer["signal"] == 9
    found = load_newest(folder / "checkpoints", lambda text: None)
    assert found is not None
    assert found.meta["state"]["engine"] == {"path": "sequential"}
    assert (found.meta["state"]["task"], found.meta["state"]["round"]) == (0, 1)
    again = resume(folder, progress=QuietProgress())
    assert hashes(again) == hashes(whole)
    assert len(events(again, "engine")) == 1
