from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fedcl
from fedcl.errors import RunFailed, UsageError
from fedcl.records import files
from fedcl.records.events import EventLog, read_events
from fedcl.records.runfolder import RunFolder, check_name

CHECKOUT = str(Path(fedcl.__file__).parents[1])


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": CHECKOUT}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


HOLDER = """
import sys
from pathlib import Path
from fedcl.records.runfolder import RunFolder
folder = RunFolder.create(Path(sys.argv[1]), "a", 0)
folder.write_config("name: a")
folder.log({"event": "round", "task": 0, "round": 0})
print("held", flush=True)
sys.stdin.read()
"""


def test_create_write_read(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "runs", "my run", 3) as folder:
        assert folder.path == tmp_path / "runs" / "my run" / "seed-3"
        folder.write_config("name: é\n")
        folder.write_environment({"python": "3"})
        folder.write_summary({"average_accuracy": 0.5, "forgetting": None})
        folder.write_matrix([[1.0, None], [np.float64(1 / 3), np.float32(0.5)]])
        folder.write_rounds(["task", "round", "accuracy"], [[0, 0, 0.1], [0, 1, None]])
        assert folder.write("plugins/mine.py", b"x = 1\n").is_file()
    assert (folder.path / "config.yaml").read_text(encoding="utf-8") == "name: é\n"
    assert (folder.path / "accuracy_matrix.csv").read_text() == "1.0,\n0.3333333333333333,0.5\n"
    assert (folder.path / "rounds.csv").read_text() == "task,round,accuracy\n0,0,0.1\n0,1,\n"
    assert json.loads((folder.path / "environment.json").read_bytes()) == {"python": "3"}
    seen = RunFolder.view(folder.path)
    assert seen.read_matrix() == [[1.0, None], [1 / 3, 0.5]]
    assert seen.read_summary() == {"average_accuracy": 0.5, "forgetting": None}
    assert not list(folder.path.glob(".*.tmp"))


def test_what_is_not_there_yet(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "a", 0) as folder:
        assert folder.read_summary() is None
        assert folder.read_matrix() == []
        assert folder.events() == []


@pytest.mark.parametrize("bad", [float("nan"), np.float32("inf")])
def test_numbers_must_be_finite(tmp_path: Path, bad: float) -> None:
    with RunFolder.create(tmp_path, "a", 0) as folder:
        for write in (
            lambda: folder.write_matrix([[0.5, bad]]),
            lambda: folder.write_rounds(["x"], [[bad]]),
            lambda: folder.write_summary({"x": float(bad)}),
            lambda: folder.log({"event": "x", "loss": float(bad)}),
        ):
            with pytest.raises(ValueError, match=r"finite|JSON compliant"):
                write()
        with pytest.raises(ValueError, match="2 cells"):
            folder.write_rounds(["a", "b"], [[1]])
        assert folder.events() == []
        assert not (folder.path / "accuracy_matrix.csv").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "../x", "-x", ".x", " a", "a\n", "a\0b", "é" * 101])
def test_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="name=") as caught:
        RunFolder.create(tmp_path, name, 0)
    assert caught.value.key == "name"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "CIFAR-100 B50", "x.y_z+1", "Prüfung", "a=[1,2]"])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name) == name


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "a", 0) as folder:
        folder.write_config("")
    with pytest.raises(UsageError, match=r"fedcl resume .*seed-0") as caught:
        RunFolder.create(tmp_path, "a", 0)
    assert (caught.value.key, caught.value.exit_code) == ("output.dir", 2)
    RunFolder.create(tmp_path, "a", 1).close()
    RunFolder.open(folder.path).close()


