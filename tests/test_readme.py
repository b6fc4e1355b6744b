"""Every command and snippet of the README works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedcl.cli import run_command_line

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("fedcl ")]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def test_there_are_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_command(command: str, there: Path) -> None:
    for source in blocks("python"):
        if "(Strategy)" in source:
            (there / "feature_distillation.py").write_text(source, encoding="utf-8")
    arguments = shlex.split(command)[1:]
    if arguments[0] == "run":
        arguments.append("federation.rounds=1")
    assert run_command_line(arguments) == 0


def test_python_snippet(there: Path) -> None:
    (snippet,) = [source for source in blocks("python") if "fedcl.run(" in source]
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    result = names["result"]
    assert (result.folder / "summary.json").is_file()  # type: ignore[attr-defined]


def test_links_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
