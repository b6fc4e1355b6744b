"""Cohorts larger than memory: the stack is halved, no round is lost, and what fits is remembered."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl.errors import Interrupted, RunFailed
from fedcl.federation import chunks
from fedcl.local.stacked import Training
from fedcl.records.checkpoint import load_newest
from fedcl.run import execute, resume
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], "Config"]

SIX = {
    "engine.path": "stacked", "engine.chunk": 6, "federation.clients": 6, "federation.rounds": 3,
    "partition.min_size": 4, "model.dropout": 0.2, "federation.epochs": 2,
    "strategy": ["replay"], "options.replay.budget": 640,
}  # fmt: skip


class Memory:
    """A machine on which only so many clients can be stacked: the second step of a larger stack fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clients = 10**9
        self.failed: list[int] = []
        real = Training.step

        def step(training: Training, index: int, group: Any) -> None:
            if index == 1 and len(training.plans) > self.clients:
                self.failed.append(len(training.plans))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            real(training, index, group)

        monkeypatch.setattr(Training, "step", step)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


class Listening(QuietProgress):
    """Notes what is told, and interrupts the run after so many rounds."""

    def __init__(self, rounds: int = 10**9) -> None:
        self.messages: list[str] = []
        self.rounds = rounds

    def message(self, text: str) -> None:
        self.messages.append(text)

    def round(self, *told: Any) -> None:
        self.rounds -= 1
        if not self.rounds:
            raise KeyboardInterrupt


