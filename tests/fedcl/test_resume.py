"""Runs that die, fail or are stopped at exact points, and go on to the same bits.

Children are real processes (forked from one that has imported everything), killed by SIGKILL.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from fedcl import random as counter
from fedcl.config import load_config, to_yaml
from fedcl.errors import RunFailed, UsageError
from fedcl.runfolder import RunFolder

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], "Config"]

PERSONAL = """
import torch
from fedcl.strategy import Strategy

class Personal(Strategy):
    name = "personal_probe"
    reductions = {"n": "sum"}

    def share(self, name):
        return "private" if name.startswith("head.") else "shared"

    def end_round(self, ctx, trained, steps):
        return {"n": torch.tensor(1)}, {"seen": ctx.state.get("seen", torch.tensor(0)) + steps}

    def after_aggregate(self, server):
        return server.arrays, {"total": server.state.get("total", torch.tensor(0)) + server.uploads["n"]}
"""

BASE = {
    "federation.clients": 4, "federation.participation": 0.75, "federation.rounds": 3, "federation.batch_min": 2,
    "checkpoint.every": 1, "evaluate.every": 1, "engine.dtype": "float32",
}  # fmt: skip
STACKS: dict[str, dict[str, Any]] = {
    "replay+fedewc": {"strategy": ["replay", "fedewc"]},
    "everything": {
        "strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning", "replay"],
        "model.norm": "batch",
        "model.dropout": 0.2,
        "data.augment": ["crop(1)"],
    },
    "private parts, convolutions": {
        "strategy": ["personal_probe", "fedewc"],
        "plugins": ["PERSONAL"],
        "model.name": "simple_cnn",
        "model.norm": "batch",
        "model.batch_norm": "local",
        "model.width": None,
        "model.depth": None,
        "data.size": 16,
        "partition.test": "same_mix",
    },
    "adaptive server": {"strategy": ["fedadam"], "scenario.tasks": 3},
}
RANDOM_POINTS = {"replay+fedewc": 3, "everything": 5, "private parts, convolutions": 4, "adaptive server": 2}


@pytest.fixture(scope="module")
def helper() -> ModuleType:
    path = Path(__file__).parents[1] / "helpers" / "children.py"
    spec = importlib.util.spec_from_file_location("fedcl_test_children", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def children(helper: ModuleType) -> Iterator[Any]:
    forking = helper.Children()
    yield forking
    forking.close()


class Lab:
    """Runs of one stack: the uninterrupted one, and others that are stopped and go on."""

    known: ClassVar[dict[str, tuple[dict[str, Any], int]]] = {}

    def __init__(self, children: Any, tiny_config: TinyConfig, everything: list[str], place: Path) -> None:
        self.children, self.tiny_config, self.everything, self.place = (
            children,
            tiny_config,
            everything,
            place,
        )

    def settings(self, stack: str) -> dict[str, Any]:
        overrides = {**BASE, **STACKS[stack]}
        if "plugins" in overrides:
            plugin = self.place / "personal_probe.py"
            plugin.write_text(PERSONAL)
            overrides["plugins"] = [str(plugin)]
        from dataclasses import asdict

        return asdict(self.tiny_config(overrides))

    def start(self, settings: dict[str, Any], *faults: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """A new run in its own folder."""
        folder = Path(settings["output"]["dir"]) / settings["name"] / f"seed-{settings['seed']}"
        return folder, self.children.start({"settings": settings, "faults": list(faults)})

    def resume(self, folder: Path, *faults: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self.children.start({"folder": str(folder), "faults": list(faults)})
        return answer

    def whole(self, stack: str) -> tuple[dict[str, Any], int]:
        """Results of the uninterrupted run and how many points it can be killed at."""
        if stack in self.known:
            return self.known[stack]
        counting = {"functions": self.everything, "at": 0, "action": "kill"}
        folder, answer = self.start(self.settings(stack), counting)
        assert (answer["code"], answer["error"]) == (0, "")
        self.known[stack] = results(folder), answer["calls"][0]
        return self.known[stack]


@pytest.fixture
def lab(children: Any, helper: ModuleType, tiny_config: TinyConfig, tmp_path: Path) -> Lab:
    return Lab(children, tiny_config, helper.EVERYTHING, tmp_path)


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.pop("wall_seconds") > 0
    return {
        "summary": summary,
        **{n: (folder / n).read_text() for n in ("accuracy_matrix.csv", "rounds.csv")},
    }


def kill(function: str, at: int, **more: Any) -> dict[str, Any]:
    return {"functions": [function], "at": at, "action": "kill", **more}


STEP = "fedcl.training:gather"
RENAME = "fedcl.files:replace"
WRITE = "fedcl.files:write_bytes"
CHECKPOINT = "checkpoints/"


@pytest.mark.slow
def test_killed_anywhere_goes_on_to_the_same_bits(lab: Lab) -> None:
    stack = "everything"
    whole, points = lab.whole(stack)
    assert points > 100
    kills = {
        "first step": kill(STEP, 1),
        "mid-round": kill(STEP, 23),
        "between write and rename of the first checkpoint": kill(RENAME, 1, match=CHECKPOINT),
        "between write and rename of a later checkpoint": kill(RENAME, 4, match=CHECKPOINT),
        "after the rename, before older ones are removed": kill(RENAME, 3, match=CHECKPOINT, when="after"),
        "half a tensor file of a checkpoint written": kill(WRITE, 5, match="state.safetensors", action="tear"),
        "half a client state written": kill(WRITE, 9, match="clients/", action="tear"),
        "between the clients of a round": kill(RENAME, 5, match="clients/"),
        "while the matrix is replaced": kill(RENAME, 2, match="accuracy_matrix"),
        "before the summary": kill(RENAME, 1, match="summary.json"),
    }
    for name, fault in kills.items():
        folder, answer = lab.start(lab.settings(stack), fault)
        assert answer["signal"] == signal.SIGKILL, name
        again = lab.resume(folder)
        assert (again["code"], again["error"]) == (0, ""), name
        assert results(folder) == whole, name


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_killed_at_random_points_goes_on_to_the_same_bits(lab: Lab, stack: str) -> None:
    whole, points = lab.whole(stack)
    drawn = counter.sample(points, RANDOM_POINTS[stack], "resume", stack)
    print(f"{stack}: killed at {drawn} of {points}")
    for point in drawn:
        folder, answer = lab.start(
            lab.settings(stack), {"functions": lab.everything, "at": point + 1, "action": "kill"}
        )
        assert answer["signal"] == signal.SIGKILL
        if not (folder / "config.yaml").exists():
            assert "a run folder" in lab.resume(folder)["error"]
            continue
        assert lab.resume(folder)["error"] == "", point
        assert results(folder) == whole, point


def test_killed_again_and_again_goes_on_to_the_same_bits(lab: Lab) -> None:
    whole, _ = lab.whole("everything")
    folder, answer = lab.start(lab.settings("everything"), kill(STEP, 11))
    deaths = 0
    while answer["signal"] == signal.SIGKILL:
        deaths += 1
        answer = lab.resume(folder, kill(STEP, 15))
    assert deaths > 2
    assert results(folder) == whole
    events = RunFolder.view(folder).events()
    assert {e["attempt"] for e in events} >= {deaths + 1}
    rounds = [(e["task"], e["round"]) for e in events if e["event"] == "round"]
    assert sorted(rounds) == [(t, r) for t in range(2) for r in range(3)]  # readers see each round once


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "no meta", "flipped meta"])
def test_a_damaged_checkpoint_falls_back_and_says_so(lab: Lab, damage: str) -> None:
    whole, _ = lab.whole("replay+fedewc")
    folder, answer = lab.start(lab.settings("replay+fedewc"), kill(STEP, 40))
    assert answer["signal"] == signal.SIGKILL
    older, newest = sorted(p for p in (folder / "checkpoints").iterdir() if not p.name.startswith("."))[-2:]
    tensors, meta = newest / "state.safetensors", newest / "meta.json"
    data = tensors.read_bytes()
    if damage == "cut":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        tensors.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "emptied":
        tensors.write_bytes(b"")
    elif damage == "no meta":
        meta.unlink()
    else:
        meta.write_text(meta.read_text().replace('"task": ', '"task": 1', 1))
    again = lab.resume(folder)
    assert again["error"] == ""
    assert any(newest.name in m and "skipped" in m for m in again["messages"])
    assert any(e["event"] == "warning" and "skipped" in e["message"] for e in RunFolder.view(folder).events())
    assert older.name < newest.name
    assert results(folder) == whole


def test_older_checkpoints_keep_their_client_states_over_a_resume(lab: Lab) -> None:
    """With three kept, the two newest are damaged after a resume that saved but one of them."""
    whole, _ = lab.whole("private parts, convolutions")
    settings = {**lab.settings("private parts, convolutions"), "checkpoint": {"every": 1, "keep": 3}}
    save = "fedcl.run:save_checkpoint"
    folder, _ = lab.start(settings, kill(save, 5))
    died = lab.resume(folder, kill(save, 2))
    assert died["signal"] == signal.SIGKILL
    stored = sorted(p for p in (folder / "checkpoints").iterdir() if not p.name.startswith("."))
    assert len(stored) == 3
    for path in stored[-2:]:
        (path / "meta.json").write_text("{")
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


def test_all_checkpoints_damaged_starts_anew(lab: Lab) -> None:
    whole, _ = lab.whole("replay+fedewc")
    folder, _ = lab.start(lab.settings("replay+fedewc"), kill(STEP, 40))
    for path in (folder / "checkpoints").glob("*/meta.json"):
        path.write_text("{")
    again = lab.resume(folder)
    assert any("from the start" in m for m in again["messages"])
    assert results(folder) == whole


def test_a_damaged_client_state_is_an_error_that_names_it(lab: Lab) -> None:
    folder, _ = lab.start(lab.settings("everything"), kill(STEP, 34))
    broken = sorted((folder / "clients").rglob("*.safetensors"))
    for path in broken:
        path.write_bytes(path.read_bytes()[:-4])
    again = lab.resume(folder)
    assert again["code"] == 1
    assert "clients/" in again["error"]
    assert "cannot be used" in again["error"]


@pytest.mark.parametrize("step", [1, 17, 34])
def test_interrupt_finishes_the_step_saves_and_names_resume(lab: Lab, step: int) -> None:
    whole, _ = lab.whole("everything")
    settings = {**lab.settings("everything"), "checkpoint": {"every": 0, "keep": 2}}
    folder, answer = lab.start(settings, kill(STEP, step, action="interrupt1"))
    assert answer["code"] == 130
    assert answer["error"] == f"interrupted; go on with: fedcl resume {folder}"
    assert answer["calls"] == [step]  # no further step
    assert any("stopping after this step" in m for m in answer["messages"])
    assert list((folder / "checkpoints").glob("*/meta.json"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["average_accuracy"] is None
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


def test_interrupt_during_evaluation(lab: Lab) -> None:
    whole, _ = lab.whole("everything")
    fault = kill("fedcl.evaluation:Evaluator.predict", 5, action="interrupt1")
    folder, answer = lab.start(lab.settings("everything"), fault)
    assert answer["code"] == 130
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


def test_second_interrupt_stops_at_once_and_leaves_a_valid_checkpoint(lab: Lab) -> None:
    whole, _ = lab.whole("everything")
    folder, answer = lab.start(lab.settings("everything"), kill(STEP, 33, action="interrupt2"))
    assert (answer["code"], answer["calls"]) == (130, [33])
    assert "fedcl resume" in answer["error"]
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


def test_second_interrupt_while_the_checkpoint_of_the_first_is_saved(lab: Lab) -> None:
    whole, _ = lab.whole("everything")
    faults = [
        kill(STEP, 33, action="interrupt1"),
        kill(RENAME, 4, match=CHECKPOINT, action="interrupt1"),
    ]
    folder, answer = lab.start(lab.settings("everything"), *faults)
    assert answer["code"] == 130
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


@pytest.mark.parametrize(
    ("match", "at"),
    [("checkpoints/", 5), ("clients/", 7), ("accuracy_matrix", 1), ("rounds.csv", 2), ("summary", 1)],
)
def test_a_full_disk_is_one_clear_line_and_loses_nothing(lab: Lab, match: str, at: int) -> None:
    whole, _ = lab.whole("everything")
    fault = {"functions": [WRITE], "match": match, "at": at, "action": "full", "ever_after": True}
    folder, answer = lab.start(lab.settings("everything"), fault)
    assert answer["code"] == 1
    assert "no space left on the disk" in answer["error"]
    assert match in answer["error"]
    assert "\n" not in answer["error"]
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


def test_a_disk_that_is_full_for_everything_says_what_came_first(lab: Lab) -> None:
    whole, _ = lab.whole("everything")
    fault = {"functions": [WRITE, "fedcl.events:_append"], "at": 40, "action": "full", "ever_after": True}
    folder, answer = lab.start(lab.settings("everything"), fault)
    assert answer["code"] == 1
    assert answer["error"].count("cannot write") == 1
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


def test_a_failed_run_can_be_resumed_once_the_cause_is_gone(lab: Lab) -> None:
    whole, _ = lab.whole("replay+fedewc")
    fault = {"functions": ["fedcl.federation.server:merge_measured"], "at": 3, "action": "full"}
    folder, answer = lab.start(lab.settings("replay+fedewc"), fault)
    assert answer["code"] != 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert lab.resume(folder)["error"] == ""
    assert results(folder) == whole


# in this process


def test_resume_of_a_finished_run_does_nothing(tiny: Tiny) -> None:
    from fedcl.progress import QuietProgress
    from fedcl.run import resume

    result = tiny({"strategy": ["replay"]})
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in result.folder.rglob("*") if p.is_file()}
    again = resume(result.folder, progress=QuietProgress())
    assert (again.summary, again.matrix) == (result.summary, result.matrix)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in result.folder.rglob("*") if p.is_file()} == kept


def test_resume_of_no_run_is_a_usage_error(tmp_path: Path) -> None:
    from fedcl.progress import QuietProgress
    from fedcl.run import resume

    with pytest.raises(UsageError, match="a run folder"):
        resume(tmp_path, progress=QuietProgress())


def test_resume_on_other_data_is_refused(lab: Lab) -> None:
    from fedcl.progress import QuietProgress
    from fedcl.run import resume

    folder, _ = lab.start(lab.settings("replay+fedewc"), kill(STEP, 40))
    config = load_config(folder / "config.yaml")
    config.data.limit = 11
    (folder / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(RunFailed, match="data or its split are not those this run began with"):
        resume(folder, progress=QuietProgress())


def test_a_run_with_a_plugin_resumes_in_the_process_that_began_it(tiny_config: TinyConfig, tmp_path: Path) -> None:
    from fedcl.progress import QuietProgress
    from fedcl.run import resume, run

    plugin = tmp_path / "flaky_probe.py"
    plugin.write_text(
        "from fedcl.strategy import Strategy\nFAIL = [True]\n"
        "class Flaky(Strategy):\n    name = 'flaky_probe'\n"
        "    def begin_task(self, server):\n"
        "        if server.task == 1 and FAIL.pop():\n            raise ValueError('once')\n"
        "        return server.state\n"
    )
    config = tiny_config({"strategy": ["flaky_probe"], "plugins": [str(plugin)]})
    with pytest.raises(RunFailed, match="once"):
        run(config)
    folder = Path(config.output.dir) / "run" / "seed-0"
    with pytest.raises(RunFailed, match="pop from empty list"):
        resume(folder, progress=QuietProgress())
