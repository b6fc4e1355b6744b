from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import fedcl
from fedcl.records.environment import environment, source_revision, versions

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_environment_is_plain_json_without_paths_or_names() -> None:
    found = environment()
    text = json.dumps(found, allow_nan=False)
    assert str(Path.home()) not in text
    assert str(Path(fedcl.__file__).parents[1]) not in text
    assert f'"{socket.gethostname()}"' not in text
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["versions"]["fedcl"] == fedcl.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert 1 <= found["cpus_usable"] <= found["cpus"]
    assert found["cpu"]


def test_versions_import_nothing() -> None:
    code = "import sys, fedcl.records.environment as e; e.versions(); print({'torch', 'flwr'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(Path(fedcl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcl.records.environment._PACKAGES", ("fedcl-no-such-distribution",))
    assert versions()["fedcl-no-such-distribution"] is None


@needs_git
def test_revision_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    assert source_revision(package) is None
    git(tmp_path, "init", "-q")
    (package / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    assert source_revision(package) is None
    git(tmp_path, "commit", "-qm", "one")
    revision = git(tmp_path, "rev-parse", "HEAD")[:12]
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert source_revision(package) == revision
    (package / "a.py").write_text("2")
    assert source_revision(package) == f"{revision}-dirty"
    installed = tmp_path / ".venv" / "fedcl"
    installed.mkdir(parents=True)
    (installed / "a.py").touch()
    assert source_revision(installed) is None


def test_no_git_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert source_revision() is None
