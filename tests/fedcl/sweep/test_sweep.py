"""Real sweeps in worker processes: the same bits as single runs, killed and stopped workers, going on, skipping."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedcl.commands.cli import run_command_line
from fedcl.config import load_config, to_yaml
from fedcl.errors import Interrupted, RunFailed, UsageError
from fedcl.records.runs import find_runs
from fedcl.run import execute
from fedcl.sweep import command
from fedcl.sweep.board import Board
from fedcl.sweep.command import dry_run, sweep
from fedcl.sweep.job import Job, Outcome, perform
from fedcl.sweep.machine import Room
from fedcl.sweep.pool import Pool
from fedcl.sweep.prepare import Asked, prepare
from fedcl.sweep.table import Swept
from fedcl.sweep.worker import Worker
from fedcl.tell.progress import QuietProgress

PLUGIN = '''
import os
import signal
from pathlib import Path

from fedcl.strategy import Strategy


class Fragile(Strategy):
    """Kills its process, or fails, in its third round where a file says so."""

    name = "fragile"

    def check(self, config, stream, split):
        self.place = Path(os.environ["FRAGILE"]) / f"{config.name}-{config.seed}"

    def after_aggregate(self, server):
        said = self.place.read_text() if server.task == 1 and self.place.exists() else ""
        if said == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if said == "fail":
            raise ValueError("as asked for")
        return super().after_aggregate(server)
'''


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file ``NAME-SEED`` here says what a run of ``fragile`` does: kill or fail."""
    folder = tmp_path_factory.mktemp("faults")
    os.environ["FRAGILE"] = str(folder)
    yield folder
    del os.environ["FRAGILE"]


