"""Callbacks: what they are told, how they stop a run, what happens when they fail; they change no number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.config import load_config
from fedcl.errors import RunFailed, UsageError
from fedcl.run import execute, load, resume
from fedcl.tell.callbacks import Callback, Event, load_callbacks, numbers_of
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config

Make = Callable[[Mapping[str, Any]], "Config"]
HASHES = ("model_sha256", "state_sha256")


class Noting(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Event] = []

    def run_start(self, event: Event) -> None:
        self.told.append(event)

    round_done = task_done = run_end = run_start


class Listening(QuietProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_what_a_callback_is_told(tiny_config: Make) -> None:
    noting = Noting()
    result = execute(tiny_config({"evaluate.every": 2}), progress=QuietProgress(), callbacks=[noting])
    told = noting.told
    assert [(e.kind, e.step, e.task, e.round) for e in told] == [
        ("run_start", 0, None, None), ("round", 1, 0, 0), ("round", 2, 0, 1), ("task", 2, 0, None),
        ("round", 3, 1, 0), ("round", 4, 1, 1), ("task", 4, 1, None), ("run_end", 4, None, None),
    ]  # fmt: skip
    assert "accuracy_seen" not in told[1].metrics
    assert told[2].metrics["accuracy_seen"] == events(result.folder, "round")[1]["accuracy_seen"]
    assert told[1].metrics["losses/task"] == events(result.folder, "round")[0]["losses"]["task"]
    assert told[3].metrics["accuracy/task_1"] == result.matrix[0][0]
    assert told[-1].metrics["average_accuracy"] == result.summary["average_accuracy"]
    assert (told[-1].status, told[0].status) == ("done", "")
    assert told[0].settings["federation"]["rounds"] == 2
    assert {e.folder for e in told} == {result.folder}
    assert all(isinstance(v, float) for e in told for v in e.metrics.values())


def test_callbacks_change_no_number(tiny_config: Make) -> None:
    def greedy(event: Event) -> tuple[bool, dict[str, float]]:
        event.metrics.clear()
        event.settings.clear()
        return False, {"own": 1}

    stack = {"strategy": ["replay"]}
    plain = execute(tiny_config(stack), progress=QuietProgress())
    watched = execute(tiny_config(stack), progress=QuietProgress(), callbacks=[Noting(), greedy])
    assert [watched.summary[h] for h in HASHES] == [plain.summary[h] for h in HASHES]
    assert watched.matrix == plain.matrix


@pytest.mark.parametrize(("at", "place", "rows"), [(3, "after task 2, round 1", 1), (2, "after task 1, round 2", 0)])
def test_a_callback_stops_a_run_and_it_goes_on(at: int, place: str, rows: int, tiny_config: Make) -> None:
    def enough(event: Event) -> bool:
        return event.kind == "round" and event.step == at

    whole = execute(tiny_config({}), progress=QuietProgress())
    said = Listening()
    result = execute(tiny_config({}), progress=said, callbacks=[enough])
    assert (result.summary["status"], len(result.matrix)) == ("stopped", rows)
    assert result.summary["average_accuracy"] is None
    assert result.summary["cause"].endswith(f"enough asked to stop {place}")
    assert said.messages[-1] == f"{result.summary['cause']}; go on with: fedcl resume {result.folder}"
    assert load(result.folder).matrix == result.matrix
    # Told of the same round again it would stop for ever.
    again = resume(result.folder, progress=QuietProgress(), callbacks=[enough])
    assert again.summary["status"] == "done"
    assert [again.summary[h] for h in HASHES] == [whole.summary[h] for h in HASHES]
    assert again.matrix == whole.matrix


def test_a_stop_at_the_end_is_the_end(tiny_config: Make) -> None:
    result = execute(
        tiny_config({}), progress=QuietProgress(), callbacks=[lambda event: event.kind == "task" and event.task == 1]
    )
    assert result.summary["status"] == "done"


def test_own_metrics_are_logged_and_told_to_those_that_follow(tiny_config: Make) -> None:
    noting = Noting()

    def gap(event: Event) -> tuple[bool, dict[str, float]]:
        return False, {"gap": event.step / 2}

    result = execute(tiny_config({"federation.rounds": 1}), progress=QuietProgress(), callbacks=[gap, noting])
    assert [e.metrics["gap"] for e in noting.told] == [0.0, 0.5, 0.5, 1.0, 1.0, 1.0]
    logged = [(e["about"], e["task"], e["round"], e["metrics"]) for e in events(result.folder, "callback")]
    assert logged[1:3] == [("round", 0, 0, {"gap": 0.5}), ("task", 0, None, {"gap": 0.5})]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("1 / 0", r"failed in round_done: ZeroDivisionError: division by zero \(test_callbacks.py, line \d+\)"),
        ("'yes'", "returned str: 'yes'; it may return None, True"),
        ("(False, {'x': float('nan')})", "returned the metric 'x' = nan; it must be a finite number"),
        ("(False, {'samples': 1})", "returned a metric 'samples', a name that is taken"),
    ],
)
def test_a_callback_that_fails_is_named_and_the_run_goes_on_later(answer: str, said: str, tiny_config: Make) -> None:
    answers = {"1 / 0": lambda: 1 / 0}

    def wrong(event: Event) -> Any:
        if event.kind == "round" and event.step == 3:
            return answers.get(answer, lambda: eval(answer))()
        return None

    config = tiny_config({})
    with pytest.raises(RunFailed, match=rf"^callback \S*wrong {said}"):
        execute(config, progress=QuietProgress(), callbacks=[wrong])
    folder = Path(config.output.dir) / "run" / "seed-0"
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert (folder / "checkpoints").is_dir()
    again = resume(folder, progress=QuietProgress())
    whole = execute(tiny_config({}), progress=QuietProgress())
    assert [again.summary[h] for h in HASHES] == [whole.summary[h] for h in HASHES]


def test_every_callback_hears_of_the_end_and_the_first_cause_is_told(tiny_config: Make) -> None:
    noting, said = Noting(), Listening()

    def late(event: Event) -> None:
        if event.kind != "run_start":
            raise ValueError(event.kind)

    with pytest.raises(RunFailed, match="late failed in round_done: ValueError: round"):
        execute(tiny_config({}), progress=said, callbacks=[late, noting])
    assert [e.kind for e in noting.told] == ["run_start", "run_end"]
    assert noting.told[-1].status == "failed"
    assert "late failed in run_end: ValueError: run_end" in said.messages[-1]


MODULE = """
from fedcl import Callback

