"""TensorBoard and Weights & Biases: what they write is read back; nothing is sent anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import UsageError
from fedcl.run import execute, resume
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config

Make = Callable[[Mapping[str, Any]], "Config"]
HASHES = ("model_sha256", "state_sha256")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_and_no_number_changes(tiny_config: Make) -> None:
    pytest.importorskip("tensorboard")
    plain = execute(tiny_config({}), progress=QuietProgress())
    result = execute(tiny_config({"output.loggers": ["tensorboard"], "evaluate.every": 1}), progress=QuietProgress())
    assert [result.summary[h] for h in HASHES] == [plain.summary[h] for h in HASHES]
    read = scalars(result.folder)
    assert [step for step, _ in read["round/losses/task"]] == [1, 2, 3, 4]
    assert [step for step, _ in read["task/accuracy/task_1"]] == [2, 4]
    assert [value for _, value in read["task/accuracy/task_1"]] == pytest.approx([row[0] for row in result.matrix])
    assert read["summary/average_accuracy"] == [(4, pytest.approx(result.summary["average_accuracy"]))]


def test_a_round_that_is_repeated_is_drawn_once(tiny_config: Make) -> None:
    pytest.importorskip("tensorboard")

    class Impatient(QuietProgress):
        def round(self, task: int, round: int, standing: object) -> None:
            if (task, round) == (1, 1):
                raise KeyboardInterrupt

    from fedcl.errors import Interrupted

    config = tiny_config({"output.loggers": ["tensorboard"]})
    with pytest.raises(Interrupted):
        execute(config, progress=Impatient())
    result = resume(Path(config.output.dir) / "run" / "seed-0", progress=QuietProgress())
    assert [step for step, _ in scalars(result.folder)["round/losses/task"]] == [1, 2, 3, 4]


NO_NETWORK = """
import json, socket, sys
from pathlib import Path

def refused(*arguments, **named):
    raise AssertionError(f"the network was asked for {arguments}")

real = socket.socket.connect
def connect(self, address):
    # wandb speaks with its own process of this machine.
    if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"):
        return real(self, address)
    refused(address)

socket.socket.connect = connect
socket.getaddrinfo = refused
from fedcl.config import load_config
from fedcl.tell.progress import QuietProgress
from fedcl.run import execute

settings = json.loads(sys.argv[1])
result = execute(load_config({"strategy": ["finetune"]}, settings), progress=QuietProgress())
print(json.dumps({"folder": str(result.folder), "model_sha256": result.summary["model_sha256"]}))
"""


def test_wandb_writes_offline_and_no_number_changes(tiny_config: Make, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    import os
    from dataclasses import asdict

    plain = execute(tiny_config({}), progress=QuietProgress())
    settings = asdict(tiny_config({"output.loggers": ["wandb"]}))
    # A process of its own: what wandb leaves behind in a process is not for the other tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CACHE", "CONFIG", "DATA")}
    command = [sys.executable, "-c", NO_NETWORK, json.dumps(settings)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["model_sha256"] == plain.summary["model_sha256"]
    (offline,) = (Path(told["folder"]) / "wandb").glob("offline-run-*")
    (log,) = offline.glob("*.wandb")
    content = log.read_bytes()
    for text in (b"round/losses/task", b"task/accuracy/task_2", b"average_accuracy"):
        assert text in content


def test_a_logger_that_is_not_installed_is_named(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedcl.tell.loggers

    monkeypatch.setitem(fedcl.tell.loggers.PACKAGES, "wandb", "a_package_that_is_not_there")
    config = tiny_config({"output.loggers": ["wandb"]})
    with pytest.raises(UsageError, match=r"^output.loggers='wandb': wandb is not installed.*fedcl-sim\[wandb\]"):
        execute(config, progress=QuietProgress())
    assert not Path(config.output.dir).exists()


@pytest.mark.parametrize(("value", "said"), [(["tensorbord"], "Did you mean 'tensorboard'"), (["wandb"] * 2, "twice")])
def test_wrong_loggers_are_refused(value: list[str], said: str, tiny_config: Make) -> None:
    with pytest.raises(UsageError, match=rf"^output.loggers=.*{said}"):
        tiny_config({"output.loggers": value})
