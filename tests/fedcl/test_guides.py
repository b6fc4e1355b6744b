"""Every command and snippet of the pages on plugins, loggers and notebooks works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedcl.commands.cli import run_command_line

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)


def play(page: str) -> dict[str, Any]:
    """Runs the Python blocks of a page in their order, as the cells of one notebook; returns their names."""
    names: dict[str, Any] = {}
    for number, source in enumerate(blocks(page, "python")):
        exec(compile(source, f"{page}, block {number + 1}", "exec"), names)
    return names


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def test_notebook(there: Path) -> None:
    pytest.importorskip("pandas")
    names = play("notebook.md")
    assert sorted(names["table"]["strategy"]) == ["fedlwf", "fedlwf", "finetune"]


def test_a_callback_of_the_users_own(there: Path) -> None:
    result = play("loggers.md")["result"]
    assert result.summary["status"] == "stopped"
    assert "patience asked to stop" in result.summary["cause"]


def test_a_check_from_python(there: Path) -> None:
    assert play("plugins.md")["report"].ok


def test_commands(there: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    commands = [line for page in ("plugins.md", "loggers.md") for b in blocks(page, "sh") for line in b.splitlines()]
    assert len(commands) == 5
    for command in commands:
        arguments = shlex.split(command)[1:]
        if "wandb" in command:  # its own test starts it in a process of its own
            arguments = [a.replace(",wandb", "") for a in arguments]
        if arguments[0] == "check":
            arguments += ["--only", "card,runs"]  # all of them are in test_new.py
        if arguments[0] == "run":
            arguments += ["federation.rounds=1", "scenario.tasks=2"]
        assert run_command_line(arguments) == 0, command
