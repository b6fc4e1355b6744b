"""The wheel is whole: installed alone, away from the checkout, it does the main job."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "fedcl": "fedcl",
    "strategies": "fedcl/strategies",
    "scenarios": "fedcl/scenarios",
    "experiments": "fedcl/experiments",
}
DATA = (".css", ".html", ".js", ".json", ".txt", ".yaml", ".typed")

# Runs ``python -m fedcl`` and says which files the process imported and opened.
WATCH = """
import json, runpy, sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" else None)
report = sys.argv.pop(1)
try:
    runpy.run_module("fedcl", run_name="__main__", alter_sys=True)
finally:
    modules = {
        name: getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "fedcl"
    }
    paths = [path for path in opened if isinstance(path, str)]
    with open(report, "w") as file:
        json.dump({"modules": modules, "opened": paths}, file)
"""


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and nothing left in it helps."""
    copy = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    run(sys.executable, *build, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel without its dependencies in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    if importlib.util.find_spec("pip"):
        installer = ["pip", "install", "--no-index"]
    else:
        installer = ["uv", "pip", "install", "--offline"]
    target = ["--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    run(sys.executable, "-m", *installer, *target, cwd=folder.parent)
    return folder


def test_the_wheel_has_every_file_and_no_other(wheel):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", *DATA)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    own = {name for name in names if ".dist-info" not in PurePosixPath(name).parts[0]}
    assert sorted(own) == sorted(expected)
    assert {"fedcl/experiments/default.yaml", "fedcl/py.typed"} <= own
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (place,) = {PurePosixPath(name).parts[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{place}/METADATA").decode().partition("\n\n")[0].splitlines()
        points = archive.read(f"{place}/entry_points.txt").decode()
    assert "Name: fedcl-sim" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group, entries in project["entry-points"].items():
        assert f"[{group}]" in points
        for name, value in entries.items():
            assert f"{name} = {value}" in points
    assert "fedcl = fedcl.__main__:main" in points


def test_versions_agree():
    import fedcl

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fedcl.__version__
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {fedcl.__version__}" in citation
    assert f"license: {project['license']}" in citation


def test_constraints_pin_every_direct_dependency_by_version_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    direct = {re.split(r"[<>=!~\[ ]", requirement)[0].lower() for requirement in wanted}
    assert direct - {line.partition("==")[0] for line in pins} == set()


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(installed, tmp_path):
    report, out = tmp_path / "report.json", tmp_path / "out"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "FEDCL_DATA_ROOT")}
    environment = {**kept, "PYTHONPATH": str(installed)}
    arguments = [str(report), "demo", "--out", str(out), "--quiet"]
    done = run(sys.executable, "-c", WATCH, *arguments, cwd=tmp_path, env=environment)

    watched = json.loads(report.read_text())
    assert "fedcl.strategies.federated.finetune" in watched["modules"]
    assert "fedcl.scenarios.class_incremental" in watched["modules"]
    strangers = {
        name: file
        for name, file in watched["modules"].items()
        if file is None or not Path(file).resolve().is_relative_to(installed.resolve())
    }
    assert strangers == {}
    environment_folder = Path(sys.prefix).resolve()
    opened = {Path(path).resolve() for path in watched["opened"] if os.path.isabs(path)}
    own = {path for path in opened if path.is_relative_to(ROOT)}
    assert {path for path in own if not path.is_relative_to(environment_folder)} == set()
    assert any(path.name == "default.yaml" and path.is_relative_to(installed.resolve()) for path in opened)

    summaries = [json.loads(path.read_text()) for path in out.rglob("summary.json")]
    assert len(summaries) >= 2
    assert {summary["status"] for summary in summaries} == {"done"}
    assert "finetune" in done.stdout
    pictures = [path for path in out.rglob("*.png") if path.stat().st_size > 10_000]
    assert pictures, "the demo drew nothing"
