"""What a run goes on from: its newest sound checkpoint, its own data, its own plugin; or why it cannot."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.config import load_config, to_yaml
from fedcl.errors import RunFailed, UsageError
from fedcl.records.runfolder import RunFolder

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], "Config"]
STEP = "fedcl.local.training:gather"


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "no meta", "flipped meta"])
def test_a_damaged_checkpoint_falls_back_and_says_so(lab: Any, damage: str) -> None:
    whole, _ = lab.whole("replay+fedewc")
    folder, answer = lab.start(lab.settings("replay+fedewc"), lab.kill(STEP, 40))
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
    assert lab.results(folder) == whole


def test_older_checkpoints_keep_their_client_states_over_a_resume(lab: Any) -> None:
    """With three kept, the two newest are damaged after a resume that saved but one of them."""
    whole, _ = lab.whole("private parts, convolutions")
    settings = {**lab.settings("private parts, convolutions"), "checkpoint": {"every": 1, "keep": 3}}
    save = "fedcl.conduct:save_checkpoint"
    folder, _ = lab.start(settings, lab.kill(save, 5))
    died = lab.resume(folder, lab.kill(save, 2))
    assert died["signal"] == signal.SIGKILL
    stored = sorted(p for p in (folder / "checkpoints").iterdir() if not p.name.startswith("."))
    assert len(stored) == 3
    for path in stored[-2:]:
        (path / "meta.json").write_text("{")
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole


def test_all_checkpoints_damaged_starts_anew(lab: Any) -> None:
    whole, _ = lab.whole("replay+fedewc")
    folder, _ = lab.start(lab.settings("replay+fedewc"), lab.kill(STEP, 40))
    for path in (folder / "checkpoints").glob("*/meta.json"):
        path.write_text("{")
    again = lab.resume(folder)
    assert any("from the start" in m for m in again["messages"])
    assert lab.results(folder) == whole


def test_a_damaged_client_state_is_an_error_that_names_it(lab: Any) -> None:
    folder, _ = lab.start(lab.settings("everything"), lab.kill(STEP, 34))
    broken = sorted((folder / "clients").rglob("*.safetensors"))
    for path in broken:
        path.write_bytes(path.read_bytes()[:-4])
    again = lab.resume(folder)
    assert again["code"] == 1
    assert "clients/" in again["error"]
    assert "cannot be used" in again["error"]


# in this process


def test_resume_of_a_finished_run_does_nothing(tiny: Tiny) -> None:
    from fedcl.run import resume
    from fedcl.tell.progress import QuietProgress

    result = tiny({"strategy": ["replay"]})
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in result.folder.rglob("*") if p.is_file()}
    again = resume(result.folder, progress=QuietProgress())
    assert (again.summary, again.matrix) == (result.summary, result.matrix)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in result.folder.rglob("*") if p.is_file()} == kept


def test_resume_of_no_run_is_a_usage_error(tmp_path: Path) -> None:
    from fedcl.run import resume
    from fedcl.tell.progress import QuietProgress

    with pytest.raises(UsageError, match="the folder of a run"):
        resume(tmp_path, progress=QuietProgress())


def test_resume_on_other_data_is_refused(lab: Any) -> None:
    from fedcl.run import resume
    from fedcl.tell.progress import QuietProgress

    folder, _ = lab.start(lab.settings("replay+fedewc"), lab.kill(STEP, 40))
    config = load_config(folder / "config.yaml")
    config.data.limit = 11
    (folder / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(RunFailed, match="data or its split are not those this run began with"):
        resume(folder, progress=QuietProgress())


def test_a_run_with_a_plugin_resumes_in_the_process_that_began_it(tiny_config: TinyConfig, tmp_path: Path) -> None:
    from fedcl.run import resume, run
    from fedcl.tell.progress import QuietProgress

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