def events(folder: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [{n: e[n] for n in ("task", "round", "chunk", "why")} for e in found if e["event"] == "engine"]


def hashes(result: RunResult) -> tuple[str, str]:
    return result.summary["model_sha256"], result.summary["state_sha256"]


@pytest.mark.parametrize(("fits", "chunk", "failed"), [(5, 3, [6]), (3, 3, [6]), (2, 1, [6, 3])])
def test_a_stack_that_does_not_fit_is_halved(
    fits: int, chunk: int, failed: list[int], memory: Memory, tiny: Tiny, tiny_config: TinyConfig
) -> None:
    small = tiny({**SIX, "engine.chunk": chunk})
    memory.clients = fits
    listener = Listening()
    result = execute(tiny_config(SIX), progress=listener)
    assert hashes(result) == hashes(small)
    assert result.matrix == small.matrix
    # Later rounds, and the second task, begin with what fits.
    assert memory.failed == failed
    assert events(result.folder) == [
        {"task": 0, "round": 0, "chunk": size // 2, "why": "out of memory"} for size in failed
    ]
    told = f"note: from task 1, round 1 on, {chunk} clients at a time: out of memory"
    assert [m for m in listener.messages if "at a time" in m][-1] == told
    for name in ("bytes_up", "bytes_down", "dropped_images", "empty_rounds"):
        assert result.summary[name] == small.summary[name]


def test_a_resumed_run_begins_with_what_fits(memory: Memory, tiny: Tiny, tiny_config: TinyConfig) -> None:
    small = tiny({**SIX, "engine.chunk": 3})
    memory.clients = 3
    config = tiny_config(SIX)
    with pytest.raises(Interrupted):
        execute(config, progress=Listening(rounds=2))
    folder = Path(config.output.dir) / config.name / f"seed-{config.seed}"
    found = load_newest(folder / "checkpoints", lambda text: None)
    assert found is not None
    assert found.meta["state"]["engine"] == {"chunk": 3}
    memory.failed.clear()
    assert hashes(resume(folder, progress=QuietProgress())) == hashes(small)
    assert memory.failed == []
    assert len(events(folder)) == 1


def test_memory_that_ends_later_costs_no_round(memory: Memory, tiny: Tiny, tiny_config: TinyConfig) -> None:
    """The chunks that were done before stay done; sums of other chunks agree within rounding."""
    whole = tiny({**SIX, "engine.chunk": 4})
    real, calls = Training.run, []

    def run(training: Training) -> None:
        calls.append(len(training.plans))
        memory.clients = 1 if len(calls) in (4, 5) else 10**9
        real(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "run", run)
        result = execute(tiny_config({**SIX, "engine.chunk": 4}), progress=QuietProgress())
    assert calls[:8] == [2, 4, 2, 4, 2, 1, 1, 1]  # the trial, a round, a stack of 4, of 2, then one by one
    assert [e["chunk"] for e in events(result.folder)] == [2, 1]
    for name, array in whole.model.state_dict().items():
        assert (result.model.state_dict()[name] - array).norm() <= 1e-10 * array.norm()


@pytest.mark.parametrize("path", ["stacked", "sequential"])
def test_one_client_that_does_not_fit_ends_the_run(
    path: str, memory: Memory, tiny: Tiny, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny({**SIX, "engine.path": path})
    config = tiny_config({**SIX, "engine.path": path})
    rounds = 2 if path == "stacked" else 7
    real = chunks.train_client

    def full(*args: Any) -> Any:
        nonlocal rounds
        rounds -= 1
        if not rounds:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return real(*args)

    with monkeypatch.context() as patch:
        if path == "sequential":
            patch.setattr(chunks, "train_client", full)
        else:
            memory.clients = 0
            patch.setattr(chunks, "cannot_stack", lambda *args: None)
        with pytest.raises(RunFailed, match=r"^client \d does not fit into memory") as caught:
            execute(config, progress=QuietProgress())
    assert "\n" not in str(caught.value)
    assert "lower federation.batch_size" in str(caught.value)
    assert caught.value.exit_code == 1
    memory.clients = 10**9
    folder = Path(config.output.dir) / config.name / f"seed-{config.seed}"
    assert load_newest(folder / "checkpoints", lambda text: None) is not None
    assert hashes(resume(folder, progress=QuietProgress())) == hashes(whole)


def test_a_cohort_without_images_is_no_defect(tiny: Tiny) -> None:
    """Nobody to try the strategy out on, and nothing to stack."""
    settings = {"partition.alpha": 0.02, "partition.min_size": 0, "federation.clients": 30, "federation.cohort": 1,
                "engine.path": "stacked", "data.limit": 4}  # fmt: skip
    found = [tiny({**settings, "seed": seed}).summary["empty_rounds"] for seed in range(3)]
    assert max(found) > 0


REAL = """
import json, resource, sys
from pathlib import Path
from fedcl.config import load_config
from fedcl.tell.progress import QuietProgress
from fedcl.run import execute

class Limiting(QuietProgress):
    def start(self, *told):
        status = Path("/proc/self/status").read_text()
        used = int(next(l for l in status.splitlines() if l.startswith("VmSize")).split()[1]) * 1024
        limit = used + int(sys.argv[2]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

result = execute(load_config({"strategy": ["finetune"]}, json.loads(sys.argv[1])), progress=Limiting())
events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
changes = [[e["round"], e["chunk"], e["why"]] for e in events if e["event"] == "engine"]
model = {n: float(a.double().norm()) for n, a in result.model.state_dict().items()}
print(json.dumps({"changes": changes, "model": model}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are not enforced elsewhere")
def test_memory_that_really_ends(tiny: Tiny, tiny_config: TinyConfig) -> None:
    """32 perceptrons of 5 MB: more than 150 MB for each of parameters, gradients and moments."""
    large = {
        "engine.path": "stacked", "engine.dtype": "float32", "model.width": 16384, "federation.clients": 32,
        "federation.rounds": 2, "scenario.tasks": 1, "partition.name": "iid", "partition.alpha": 0.5,
        "data.limit": 16, "optimiser.lr": 0.01, "checkpoint.every": 0, "engine.chunk": 32,
    }  # fmt: skip
    free = tiny({**large, "engine.chunk": 4}).model.state_dict()
    settings = json.dumps(asdict(tiny_config(large)))
    done = subprocess.run([sys.executable, "-c", REAL, settings, "350"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    limited = json.loads(done.stdout.splitlines()[-1])
    assert limited["changes"]
    assert all(why == "out of memory" for _, _, why in limited["changes"])
    assert 1 <= limited["changes"][-1][1] < 32
    for name, array in free.items():
        assert limited["model"][name] == pytest.approx(float(array.double().norm()), rel=1e-4), name