@pytest.fixture(scope="module")
def pool(faults: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One worker that stays from test to test: importing torch and Avalanche takes seconds."""
    logs = tmp_path_factory.mktemp("logs")
    with (logs / "lock").open("w") as kept, Pool(Room(1, 1, None), logs, kept.fileno()) as workers:
        yield workers


@pytest.fixture
def warm(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of this test use the worker that is there, and leave it."""
    stay_warm(pool, monkeypatch)


def stay_warm(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept:
        title = "the worker that is there"
        run = pool.run

        def close(self) -> None:
            pass

    monkeypatch.setattr(command, "make_scheduler", lambda *given: Kept())


@pytest.fixture
def asked(tmp_path: Path, tiny_config: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Asked]:
    """``asked("strategy=a,b", seeds="0-1")``: a sweep of tiny runs in a folder of its own."""
    plugin, file = tmp_path / "fragile.py", tmp_path / "tiny.yaml"
    plugin.write_text(PLUGIN)
    own = {"checkpoint.every": 1, "plugins": [str(plugin)], "output.dir": str(tmp_path / "runs"), "name": "tiny"}
    file.write_text(to_yaml(tiny_config(own)))

    def build(*overrides: str, seeds: str = "0-1", workers: int | None = None) -> Asked:
        return Asked(str(file), overrides, seeds=seeds, workers=workers, quiet=True)

    return build


class Stopping(Board):
    """Presses Ctrl-C when the first run has reported from its second task."""

    def at(self, place: int, told: Mapping[str, Any]) -> None:
        super().at(place, told)
        if told["task"] >= 1 and not getattr(self, "pressed", False):
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


def statuses(swept: Swept) -> list[str]:
    return [outcome.status for outcome in swept.outcomes]


def hashes(folder: Path) -> tuple[str, str]:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done"
    return summary["model_sha256"], summary["state_sha256"]


def test_a_sweep_in_two_processes_one_of_which_is_killed(
    asked: Any, pool: Pool, faults: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = faults / "fragile-1"
    kill.write_text("kill")
    request = asked("strategy=fragile,fedprox", workers=2)
    swept = sweep(request)
    assert statuses(swept) == ["done", "failed", "done", "done"], swept.text
    cause = swept.outcomes[1].cause
    assert cause is not None
    assert cause.startswith("its worker was killed by SIGKILL (the system kills a process so when memory runs out)")
    with pytest.raises(RunFailed, match="1 of 4 runs failed; the first: fragile seed 1: its worker was killed"):
        swept.check()
    assert f"failed    fragile seed 1: {cause}" in swept.text
    kill.unlink()

    before = {point.folder: point.folder.joinpath("summary.json").stat().st_mtime_ns for point in swept.points[2:]}
    stay_warm(pool, monkeypatch)
    again = sweep(request)
    assert statuses(again) == ["done"] * 4
    again.check()
    assert before == {
        point.folder: point.folder.joinpath("summary.json").stat().st_mtime_ns for point in again.points[2:]
    }
    events = [json.loads(line) for line in (again.points[1].folder / "events.jsonl").read_text().splitlines()]
    assert {event["attempt"] for event in events} == {1, 2}, "the killed run goes on from its checkpoint"
    assert [event["task"] for event in events if event["event"] == "run_start"] == [0, 1]

    found = find_runs([tmp_path / "runs"])
    assert [run.folder for run in found.runs] == sorted(point.folder for point in again.points)
    assert found.broken == ()
    # Alone, from the settings that the run wrote down, in this process.
    for point in again.points[1:3]:
        config = load_config(point.folder / "config.yaml")
        alone = execute(config, progress=QuietProgress(), folder=tmp_path / "alone")
        assert hashes(alone.folder) == hashes(point.folder)
    assert "next      fedcl compare" in again.text
    assert json.dumps(again.as_objects())
    assert [run["status"] for run in again.as_objects()] == ["done"] * 4
    assert all(0 <= run["average_accuracy"] <= 1 for run in again.as_objects())
    assert len({run["model_sha256"] for run in again.as_objects()}) >= 3


def test_ctrl_c_stops_with_checkpoints_and_the_same_command_goes_on(
    asked: Any, warm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Long enough that the signal is there before the end, whatever else the machine does.
    request = asked("strategy=finetune", "federation.rounds=80", "checkpoint.every=0", seeds="0-1")
    with monkeypatch.context() as patch:
        patch.setattr(command, "make_board", lambda quiet, stream, results: Stopping(results))
        with pytest.raises(Interrupted) as stopped:
            sweep(request)
    assert stopped.value.exit_code == 130
    assert str(stopped.value).startswith("interrupted, 2 of 2 runs are not done; go on with: fedcl sweep ")
    assert str(stopped.value).endswith(request.command)
    folder = tmp_path / "runs" / "tiny" / "finetune" / "seed-0"
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert list((folder / "checkpoints").iterdir())
    assert not (folder.parent / "seed-1").exists()
    swept = sweep(request)
    assert statuses(swept) == ["done", "done"]
    events = (folder / "events.jsonl").read_text()
    assert '"attempt": 2' in events


def test_failed_runs_are_run_again_and_finished_ones_are_found_by_their_hash(
    asked: Any, warm: None, faults: Path, tmp_path: Path
) -> None:
    (faults / "fragile-0").write_text("fail")
    swept = sweep(asked("strategy=fragile", seeds="0"))
    assert statuses(swept) == ["failed"]
    assert swept.outcomes[0].cause is not None
    assert "as asked for" in swept.outcomes[0].cause
    (faults / "fragile-0").unlink()
    assert statuses(sweep(asked("strategy=fragile", seeds="0"))) == ["done"]
    # A run that no sweep started counts too: what it settled by itself is known from its config.yaml alone.
    (swept.points[0].folder / ".asked.yaml").unlink()
    assert dry_run(asked("strategy=fragile", seeds="0"))[0]["todo"] == "nothing, it is done"
    # The same settings as a point of another grid: where the run lies does not matter.
    wider = sweep(asked("strategy=fragile", "optimiser.lr=0.1,0.2", seeds="0"))
    assert statuses(wider) == ["done", "done"]
    root = tmp_path / "runs" / "tiny"
    assert [point.folder for point in wider.points] == [
        root / "fragile" / "seed-0",
        root / "lr=0.2" / "seed-0",
    ]
    with pytest.raises(UsageError, match=r"holds a run with other settings \(federation.rounds=2, not 3\)"):
        sweep(asked("strategy=fragile", "federation.rounds=3", seeds="0"))


def test_a_wrong_setting_fails_its_points_alone(asked: Any, warm: None) -> None:
    swept = sweep(asked("strategy=finetune", "federation.clients=3,500", seeds="0"))
    assert statuses(swept) == ["done", "failed"]
    assert "partition" in str(swept.outcomes[1].cause)


def test_a_run_that_a_callback_stopped_is_not_done(asked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "halts.py").write_text("def halt(event):\n    return event.kind == 'round'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = prepare(asked("strategy=finetune", "output.callbacks=[halts:halt]", seeds="0")).points()
    outcome = perform(Job.of(points[0]), lambda message: None)
    assert (outcome.status, outcome.cause) == ("stopped", "callback halts:halt asked to stop after task 1, round 1")
    swept = Swept("tiny", tmp_path, points, [outcome])
    assert swept.as_objects()[0]["status"] == "stopped"
    assert "0 of 1" in swept.text
    assert f"stopped   finetune seed 0: {outcome.cause}" in swept.text
    assert "fedcl compare" not in swept.text
    swept.check()


def test_a_worker_whose_sweep_is_gone_stops_with_a_checkpoint(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = prepare(asked("strategy=finetune", "federation.rounds=5000", seeds="0")).points()
    jobs, sweep_end = os.pipe()
    told: list[Mapping[str, Any]] = []

    def tell(message: Mapping[str, Any]) -> None:
        told.append(message)
        if message["event"] == "at" and message["round"] and sweep_end not in closed:
            closed.append(sweep_end)
            os.close(sweep_end)  # what the system does when the sweep is killed

    closed: list[int] = []
    worker = Worker(-1)
    monkeypatch.setattr(worker, "tell", tell)
    before = signal.getsignal(signal.SIGINT)
    with os.fdopen(jobs) as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        os.write(sweep_end, json.dumps(asdict(Job.of(points[0]))).encode() + b"\n")
        try:
            worker.serve()  # returns, because its standard input has ended
        finally:
            signal.signal(signal.SIGINT, before)
    assert told[-1]["event"] == "end"
    assert told[-1]["status"] == "interrupted"
    assert json.loads((points[0].folder / "summary.json").read_text())["status"] == "interrupted"
    assert list((points[0].folder / "checkpoints").iterdir())


def test_the_command_prints_only_json_and_says_what_failed(
    asked: Any, warm: None, faults: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (faults / "fragile-0").write_text("fail")
    request = asked()
    words = ["sweep", request.source, "strategy=fragile,finetune", "--seeds", "0", "--json"]
    assert run_command_line(words) == 1
    captured = capsys.readouterr()
    assert [run["status"] for run in json.loads(captured.out)] == ["failed", "done"]
    lines = captured.err.splitlines()
    assert any(line.startswith("1/2 fragile seed 0: FAILED: ") for line in lines)
    assert any(line.startswith("2/2 finetune seed 0: accuracy ") for line in lines)
    assert lines[-1].startswith("fedcl: 1 of 2 runs failed; the first: fragile seed 0: ")
    (faults / "fragile-0").unlink()


class Idle:
    """A worker of which only the book-keeping counts."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at, self.ended = number, at, False

    def end(self) -> None:
        self.ended = True


def test_fewer_runs_at_a_time_where_one_held_more_memory_than_there_is(tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Board):
        def message(self, text: str) -> None:
            said.append(text)

    workers = Pool(Room(3, 1, 10 * 2**30), tmp_path, 0)
    children = [Idle(number, number) for number in range(3)]
    workers._children = list(children)  # type: ignore[arg-type]
    board = Listening(lambda point: (None, None))
    board.begin("", [None] * 3)  # type: ignore[list-item]
    outcomes = [Outcome("waiting")] * 3
    for child, peak in zip(children, (3, 4, 1), strict=True):
        workers._ended(child, {"status": "done", "peak": peak * 2**30}, outcomes, board)  # type: ignore[arg-type]
    assert said == ["", "note: 2 runs at a time from now on: one held 4.0 GB of memory"]
    assert [child.ended for child in children] == [False, True, False]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    workers = Pool(Room(1, 1, None), tmp_path, 0)
    todo = [1, 2]
    workers._stops = 1
    workers._stop(todo, Board(lambda point: (None, None)))
    assert todo == []
    workers._stops = 2
    with pytest.raises(Interrupted, match="stopped at once"):
        workers._stop(todo, Board(lambda point: (None, None)))
