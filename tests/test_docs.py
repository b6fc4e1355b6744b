"""Every command and snippet of README.md and docs/ works as it stands there, but for what ``NOT_RUN`` says and why.

The blocks of a page are played in their order in one empty folder, as its reader would: commands within this process
and cut to seconds (``CUT``), Python blocks as the cells of one notebook, YAML as settings. A block of an unknown kind
fails. What the text around the blocks says is checked in ``test_docs_text.py``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedcl.commands.cli import run_command_line
from fedcl.config import Config, load_config

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}

NOT_RUN = {
    r"make (demo|test|environment)$": "set-up of the checkout, which runs this test; its target is looked for",
    r"pip install ": "needs the network; the extra is looked for",
    r"flower-super(link|node) ": "SuperNodes: tests/fedcl/federation/test_deploy.py starts them",
    r"fedcl run .*--runtime deploy": "SuperNodes: tests/fedcl/federation/test_deploy.py starts them",
    r"fedcl run .*--runtime ray": "Ray: tests/fedcl/runtimes runs it",
    r"fedcl run .*data\.download=true": "needs the network",
    r"fedcl run pretrain |fedcl run mnist init=runs/pretrain/": "needs Fashion-MNIST and MNIST",
    r"fedcl sweep .*--search": "trials by the dozen: tests/fedcl/sweep searches",
}
"""Pattern of a command -> why it is not run. The settings of a run are checked all the same."""

ELSEWHERE = dict.fromkeys(("loggers.md", "notebook.md", "plugins.md"), "tests/fedcl/test_guides.py")
"""Pages whose commands and Python blocks another test plays."""

NEEDS_DATA = {r"protocol=\S*cifar100": "cifar100.npz"}
"""Pattern of a command -> what must lie below FEDCL_DATA_ROOT; without, its settings are checked."""

BEFORE = {"docs/metrics.md": ["fedcl run name=NAME strategy=finetune"]}
"""What the reader of a page has done before."""

PLACEHOLDERS = {"PRESET": "default"}

CUT = {
    "federation.rounds": "1", "federation.epochs": "1", "data.limit": "16", "partition.min_size": "1",
    "engine.threads": "1", "output.plots": "false",
}  # fmt: skip
"""Settings of every run here, but for those that the command itself gives."""

READ_ONLY = {"text", "bibtex"}
"""Languages of blocks that show something and say nothing to do."""


@dataclass
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str


@dataclass
class Reader:
    """Someone who plays a page in the working folder."""

    page: str
    capture: pytest.CaptureFixture[str]
    names: dict[str, Any] = field(default_factory=dict)

    def play(self, block: Block) -> None:
        """Does what a block says."""
        kind = block.language or "sh"
        if kind in ("sh", "bash"):
            for command in commands(block.text):
                self.command(command)
        elif kind == "python":
            self.python(block)
        elif kind == "yaml":
            self.yaml(block)
        elif kind == "toml":
            assert tomllib.loads(block.text)
        else:
            assert kind in READ_ONLY, f"nobody knows how to play a block of {kind!r}"

    def command(self, command: str) -> None:
        """Runs a command, or checks what it says."""
        for placeholder, value in PLACEHOLDERS.items():
            command = re.sub(rf"\b{placeholder}\b", value, command)
        program, *arguments = shlex.split(command)
        if why_not(command) is not None:
            looked_at(program, arguments)
        elif program == "fedcl":
            self.fedcl(command, arguments)
        elif program == "python":
            self.interpreter(arguments)
        else:
            raise AssertionError(f"nobody knows how to run {command!r}")

    def fedcl(self, command: str, arguments: list[str]) -> None:
        """A command of fedcl, within this process."""
        verb = arguments[0]
        lacking = next((file for pattern, file in NEEDS_DATA.items() if re.search(pattern, command)), None)
        if verb == "run":
            if lacking is not None and not (Path(os.environ.get("FEDCL_DOCS_DATA", "")) / lacking).is_file():
                settings_of(arguments)
                return
            arguments += cut(arguments)
            if lacking is not None:
                arguments = [argument.replace("data.limit=16", "data.limit=4") for argument in arguments]
                arguments += [
                    "--data-root",
                    os.environ["FEDCL_DOCS_DATA"],
                    "model.name=lenet",
                    "federation.batch_size=16",
                ]
        elif verb == "check":
            arguments += ["--only", "card,runs,neutral"]
        elif verb == "sweep":
            self.sweep(arguments)
            return
        self.run(arguments)

    def run(self, arguments: list[str]) -> str:
        """What a command of fedcl prints; it must succeed."""
        self.capture.readouterr()
        code = run_command_line(arguments)
        said = self.capture.readouterr()
        assert code == 0, f"{shlex.join(arguments)}: {said.err[-2000:]}"
        return said.out

    def sweep(self, arguments: list[str]) -> None:
        """The runs that a sweep plans, of the first seed; tests/fedcl/sweep runs them in its workers."""
        planned = json.loads(self.run([*arguments, "--dry-run", "--json"]))
        plugins = [part for i, a in enumerate(arguments) if a == "--plugin" for part in arguments[i : i + 2]]
        assert planned
        for run in planned:
            if run["seed"] == planned[0]["seed"]:
                folder = Path(run["folder"])
                given = [f"{key}={json.dumps(value)}" for key, value in run["settings"].items()]
                place = [f"name={folder.parent.name}", f"output.dir={folder.parents[1]}", f"seed={run['seed']}"]
                self.run(["run", *given, *place, *cut(given), *plugins])

    def python(self, block: Block) -> None:
        """A cell, or a file where its first line names one."""
        named = re.match(r"# file: (\S+)\n", block.text)
        if named is None:
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), self.names)
            return
        path = Path(named.group(1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def interpreter(self, arguments: list[str]) -> None:
        """``python -c CODE``, or ``python -m pytest FOLDER`` with the cheapest checks only."""
        if arguments[0] == "-c":
            exec(compile(arguments[1], f"{self.page}, python -c", "exec"), {})
            return
        assert arguments[:2] == ["-m", "pytest"], arguments
        (path,) = Path(arguments[2]).glob("test_*.py")
        with pytest.MonkeyPatch.context() as patch:
            import fedcl.check

            whole = fedcl.check.check_strategy
            patch.setattr(fedcl.check, "check_strategy", lambda cls: whole(cls, only=["card", "runs", "neutral"]))
            patch.syspath_prepend(str(path.parent))
            names: dict[str, Any] = {}
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
            tests = [test for name, test in names.items() if name.startswith("test_")]
            assert tests
            for test in tests:
                test()

    def yaml(self, block: Block) -> None:
        """Settings, a protocol or a sweep: it is read as what it is."""
        path = Path(f"{Path(block.page).stem}-{block.line}.yaml")
        path.write_text(block.text, encoding="utf-8")
        if re.search(r"^card:", block.text, re.M):
            assert load_config({}, [("protocol", str(path))]).protocol.fixed
        elif re.search(r"^sweep:", block.text, re.M):
            assert json.loads(self.run(["sweep", str(path), "--dry-run", "--json"]))
        else:
            assert load_config(str(path), [])


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m.group(1), m.group(2)) for m in found]


def commands(text: str) -> Iterator[str]:
    """The single commands of a block: continued lines joined, comments left out, loops and ``&&`` unrolled."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s+#.*$", "", line).strip()
        loop = re.fullmatch(r"for (\w+) in (.*?); do (.*); done", command)
        rounds = [(loop.group(1), value) for value in loop.group(2).split()] if loop else [("", "")]
        for name, value in rounds:
            body = loop.group(3).replace(f"${name}", value) if loop else command
            yield from (part.strip() for part in body.split(" && ") if part.strip() and not part.startswith("#"))


