"""``fedcl demo``: two runs, their comparison, a picture, a report, and next steps that work."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.commands.cli import run_command_line
from fedcl.commands.demo import demo, fresh
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config

Make = Callable[[Mapping[str, Any]], "Config"]


def test_the_whole_story(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config({"strategy": ["nearest_mean"], "output.dir": "runs"})
    result = demo(config, progress=QuietProgress())

    found = json.loads(json.dumps(result.summary, allow_nan=False))
    assert {name: run["strategy"] for name, run in found["runs"].items()} == {
        "finetune": ["finetune"], "default": ["nearest_mean"]
    }  # fmt: skip
    assert {run["status"] for run in found["runs"].values()} == {"done"}
    assert found["folder"] == "runs/demo"
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "nearest_mean" in Path(found["report"]).read_text(encoding="utf-8")

    pairs = found["comparison"]["pairs"]
    assert [pair["metric"] for pair in pairs] == ["average_accuracy", "forgetting"]
    assert {tuple(sorted((pair["first"], pair["other"]))) for pair in pairs} == {("default", "finetune")}
    gap = found["runs"]["default"]["average_accuracy"] - found["runs"]["finetune"]["average_accuracy"]
    assert abs(pairs[0]["mean"]) == pytest.approx(abs(gap))
    for pair in pairs:
        # One seed gives no interval, so nothing may be called ahead of anything.
        assert pair["verdict"] in ("not shown", "identical")
        assert pair["words"] in result.text

    for place in (found["picture"], found["report"], "runs/demo/default/seed-0"):
        assert place in result.text
        assert Path(place).exists()
    (shown,) = re.findall(r"^fedcl (compare .*)$", result.text, re.M)
    assert run_command_line(shlex.split(shown)) == 0
    assert pairs[0]["words"] in capsys.readouterr().out

    steps = [shlex.split(step) for step in re.findall(r"^(?:next)? {6,}fedcl (.*?)(?:  |$)", result.text, re.M)]
    assert [step[0] for step in steps] == ["sweep", "compare", "report", "list"]
    assert run_command_line([*steps[0], "--dry-run"]) == 0
    # The sweep's folder is the one that the next two read.
    assert steps[1][1] == steps[2][1] == "runs/methods"
    assert "runs/methods/" in capsys.readouterr().out


def test_every_demo_is_kept(tmp_path: Path) -> None:
    for name in ("demo", "demo-2", "demo-3"):
        found = fresh(tmp_path / "demo")
        assert found.name == name
        found.mkdir()
