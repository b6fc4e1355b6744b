"""The folder of one run, ``OUT/NAME/seed-N/``: one owner at a time, and files that are always whole."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import numbers
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fedcl.errors import RunFailed, UsageError
from fedcl.records import files
from fedcl.records.events import EventLog, end_torn_line, last_attempt, read_events

CONFIG, ENVIRONMENT, SUMMARY = "config.yaml", "environment.json", "summary.json"
MATRIX, ROUNDS, EVENTS = "accuracy_matrix.csv", "rounds.csv", "events.jsonl"
_LOCK = ".lock"
_NOT_OWNED = "{} is not locked by this object: it was closed or opened for reading"

Cell = float | int | str | None
Rows = Sequence[Sequence[Cell]]


def check_name(name: str) -> str:
    """Returns ``name`` if it can be the name of one folder.

    Raises:
        UsageError: it is empty, too long, hidden, or names another place.

    >>> check_name("finetune mlp")
    'finetune mlp'
    """
    printable = name.isprintable() and name == name.strip() and len(name.encode(errors="replace")) <= 200
    if not name or not printable or name.startswith((".", "-")) or any(sign in name for sign in "/\\"):
        allowed = "one folder name: 1 to 200 printable characters, no slash, not starting with a dot or a dash"
        raise UsageError("name", name, allowed)
    return name


class RunFolder:
    """A run's folder, locked for this process unless it came from :meth:`view`.

    The lock is the system's (``flock``): it goes with the process, however that ends. Use as a context
    manager, or call :meth:`close`.

    Attributes:
        path: the folder.
        attempt: 1 for a new run, one more for each time it is resumed.
        last: by the name of an event, the last record of it that this object logged.
    """

    def __init__(self, path: Path, lock: int | None, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._lock = lock
        self.last: dict[str, Mapping[str, object]] = {}
        self.attempt = last_attempt(path / EVENTS) + (lock is not None)
        self._log = EventLog(path / EVENTS, self.attempt, clock)

    @classmethod
    def create(cls, out: Path, name: str, seed: int) -> RunFolder:
        """A new folder ``out/name/seed-N``, locked. Write ``config.yaml`` first: it makes the folder a run.

        Raises:
            UsageError: the name cannot be a folder's, or the folder holds another run or other files, or
                another process works in it.
        """
        path = out / check_name(name) / f"seed-{seed}"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("output.dir", str(out), f"{path} cannot be made: {error.strerror}") from error
        if not (path / _LOCK).exists():
            _refuse_used(path)
        lock = _acquire(path)
        try:
            _refuse_used(path)
        except BaseException:
            os.close(lock)
            raise
        return cls._owned(path, lock)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run's folder, locked, to go on with it; the next attempt.

        Raises:
            UsageError: there is no run, or another process works on it.
        """
        _require_run(path)
        return cls._owned(path, _acquire(path))

    @classmethod
    def view(cls, path: Path) -> RunFolder:
        """An existing run's folder, not locked, for reading only; the run may be in progress.

        Raises:
            UsageError: there is no run.
        """
        _require_run(path)
        return cls(path, None)

    @classmethod
    def _owned(cls, path: Path, lock: int) -> RunFolder:
        try:
            end_torn_line(path / EVENTS)
            return cls(path, lock)
        except BaseException:
            os.close(lock)
            raise

    @property
    def checkpoints(self) -> Path:
        """Where :mod:`fedcl.records.checkpoint` saves."""
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        """Where :class:`fedcl.federation.store.ClientStore` saves."""
        return self.path / "clients"

    @property
    def plots(self) -> Path:
        """Where pictures go."""
        return self.path / "plots"

    def log(self, record: Mapping[str, object]) -> None:
        """Adds one event, see :meth:`fedcl.records.events.EventLog.add`. Safe from several threads."""
        if self._lock is None:
            raise RuntimeError(_NOT_OWNED.format(self.path))
        self._log.add(record)
        self.last[str(record["event"])] = record

    def events(self) -> list[dict[str, Any]]:
        """See :func:`fedcl.records.events.read_events`."""
        return read_events(self.path / EVENTS)

    def sync_events(self) -> None:
        """Returns once all events so far are on the disk; for use before a checkpoint."""
        self._log.sync()

    def write(self, name: str, data: bytes) -> Path:
        """Replaces the file ``name`` (may have folders in it) in one step, durably.

        Raises:
            RunFailed: it could not be written; its earlier content is intact.
        """
        path = self._owned_path(name)
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, data)
        return path

    def write_config(self, text: str) -> None:
        """Writes ``config.yaml``."""
        self.write(CONFIG, text.encode())

    def write_environment(self, environment: Mapping[str, object]) -> None:
        """Writes ``environment.json``."""
        self._write_json(ENVIRONMENT, environment)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Writes ``summary.json``; undefined metrics are None.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        self._write_json(SUMMARY, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """The content of ``summary.json``; None before the run has ended.

        Raises:
            RunFailed: the file is damaged.
        """
        path = self.path / SUMMARY
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise RunFailed(f"{path} is damaged ({error}); `fedcl resume {self.path}` writes it again") from error
        return found

    def write_matrix(self, rows: Sequence[Sequence[float | None]]) -> None:
        """Writes ``accuracy_matrix.csv``: accuracies in [0, 1], no header, None (undefined) as an empty cell.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        self.write(MATRIX, _csv(MATRIX, rows))

    def read_matrix(self) -> list[list[float | None]]:
        """The content of ``accuracy_matrix.csv``; empty cells are None, a missing file is []."""
        path = self.path / MATRIX
        if not path.exists():
            return []
        rows = csv.reader(io.StringIO(path.read_text()))
        return [[float(cell) if cell else None for cell in row] for row in rows]

    def write_rounds(self, columns: Sequence[str], rows: Rows) -> None:
        """Writes ``rounds.csv``: a header, then one row an evaluated round; None as an empty cell.

        Raises:
            ValueError: a row has another length than ``columns``, or a number is NaN or infinite.
        """
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"{ROUNDS}: every row needs {len(columns)} cells")
        self.write(ROUNDS, _csv(ROUNDS, [columns, *rows]))

    def close(self) -> None:
        """Lets go of the lock. Nothing can be written after."""
        self._log.close()
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_json(self, name: str, value: Mapping[str, object]) -> None:
        try:
            text = files.to_json(value, indent=2)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self.write(name, text.encode() + b"\n")

    def _owned_path(self, name: str) -> Path:
        if self._lock is None:
            raise RuntimeError(_NOT_OWNED.format(self.path))
        return self.path / name


def _acquire(path: Path) -> int:
    with files.writing(path / _LOCK):
        lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            allowed = "another process works in this folder; wait for it, or choose another name or seed"
            raise UsageError("output.dir", str(path), allowed) from None
        except OSError:
            os.close(lock)
            raise
    return lock


def _refuse_used(path: Path) -> None:
    if (path / CONFIG).exists():
        allowed = f"the folder holds a run already; `fedcl resume {path}` goes on; name=NEW or seed=N starts another"
        raise UsageError("output.dir", str(path), allowed)
    if any(not entry.name.startswith(".") for entry in path.iterdir()):
        allowed = f"it is not empty and holds no {CONFIG} to resume; remove it, or choose another name or seed"
        raise UsageError("output.dir", str(path), allowed)


def _require_run(path: Path) -> None:
    if not (path / CONFIG).is_file():
        around = [p for p in sorted([*path.glob("seed-*"), *path.parent.glob("seed-*")]) if (p / CONFIG).is_file()]
        allowed = f"must be the folder of a run, NAME/seed-N with a {CONFIG}"
        raise UsageError("RUN_DIR", str(path), allowed, map(str, around))


def _csv(name: str, rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        if any(isinstance(cell, numbers.Real) and not math.isfinite(cell) for cell in row):
            raise ValueError(f"{name}: a number is not finite in {list(row)}")
        writer.writerow(["" if cell is None else cell for cell in row])
    return text.getvalue().encode()