SEEN = []

def see(event):
    SEEN.append(event.kind)

class Counting(Callback):
    def round_done(self, event):
        SEEN.append("counted")

class Unmakeable(Callback):
    def __init__(self, needed):
        pass

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_callbacks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_callbacks"


def test_callbacks_by_dotted_name(module: str, tiny_config: Make) -> None:
    import importlib

    config = tiny_config({"output.callbacks": [f"{module}:see", f"{module}:Counting"], "federation.rounds": 1})
    result = execute(config, progress=QuietProgress())
    seen = importlib.import_module(module).SEEN
    assert seen == ["run_start", "round", "counted", "task", "round", "counted", "task", "run_end"]
    assert load_config(result.folder / "config.yaml").output.callbacks == config.output.callbacks


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_callbacks:sea", "has no 'sea'. Did you mean 'own_callbacks:see'?"),
        ("own_callback:see", "there is no module own_callback."),
        ("needs_more:see", "needs_more fails to import: ModuleNotFoundError: No module named 'nowhere'"),
        ("own_callbacks", "must be the dotted name of a function"),
        ("own_callbacks:number", "must be the dotted name of a function"),
        ("own_callbacks:Unmakeable", "cannot be made: TypeError"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(name: str, said: str, module: str, tiny_config: Make) -> None:
    Path("needs_more.py").write_text("import nowhere\n")
    config = tiny_config({"output.callbacks": [name]})
    with pytest.raises(UsageError, match=r"^output.callbacks=") as caught:
        execute(config, progress=QuietProgress())
    assert said in str(caught.value)
    assert not Path(config.output.dir).exists()


def test_numbers_of_leaves_out_what_is_no_number() -> None:
    record = {"event": "round", "task": 1, "a": None, "b": True, "c": [1], "d": 2, "e": {"f": 0.5, "g": None}}
    assert numbers_of(record) == {"d": 2.0, "e/f": 0.5}


def test_what_is_given_must_be_callable() -> None:
    from fedcl.config import Output

    with pytest.raises(UsageError, match="must be a function of an event"):
        load_callbacks(Output(), [3])  # type: ignore[list-item]


def test_a_stopped_run_on_the_command_line(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedcl.commands.cli import run_command_line

    (tmp_path / "own_stop.py").write_text("def stop(event):\n    return event.kind == 'round'\n")
    command = ["run", "output.callbacks=own_stop:stop", "federation.rounds=2", "scenario.tasks=2", "data.limit=12",
               "engine.threads=1", "strategy=finetune", "output.plots=false", "--out", "runs", "--quiet"]  # fmt: skip
    assert run_command_line(command) == 0
    shown = capsys.readouterr().out
    assert "callback own_stop:stop asked to stop after task 1, round 1" in shown
    assert "fedcl resume" in shown
    assert "average accuracy" not in shown