def test_a_run_that_died_before_its_config_may_start_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a", 0)
    (folder.path / ".config.yaml.tmp").write_text("na")
    folder.close()
    RunFolder.create(tmp_path, "a", 0).close()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "seed-0"
    path.mkdir(parents=True)
    (path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        RunFolder.create(tmp_path, "a", 0)
    assert os.listdir(path) == ["thesis.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"output\.dir"):
        RunFolder.create(tmp_path / "file", "a", 0)


def test_no_run_to_open(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "a", 0) as folder:
        folder.write_config("")
    wrong = tmp_path / "a" / "seed-7"
    for opener in (RunFolder.open, RunFolder.view):
        with pytest.raises(UsageError, match=r"Did you mean .*seed-0"):
            opener(wrong)
    assert not wrong.exists()


def test_a_view_and_a_closed_folder_refuse_to_write(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a", 0)
    folder.write_config("")
    view = RunFolder.view(folder.path)
    folder.close()
    for reader in (view, folder):
        with pytest.raises(RuntimeError, match="not locked"):
            reader.write_summary({})
        with pytest.raises(RuntimeError, match="not locked"):
            reader.log({"event": "x"})


def test_second_process_is_refused_and_kill_leaves_no_lock(tmp_path: Path) -> None:
    first = child(HOLDER, str(tmp_path))
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    path = tmp_path / "a" / "seed-0"
    try:
        for attempt in (lambda: RunFolder.create(tmp_path, "a", 0), lambda: RunFolder.open(path)):
            with pytest.raises(UsageError, match="another process") as caught:
                attempt()
            assert "\n" not in str(caught.value)
        assert RunFolder.view(path).attempt == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with RunFolder.open(path) as folder:
        assert folder.attempt == 2
        with pytest.raises(UsageError, match="another process"):
            RunFolder.open(path)
    RunFolder.open(path).close()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path, "a", 0) as folder:
        folder.write_summary({"x": 1})
        folder.log({"event": "kept"})

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        written = os.write

        def half(descriptor: int, data: bytes) -> int:
            if len(data) < 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written(descriptor, data[:-10])

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", full)
            patch.setattr(os, "write", half)
            with pytest.raises(RunFailed, match=r"summary\.json: no space left"):
                folder.write_summary({"x": 2})
            with pytest.raises(RunFailed, match=r"events\.jsonl: no space left"):
                folder.log({"event": "lost"})
        folder.log({"event": "after"})
        assert folder.read_summary() == {"x": 1}
        assert [e["event"] for e in folder.events()] == ["kept", "after"]
        assert (folder.path / "events.jsonl").read_bytes().count(b"\n") == 2


def test_events_have_the_contracts_keys(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", 4, clock=lambda: 12.3456)
    log.add({"event": "round", "task": 1, "round": 2, "text": "é\n", "bytes_up": 3})
    log.add({"event": "start"})
    log.sync()
    log.close()
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "event": "round", "time": 12.346, "attempt": 4, "task": 1, "round": 2, "text": "é\n", "bytes_up": 3,
    }  # fmt: skip
    assert list(json.loads(lines[0]))[:5] == ["event", "time", "attempt", "task", "round"]
    assert json.loads(lines[1]) == {
        "event": "start",
        "time": 12.346,
        "attempt": 4,
        "task": None,
        "round": None,
    }


@pytest.mark.parametrize("record", [{}, {"task": 1}, {"event": "x", "time": 1}, {"event": "x", "attempt": 1}])
def test_events_that_are_none(tmp_path: Path, record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="an event needs"):
        EventLog(tmp_path / "e", 1).add(record)


def test_the_last_attempt_of_a_round_counts(tmp_path: Path) -> None:
    def tell(folder: RunFolder, *places: tuple[int, int]) -> None:
        folder.log({"event": "start"})
        for task, number in places:
            folder.log({"event": "round", "task": task, "round": number})
            folder.log({"event": "evaluated", "task": task, "round": number})

    with RunFolder.create(tmp_path, "a", 0) as folder:
        folder.write_config("")
        tell(folder, (0, 0), (0, 1), (0, 2), (1, 1))
    with RunFolder.open(folder.path) as folder:
        folder.log({"event": "round", "task": 0, "round": 1})
    with RunFolder.open(folder.path) as folder:
        tell(folder, (0, 2))
        kept = folder.events()
    rounds = {(e["event"], e["task"], e["round"]): e["attempt"] for e in kept if e["event"] != "start"}
    assert rounds == {
        ("round", 0, 0): 1, ("evaluated", 0, 0): 1, ("round", 0, 1): 2, ("round", 1, 1): 1,
        ("evaluated", 1, 1): 1, ("round", 0, 2): 3, ("evaluated", 0, 2): 3,
    }  # fmt: skip
    assert [e["attempt"] for e in kept if e["event"] == "start"] == [1, 3]
    assert len(kept) == len(rounds) + 2


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, cut: int) -> None:
    with RunFolder.create(tmp_path, "a", 0) as folder:
        folder.write_config("")
        folder.log({"event": "whole"})
        folder.log({"event": "torn", "text": "é"})
    path = folder.path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    whole = ["whole", "torn"] if cut == 1 else ["whole"]
    assert [e["event"] for e in read_events(path)] == whole
    with RunFolder.open(folder.path) as folder:
        assert folder.attempt == 2
        folder.log({"event": "next"})
        assert [e["event"] for e in folder.events()] == [*whole, "next"]


def test_reader_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\0\0\0\n[1]\n"x"\n{"event": "no attempt"}\n\xff\xfe\n\n{"event": "a", "attempt": 2}\n{"eve')
    assert read_events(path) == [{"task": None, "round": None, "event": "a", "attempt": 2}]


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", 1)

    def many(who: int) -> None:
        for _ in range(200):
            log.add({"event": "x", "who": who, "text": "y" * 500})

    threads = [threading.Thread(target=many, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(read_events(tmp_path / "events.jsonl")) == 800