def why_not(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), None)


def given_keys(arguments: list[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments if "=" in argument}


def cut(arguments: list[str]) -> list[str]:
    given = given_keys(arguments)
    whole = {"data.limit"} if given & {"partition.size", "options.replay.budget"} else set()
    found = [f"{key}={value}" for key, value in CUT.items() if key not in given | whole]
    stream = any(key.partition(".")[0] in ("scenario", "time", "protocol", "config.yaml") for key in given)
    return found if stream else [*found, "scenario.tasks=2"]


def settings_of(arguments: list[str]) -> Config:
    """The settings that ``fedcl run`` would read."""
    overrides = [argument for argument in arguments[1:] if re.match(r"[a-z_]+(\.\w+)*=", argument)]
    positional = [a for a in arguments[1:] if not a.startswith("-") and a not in overrides]
    presets = [a for a in positional if a in ("default", "mnist", "cifar100")]
    return load_config(presets[0] if presets else None, overrides)


def looked_at(program: str, arguments: list[str]) -> None:
    """What can be checked of a command that is not run."""
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif program == "pip":
        (extra,) = re.findall(r"fedcl-sim\[(\w+)\]", " ".join(arguments))
        assert extra in extras()
    elif program == "fedcl" and arguments[0] == "run":
        settings_of(arguments)


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


PLAYED = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", PLAYED)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("FEDCL_DOCS_DATA", os.environ.get("FEDCL_DATA_ROOT", ""))
    monkeypatch.delenv("FEDCL_DATA_ROOT", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    reader = Reader(page, capsys)
    for command in BEFORE.get(page, []):
        reader.command(command)
    for block in blocks(page):
        if Path(page).name in ELSEWHERE and block.language in ("sh", "bash", "python"):
            continue
        try:
            reader.play(block)
        except Exception as error:
            raise AssertionError(f"{page}:{block.line}: {error}") from error


def test_every_exception_is_needed() -> None:
    every = [c for page in PAGES for b in blocks(page) if b.language in ("", "sh", "bash") for c in commands(b.text)]
    assert len(every) > 60
    for pattern in (*NOT_RUN, *NEEDS_DATA):
        assert any(re.search(pattern, command) for command in every), f"nothing is left out by {pattern!r}"
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")
