"""Each check finds the defect it is there for, and passes a strategy without it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedcl import registry
from fedcl.check import NAMES, check_strategy
from fedcl.check.edges import EDGES
from fedcl.check.target import find_target
from fedcl.commands.cli import run_command_line

HEADER = '''
import random
import numpy
import torch
from dataclasses import dataclass
from fedcl.cards import Card, option
from fedcl.strategy import Finished, Strategy, cross_entropy

def told(**more):
    return Card("Title", "Author", "Venue", 2020, "@misc{x, title={Title}}", "Certain.", **more)

LEFT = []

class Tried(Strategy):
    """A strategy that is tried."""

    name = "tried"
    card = told()

'''
Write = Callable[[str], Any]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """``written(body)``: a strategy class whose body ends with these lines."""
    import textwrap

    def write(body: str) -> Any:
        file = tmp_path / "tried_strategy.py"
        file.write_text(HEADER + textwrap.indent(textwrap.dedent(body), "    "))
        return find_target(f"{file}:Tried")

    return write


COUNTS = """
reductions = {"n": "sum"}
card = told(leaves_client=(("n", "1", "sum", "round"),))
"""
# check: (body that fails it, what is said)
DEFECTS: dict[str, list[tuple[str, str]]] = {
    "card": [
        ("card = None", "card = None; give it a fedcl.cards.Card"),
        ("card = Card('Title')", "bibtex must be an entry"),
        ("name = 'Tried One'", "must be lower case with underscores"),
        ("reductions = {'n': 'sum'}", "reductions has 'n', the card's leaves_client has not"),
        ("card = told(leaves_client=(('n', '1', 'sum', 'round'),))", "leaves_client has 'n', reductions has not"),
    ],
    "options": [
        ("class Options:\n    weight = 1.0", "must be declared as @dataclass(frozen=True)"),
        ("@dataclass(frozen=True)\nclass Options:\n    weight: float = 1.0", "option 'weight' is not described"),
        ("@dataclass(frozen=True)\nclass Options:\n    weight: float", "option 'weight' has no default"),
    ],
    "hooks": [
        ("def end_rounds(self, ctx, trained, steps):\n    return {}, ctx.state", "no hook: 'end_round' is one"),
        ("def loss(self, step, extra):\n    return {}", "loss(self, step, extra) is called as loss(self, step)"),
        ("model_reduction = 'median'", "'model_reduction' has the reduction 'median'"),
    ],
    "runs": [("def loss(self, step):\n    return {'x': step.x}", "loss term 'x' has shape")],
    "share": [
        (
            "def share(self, name, model):\n    LEFT.append(1)\n    return 'private' if len(LEFT) % 2 else 'shared'",
            "same answer",
        ),
        ("def share(self, name, model):\n    return 'frozen'", "nothing to train"),
        ("def share(self, name, model):\n    return 'public'", "allowed are shared, private, frozen"),
    ],
    "uploads": [
        (
            "def end_round(self, ctx, trained, steps):\n    return {'n': torch.tensor(1)}, ctx.state",
            "leaves a client without a declared reduction",
        ),
        (
            "reductions = {'': 'sum', 'n': 'sum'}\n"
            "def end_round(self, ctx, trained, steps):\n    return {'n': torch.tensor(1)}, ctx.state",
            "'n' leaves a client and is not in the card's leaves_client",
        ),
    ],
    "state": [("def begin_task(self, server):\n    return {'seen': [server.task]}", "is list, not a tensor")],
    "inputs": [
        (
            "def end_round(self, ctx, trained, steps):\n"
            "    ctx.received['head.bias'].mul_(1)\n"
            "    return {}, ctx.state",
            "end_round writes into received['head.bias'] in place",
        )
    ],
    "self": [
        ("def begin_task(self, server):\n    self.task = server.task\n    return server.state", "self.task changes"),
        (
            "seen = []\ndef begin_task(self, server):\n    self.seen.append(1)\n    return server.state",
            "Tried.seen changes",
        ),
    ],
    "random": [
        (
            "def loss(self, step):\n    return {'x': 0 * torch.rand(())}",
            "torch's global generator is drawn from in loss",
        ),
        (
            "def prepare(self, batch):\n    random.random()\n    return batch",
            "Python's random is drawn from in prepare",
        ),
        (
            "def __init__(self, options=None):\n    super().__init__(options)\n    numpy.random.rand()",
            "outside of the hooks",
        ),
    ],
    "repeat": [
        (
            "def begin_task(self, server):\n    LEFT.append(1.0)\n    return {'n': torch.tensor(len(LEFT))}",
            "run twice, the server state 'tried/n' differs",
        )
    ],
    "resume": [
        (
            "def after_aggregate(self, server):\n"
            "    self.rounds = getattr(self, 'rounds', 0) + 1\n"
            "    return server.arrays, {'n': torch.tensor(self.rounds)}",
            "interrupted in task 1, round 2, and resumed, the server state 'tried/n' differs",
        )
    ],
    "two nodes": [
        (
            "def end_round(self, ctx, trained, steps):\n"
            "    self.trained = getattr(self, 'trained', 0) + 1\n"
            "    return {}, {'n': torch.tensor(self.trained)}",
            "with the clients on two nodes the state of client 0 'tried/n' differs",
        )
    ],
    "stacked": [
        (
            "stackable = True\n"
            "def loss(self, step):\n"
            "    LEFT.append(1)\n"
            "    return {'x': len(LEFT) * step.output.features.square().mean()}",
            "declared as stackable, but training stacked is not training one by one",
        )
    ],
    "neutral": [
        (
            "neutral = {'weight': 0.0}\n"
            "@dataclass(frozen=True)\nclass Options:\n    weight: float = option(1.0, 'weight')\n"
            "def loss(self, step):\n    return {'x': step.output.features.square().mean()}",
            "some term is not multiplied by its weight",
        ),
        ("neutral = {'wait': 0.0}", "neutral names the option 'wait'"),
    ],
    "choices": [
        (
            "@dataclass(frozen=True)\nclass Options:\n    fast: bool = option(False, 'how')\n"
            "def begin_task(self, server):\n    return {'n': torch.zeros(1) / (0 if self.options.fast else 1)} if not "
            "self.options.fast else 1 / 0",
            "with options.tried.fast=True: strategy 'tried' failed in begin_task",
        )
    ],
    "empty client": [
        ("def begin_task(self, server):\n    assert server.num_clients < 9\n    return {}", "AssertionError")
    ],
    "one class": [
        ("def begin_task(self, server):\n    assert server.new.sum() > 1\n    return server.state", "AssertionError")
    ],
    "one sample": [
        ("def end_round(self, ctx, trained, steps):\n    assert len(ctx.ids) > 1\n    return {}, {}", "AssertionError")
    ],
    "batch of 1": [
        ("def loss(self, step):\n    return {'x': step.output.features.std(dim=0).mean()}", "the loss is not finite")
    ],
    "class never seen": [
        (
            "def end_round(self, ctx, trained, steps):\n    1 / int((ctx.counts > 0).sum() - 1)\n    return {}, {}",
            "Zero",
        )
    ],
    "rare client": [
        ("def after_aggregate(self, server):\n    assert server.task\n    return server.arrays, {}", "AssertionError")
    ],
}
CASES = [(name, body, said) for name, cases in DEFECTS.items() for body, said in cases]


@pytest.mark.parametrize(("name", "body", "said"), CASES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CASES)])
def test_the_check_finds_the_defect(name: str, body: str, said: str, written: Write) -> None:
    report = check_strategy(written(body), only=[name, "runs"] if name in ("state", "uploads") else [name])
    assert [r.name for r in report.failed], report.text()
    text = "; ".join(r.text for r in report.failed)
    assert said in text, text
    assert "\n" not in text
    assert not report.ok


def test_every_check_has_a_defect_that_it_finds() -> None:
    assert set(NAMES) - set(DEFECTS) == {"one class a task"}


def test_a_plain_strategy_passes(written: Write) -> None:
    edges = {edge.name for edge in EDGES}  # those are in the test of the skeleton
    report = check_strategy(written("neutral = {}"), only=[name for name in NAMES if name not in edges])
    assert report.ok, report.text()
    assert [r.name for r in report.results if r.outcome == "skip"] == ["choices"]


def test_what_is_declared_and_never_uploaded_is_said(written: Write) -> None:
    (result,) = check_strategy(written(COUNTS), only=["uploads"]).results
    assert (result.outcome, result.text) == (
        "pass", "nothing beside the model; declared but never uploaded here: n",
    )  # fmt: skip


def test_a_strategy_that_cannot_be_stacked_is_not_blamed(written: Write) -> None:
    body = "def loss(self, step):\n    return {'x': step.x.mean() if step.x.sum().item() else step.x.mean()}"
    (result,) = check_strategy(written(body), only=["stacked"]).results
    assert result.outcome == "skip"
    assert result.text.startswith("clients are trained one by one: ")


def test_checks_leave_nothing_behind(written: Write) -> None:
    import logging

    import torch

    cls = written("")
    names, before = registry.names("strategies"), torch.get_rng_state()
    check_strategy(cls, only=["random", "neutral", "two nodes"])
    assert registry.names("strategies") == names
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.root.manager.disable == 0


def test_settings_of_the_class_and_of_the_user_are_used(written: Write) -> None:
    body = """
    tried_with = {"model.name": "tiny_vit", "model.norm": "default", "model.dropout": 0.0}

    def begin_task(self, server):
        assert "Transformer" in repr(server.model) or "attention" in repr(server.model).lower()
        return server.state
    """
    assert check_strategy(written(body), only=["runs"]).ok
    assert not check_strategy(written(body), {"model.name": "mlp"}, only=["runs"]).ok


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tried_module.py").write_text(
        HEADER + "    neutral = {}\n\nclass Other(Strategy):\n    name = 'other'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "tried_module"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("tried_module:Tryed", "has no 'Tryed'. Did you mean 'tried_module:Tried'?"),
        ("tried_module:LEFT", "names no class"),
        ("tried_module:Card", "Card is no strategy, scenario or partition"),
        ("fedprocks", "Did you mean 'fedprox'?"),
        ("nowhere.py", "TARGET='nowhere.py': there is no such file"),
        ("tried_module.py", "has several classes, name one: tried_module.py:Tried, tried_module.py:Other"),
    ],
)
def test_wrong_targets(target: str, said: str, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["check", target]) == 2
    assert said in capsys.readouterr().err


def test_the_command(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["check", f"{module}:Tried", "--only", "card,runs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], [c["outcome"] for c in found["checks"]]) == (True, ["pass", "pass"])
    assert run_command_line(["check", f"{module}:Other", "--only", "card"]) == 1
    assert "FAIL  card              the class has no docstring" in capsys.readouterr().out
    assert run_command_line(["check", f"{module}:Tried", "--only", "cart"]) == 2
    assert "Did you mean 'card'?" in capsys.readouterr().err
    for wrong, said in (("optimiser.ir=1", "did you mean 'optimiser.lr'"), ("optimiser.lr=x", "a finite number")):
        assert run_command_line(["check", f"{module}:Tried", wrong, "--only", "runs"]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert not captured.out
    assert isinstance(sys.modules[module], ModuleType)
