"""The runtime ``deploy``: a SuperLink and two SuperNodes from an installed wheel, against one process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif("deploy" in os.environ.get("FEDCL_SKIP", "").split(","), reason="FEDCL_SKIP names deploy"),
]

SETTINGS: dict[str, Any] = {
    "name": "apart", "strategy": "[replay]", "data.name": "few", "data.validation": 0, "data.augment": "[]",
    "scenario.tasks": 2, "scenario.first": 1, "partition.name": "iid", "partition.test": "same_mix",
    "federation.clients": 3, "federation.rounds": 1, "federation.epochs": 1, "federation.batch_size": 8,
    "model.name": "mlp", "model.width": 8, "model.depth": 1, "engine.device": "cpu", "engine.threads": 1,
    "engine.path": "sequential", "output.plots": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, without its dependencies in a folder of its own."""
    copy, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("fedcl", "strategies", "scenarios", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    installer = ["pip", "install", "--no-index"] if importlib.util.find_spec("pip") else ["uv", "pip", "install"]
    options = ["--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", *installer, *options], check=True, capture_output=True)
    return target


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines() if (folder / "events.jsonl").exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == kind]


class Site:
    """A SuperLink and SuperNodes on this machine, each a group of processes that is ended as a whole."""

    def __init__(self, place: Path, installed: Path) -> None:
        self.place = place
        self.port = free_port()
        scripts = sysconfig.get_path("scripts")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "FEDCL_DATA_ROOT"},
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(installed),
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        }  # fmt: skip
        self.scripts = Path(scripts)
        self.groups: list[subprocess.Popen[bytes]] = []
        self.logs: list[IO[bytes]] = []

    def start(self, program: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.place / f"{name}.log").open("wb")
        self.logs.append(log)
        process = subprocess.Popen(
            [str(self.scripts / program), "--insecure", *arguments], cwd=self.place, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
            env={**self.environment, "FLWR_HOME": str(self.place / f"home-{name}")},
        )  # fmt: skip
        self.groups.append(process)
        return process

    def node(self, number: int) -> subprocess.Popen[bytes]:
        own = f'partition-id={number} data-root="{self.place}/data" state-dir="{self.place}/states{number}"'
        where = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        return self.start("flower-supernode", f"node{number}", *where, "--node-config", own)

    def fedcl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedcl", *arguments], cwd=self.place, env=self.environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400,
        )  # fmt: skip

    def run(self, runtime: str, out: str, **more: Any) -> subprocess.CompletedProcess[str]:
        settings = {**SETTINGS, "engine.runtime": runtime, "output.dir": out, **more}
        return self.fedcl("run", "--data-root", "data", *(f"{key}={value}" for key, value in settings.items()))

    def close(self) -> None:
        for process in self.groups:
            end(process)
        for log in self.logs:
            log.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program with all that it started."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in (process, *family):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)


@pytest.fixture
def site(tmp_path: Path, installed: Path) -> Iterator[Site]:
    import numpy as np

    (tmp_path / "data").mkdir()
    labels = np.arange(60) % 4
    images = (np.arange(60 * 16).reshape(60, 4, 4) * 7 % 200 + labels[:, None, None] * 10).astype(np.uint8)
    np.savez(tmp_path / "data" / "few.npz", train_x=images, train_y=labels, test_x=images[:20], test_y=labels[:20])
    running = Site(tmp_path, installed)
    running.start("flower-superlink", "superlink", "--port", str(running.port))
    yield running
    running.close()


@pytest.mark.slow
def test_supernodes_give_the_hashes_of_one_process(site: Site, installed: Path) -> None:
    for number in (1, 0):
        site.node(number)
    asked = [sys.executable, "-c", "import fedcl; print(fedcl.__file__)"]
    found = subprocess.run(asked, cwd=site.place, env=site.environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(installed)
    alone = site.run("local", "alone")
    assert alone.returncode == 0, alone.stderr
    apart = site.run("deploy", "together", **{"engine.address": f"127.0.0.1:{site.port}", "engine.nodes": 2})
    assert apart.returncode == 0, apart.stderr
    folders = [site.place / out / "apart" / "seed-0" for out in ("alone", "together")]
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert first.pop("wall_seconds") < second.pop("wall_seconds")
    assert all(summary.pop("measured")["peak_bytes"]["node"] > 0 for summary in (first, second))
    assert second == first
    assert "replay on few" in apart.stderr
    assert "task 1/1 done" in apart.stderr
    assert "INFO" not in apart.stderr
    assert "apart/seed-0" in apart.stdout
    # Who are you, a round, what replay asks after it, the states' digests: four to each of two nodes.
    assert events(folders[1], "messages")[0]["sent"] == 8
    # The state of a client is at its node only.
    held = [sorted(int(p.name) for p in site.place.glob(f"states{n}/*/clients/*/*")) for n in (0, 1)]
    assert held == [[0, 2], [1]]
    assert not (folders[1] / "clients").exists()


def test_the_checkout_is_a_flower_app_of_two_files() -> None:
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(ROOT / "pyproject.toml")
    assert warnings == []
    assert config["tool"]["flwr"]["app"]["components"]["serverapp"] == "flower_app:server"
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info")}
    assert names == {"pyproject.toml", "flower_app.py"}
