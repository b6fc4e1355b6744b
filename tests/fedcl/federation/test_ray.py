"""The runtime ``ray``: the same numbers as in one process, from several; and what happens when they stop."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import RunFailed
from fedcl.run import execute, resume
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.tell.progress import Standing

TinyConfig = Callable[[Mapping[str, Any]], "Config"]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("ray" in os.environ.get("FEDCL_SKIP", "").split(","), reason="FEDCL_SKIP names ray"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: fedcl-sim[ray]"),
]

PLUGIN = '''
import sys
import torch
from fedcl.strategy import Strategy


class Own(Strategy):
    """Keeps the head at the client, and how many steps it took; a worker has no use for Avalanche."""

    name = "own_head"
    reductions = {"n": "sum"}

    def share(self, name, model):
        return "private" if name.startswith("head.") else "shared"

    def end_round(self, ctx, trained, steps):
        worker = str(getattr(sys.modules["__main__"], "__file__", "")).endswith("default_worker.py")
        assert not (worker and "avalanche" in sys.modules)
        return {"n": torch.tensor(1)}, {"seen": ctx.state.get("seen", torch.tensor(0)) + steps}

    def after_aggregate(self, server):
        total = server.state.get("total", torch.tensor(0)) + server.uploads["n"]
        return server.arrays, {"total": total}
'''
STACK: dict[str, Any] = {
    "strategy": ["replay", "own_head"],
    "federation.clients": 5,
    "federation.batch_min": 2,
    "model.norm": "batch",
    "model.dropout": 0.2,
    "partition.test": "same_mix",
    "engine.path": "sequential",
    "checkpoint.every": 1,
}
RAY = {"engine.runtime": "ray", "engine.nodes": 2, "engine.client_cpus": 0.25}


@pytest.fixture
def stack(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "own_head.py"
    file.write_text(PLUGIN)
    return {**STACK, "plugins": [str(file)]}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    whole = (folder / "events.jsonl").read_text().rpartition("\n")[0]  # a line may be in the middle of being written
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if line["event"] == kind]


def pids(folder: Path) -> list[int]:
    return [node["pid"] for node in events(folder, "nodes")[-1]["nodes"]]


def measured(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in ("wall_seconds", "measured")}


def gone(pid: int) -> bool:
    import psutil

    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Killing(QuietProgress):
    """Kills one worker, for good, once a round is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def round(self, task: int, round: int, standing: Standing) -> None:
        if (task, round) == (1, 0):
            os.kill(pids(self.folder)[1], signal.SIGKILL)


def test_two_processes_give_the_bits_of_one_and_a_killed_one_loses_nothing(
    tiny_config: TinyConfig, stack: dict[str, Any]
) -> None:
    alone = execute(tiny_config(stack), progress=QuietProgress())

    settings = tiny_config({**stack, **RAY})
    folder = Path(settings.output.dir) / settings.name / f"seed-{settings.seed}"
    with pytest.raises(RunFailed, match=r"node 1 is gone.*'train'; go on with: fedcl resume") as failed:
        execute(settings, progress=Killing(folder))
    assert failed.value.exit_code == 1
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    first = pids(folder)
    assert len({os.getpid(), *first}) == 3
    assert all(gone(pid) for pid in first)
    assert list((folder / "checkpoints").glob("*/meta.json"))

    together = resume(folder, progress=QuietProgress())
    assert measured(together.summary) == measured(alone.summary)
    assert together.matrix == alone.matrix
    second = pids(folder)
    assert len({os.getpid(), *first, *second}) == 5
    assert all(gone(pid) for pid in second)
    # To each node: who are you, the round that was left, what replay asks after a task, the states' digests.
    assert events(folder, "messages")[-1]["sent"] == 8


def test_ctrl_c_stops_within_seconds_and_says_how_to_go_on(tmp_path: Path) -> None:
    settings = {
        "data.limit": 12, "scenario.tasks": 2, "federation.clients": 4, "federation.rounds": 100_000,
        "model.width": 8, "model.depth": 1, "federation.epochs": 1, "engine.device": "cpu",
        "engine.threads": 1, "output.plots": "false", "name": "endless", "output.dir": str(tmp_path),
    }  # fmt: skip
    import psutil

    command = [sys.executable, "-m", "fedcl", "run"]
    command += [f"{key}={value}" for key, value in {**settings, **RAY}.items()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "endless" / "seed-0"
    try:
        end = time.monotonic() + 120
        while not ((folder / "events.jsonl").exists() and events(folder, "round")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 3
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert out == ""
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    lines = told.splitlines()
    assert lines[-1] == f"fedcl: interrupted; go on with: fedcl resume {folder}"
    strange = [line for line in lines[:-1] if not line.startswith(("endless: ", "task ", "note: ", "stopping after"))]
    assert strange == []
    assert list((folder / "checkpoints").glob("*/meta.json"))
