"""The diary of a run, ``events.jsonl``: one JSON object a line, only ever added to."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedcl.records import files


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of ``events.jsonl`` in the order of the file, each (task, round) as its last attempt told it.

    An attempt that does a round again supersedes what earlier attempts said about it. Events without a
    round are all kept. Lines that a crash tore are left out; a missing file has no events.
    """
    events = _parse(path)
    last: dict[tuple[object, object], int] = {}
    for event in events:
        if event["round"] is not None:
            where = (event["task"], event["round"])
            last[where] = max(last.get(where, 0), event["attempt"])
    return [e for e in events if e["round"] is None or e["attempt"] == last[e["task"], e["round"]]]


def _parse(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    events: list[dict[str, Any]] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and isinstance(event.get("attempt"), int):
            events.append({"task": None, "round": None, **event})
    return events


def last_attempt(path: Path) -> int:
    """The highest attempt that any event tells of; 0 if there is none."""
    return max((event["attempt"] for event in _parse(path)), default=0)


class EventLog:
    """Writes events of one attempt.

    Args:
        path: ``events.jsonl``; made at the first event.
        attempt: how many times the run was started, this one included.
        clock: seconds since 1970.
    """

    def __init__(self, path: Path, attempt: int, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.attempt = attempt
        self._clock = clock
        self._descriptor: int | None = None
        self._guard = threading.Lock()

    def add(self, record: Mapping[str, object]) -> None:
        """Adds one event. Safe from several threads.

        Args:
            record: ``event`` (what happened) and anything else that strict JSON can hold; ``task`` and
                ``round`` are null unless given. ``time`` (seconds since 1970) and ``attempt`` are added.

        Raises:
            RunFailed: it could not be written; earlier events are intact.
            ValueError: a number is not finite, ``event`` is missing, or ``time`` or ``attempt`` was given.
        """
        if "event" not in record or {"time", "attempt"} & record.keys():
            raise ValueError(f"an event needs a name, and no time or attempt of its own: {dict(record)}")
        head = {"event": record["event"], "time": round(self._clock(), 3), "attempt": self.attempt}
        place = {"task": None, "round": None}
        line = files.to_json({**head, **place, **record}).encode(errors="replace") + b"\n"
        with self._guard, files.writing(self.path):
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
            _append(self._descriptor, line)

    def sync(self) -> None:
        """Returns once all events so far are on the disk."""
        if self._descriptor is not None:
            with files.writing(self.path):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; the next event opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


def _append(descriptor: int, line: bytes) -> None:
    """Adds a whole line or nothing."""
    before = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, before)
        raise


def end_torn_line(path: Path) -> None:
    """Ends a line that a crash cut short, so that the next event has a line of its own."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        with files.writing(path), path.open("ab") as stream:
            stream.write(b"\n")
