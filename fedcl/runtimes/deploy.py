"""The ``deploy`` runtime: ``fedcl run`` hands the run to a SuperLink, whose ServerApp conducts it at SuperNodes.

:func:`drive` is the user's end, :func:`serve` the ServerApp's. The two share a file system: the ServerApp writes the
run folder, and the user's process reads its results there. What the ServerApp tells travels in Flower's log stream.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .. import __version__
from .. import config as settings
from ..errors import FedclError, Interrupted, RunFailed
from ..tell.progress import PlainProgress

if TYPE_CHECKING:
    from ..federation.flower_internals import Grid
    from ..run import RunResult
    from ..tell.progress import Progress

HOME = ".flwr"
"""Folder of Flower's settings inside a run folder; hidden, so that the run folder still counts as new."""

CONNECTION = "fedcl"
ADDRESS = "127.0.0.1:8000"
SAID, ENDED = "fedcl> ", "fedcl= "
"""What lines of the ServerApp's log begin with: something to tell, and the outcome as JSON."""

APP = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "fedcl-app"
version = "{version}"
description = "fedcl, as it is installed on the nodes"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedcl"
fab-include = ["flower_app.py"]

[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"

[tool.flwr.app.config]
config = ""
overrides = ""
settings = ""
folder = ""
"""
MODULE = '''"""The Flower app: fedcl as it is installed where this runs."""

from fedcl.app import client, server

__all__ = ["client", "server"]
'''


def folder_of(config: settings.Config) -> Path:
    """The run folder of these settings, absolute."""
    return Path(config.output.dir).absolute() / config.name / f"seed-{config.seed}"


# the user's end


def drive(config: settings.Config, folder: Path, progress: Progress) -> RunResult:
    """Hands a run to the SuperLink at ``engine.address`` and waits for its end.

    Args:
        config: settings with absolute paths.
        folder: the run folder, absolute; a run that is there already goes on.
        progress: who is told what the ServerApp tells.

    Raises:
        UsageError, RunFailed, Interrupted: as in the ServerApp, or the SuperLink cannot be reached.
    """
    from ..records.runfolder import CONFIG, RunFolder
    from ..run import load

    going_on = (folder / CONFIG).is_file()
    if going_on:
        given = {"folder": str(folder)}
    else:
        RunFolder.create(folder.parents[1], config.name, config.seed).close()
        config = replace(config, output=replace(config.output, dir=str(folder.parents[1])))
        given = {"settings": json.dumps(asdict(config))}
    home = folder / HOME
    _write_home(home, config.engine.address or ADDRESS, given)
    outcome = Driven(home, folder, progress).wait()
    if outcome["code"] == Interrupted.exit_code:
        raise Interrupted(outcome["error"])
    if outcome["code"]:
        failed = FedclError(outcome["error"])
        failed.exit_code = outcome["code"]
        raise failed
    return load(folder)


def _write_home(home: Path, address: str, given: Mapping[str, str]) -> None:
    app = home / "app"
    app.mkdir(parents=True, exist_ok=True)
    (home / "stop").unlink(missing_ok=True)
    (app / "pyproject.toml").write_text(APP.format(version=__version__))
    (app / "flower_app.py").write_text(MODULE)
    # JSON strings are TOML strings.
    connection = f"address = {json.dumps(address)}\ninsecure = true\n"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{connection}'
    )
    (home / "run.toml").write_text("".join(f"{key} = {json.dumps(text)}\n" for key, text in given.items()))


class Driven:
    """A run at a SuperLink, seen through ``flwr run --stream``."""

    patience = 30.0
    """Seconds after Ctrl-C until the run is ended from outside."""

    def __init__(self, home: Path, folder: Path, progress: Progress) -> None:
        self.home, self.folder, self.progress = home, folder, progress
        self.outcome: dict[str, Any] | None = None
        self.run_id = ""
        self._tail = ""
        arguments = ["run", str(home / "app"), CONNECTION, "--run-config", str(home / "run.toml"), "--stream"]
        # A session of its own: Ctrl-C is for this process, which tells the ServerApp.
        self.process = subprocess.Popen(
            self._command(*arguments), env=self._environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

    @staticmethod
    def _command(*arguments: str) -> list[str]:
        return [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]

    def _environment(self) -> dict[str, str]:
        own = {"FLWR_HOME": str(self.home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        return {**os.environ, **own, "PYTHONUNBUFFERED": "1"}

    def wait(self) -> dict[str, Any]:
        """The outcome: ``code`` and ``error``. The first Ctrl-C asks the run to stop, the second ends it.

        Raises:
            RunFailed: the SuperLink cannot be reached, or the run ended without an outcome.
        """
        ending = threading.Timer(self.patience, self.end)
        ending.daemon = True
        try:
            with (self.home / "log.txt").open("a", encoding="utf-8") as log:
                try:
                    self._read(log)
                except KeyboardInterrupt:
                    (self.home / "stop").touch()
                    ending.start()
                    self.progress.message("stopping the run; Ctrl-C again ends it at once")
                    self._read(log)
        except KeyboardInterrupt:
            self.end()
        finally:
            ending.cancel()
            self.process.kill()
            self.process.wait()
        if self.outcome is None and (self.home / "stop").exists():
            return {"code": 130, "error": f"interrupted; go on with: fedcl resume {self.folder}"}
        if self.outcome is None:
            where = f"the SuperLink ended the run without a result; {self.home / 'log.txt'} has its log"
            raise RunFailed(where if self.run_id else f"no run was started: {self._tail or 'flwr run said nothing'}")
        return self.outcome

    def _read(self, log: TextIO) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            log.write(line)
            log.flush()
            text = line.rstrip("\n")
            # Lines of several writers may be glued together; ours stand at the end.
            if SAID in text:
                self.progress.message(text.partition(SAID)[2])
            elif ENDED in text:
                self.outcome = json.loads(text.partition(ENDED)[2])
            elif found := re.search(r"started run (\d+)", text):
                self.run_id = found[1]
            elif text.startswith("╭─ Error"):
                self._tail = ""
            else:
                self._tail = f"{self._tail} {text.strip(' │╭╮╰╯─')}".strip()

    def end(self) -> None:
        """Ends the run from outside; its last checkpoint stays."""
        if self.run_id:
            command = self._command("stop", self.run_id, CONNECTION)
            subprocess.run(command, env=self._environment(), capture_output=True, timeout=60, check=False)
        self.process.kill()


# the ServerApp's end


class Said:
    """A text stream whose lines the user's process finds in Flower's log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes whole lines."""
        return self._stream.write("".join(f"{SAID}{line}\n" for line in text.splitlines()))

    def flush(self) -> None:
        """As of the stream below."""
        self._stream.flush()


def serve(grid: Grid, given: Mapping[str, Any]) -> None:
    """Conducts the run that a SuperLink's ServerApp was given.

    Args:
        grid: Flower's way to the SuperNodes.
        given: the app's configuration: ``folder`` of a run to go on with, or ``settings`` as JSON, or a ``config``
            (file or preset) with ``overrides`` separated by blanks.

    Raises:
        FedclError: the run failed; the outcome has been told before.
    """
    from ..run import execute, resume

    progress = PlainProgress(Said(sys.stdout))  # type: ignore[arg-type]  # all that it needs of a text stream
    outcome: dict[str, Any] = {"code": 0, "error": ""}
    try:
        if given.get("folder"):
            folder = Path(str(given["folder"]))
            with stopped_by(folder / HOME / "stop"):
                resume(folder, progress=progress, grid=grid)
        else:
            config = _config(given)
            with stopped_by(folder_of(config) / HOME / "stop"):
                execute(config, progress=progress, grid=grid)
    except BaseException as error:
        text = str(error) if isinstance(error, FedclError) else f"{type(error).__name__}: {error}"
        outcome = {"code": getattr(error, "exit_code", 1), "error": " ".join(text.split())}
        raise
    finally:
        print(f"{ENDED}{json.dumps(outcome)}", flush=True)


def _config(given: Mapping[str, Any]) -> settings.Config:
    if given.get("settings"):
        config = settings.load_config(json.loads(str(given["settings"])))
    else:
        config = settings.load_config(str(given.get("config") or "") or None, str(given.get("overrides") or "").split())
    return replace(config, engine=replace(config.engine, runtime="deploy"))


@contextlib.contextmanager
def stopped_by(file: Path) -> Iterator[None]:
    """As if Ctrl-C were pressed in this process once ``file`` exists."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            if file.exists():
                signal.raise_signal(signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
