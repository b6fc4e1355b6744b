"""What happened during a run: warnings, changes of the engine, attempts; and where it happened."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..records.runs import Run
from .parts import Cell, Column, Table, words

MOST_LINES = 200


@dataclass(frozen=True)
class Diary:
    """What ``events.jsonl`` tells.

    Attributes:
        warnings: each distinct line once, with how often it was said.
        kinds: how many events of each kind.
        note: how often the run was started, from when to when.
    """

    warnings: tuple[tuple[str, int], ...]
    kinds: Table
    note: str


def diary_of(events: Sequence[Mapping[str, Any]]) -> Diary:
    """From the events of a run."""
    said: Counter[str] = Counter()
    for event in events:
        if event["event"] == "warning":
            said[str(event.get("message"))] += 1
        elif event["event"] == "engine":
            what = f"{event['chunk']} clients at a time" if "chunk" in event else "clients one by one"
            said[f"{_where(event)}: from here on {what}: {event.get('why')}"] += 1
        elif event["event"] == "round" and event.get("samples") == 0:
            said[f"{_where(event)}: no client of the cohort could train"] += 1
    kinds = Counter(str(event["event"]) for event in events)
    table = Table(
        "events", "Events by kind", (Column("Event", "text"), Column("How many")),
        tuple((words(kind), Cell(str(n), n)) for kind, n in sorted(kinds.items())),
    )  # fmt: skip
    times = [float(event["time"]) for event in events if isinstance(event.get("time"), int | float)]
    attempts = max((int(event["attempt"]) for event in events), default=0)
    started = {0: "Nothing was written down.", 1: "Started once"}.get(attempts, f"Started {attempts} times")
    note = f"{started}: {_moment(min(times))} to {_moment(max(times))}." if times else started
    left = len(said) - MOST_LINES
    lines = list(said.items())[:MOST_LINES]
    if left > 0:
        lines.append((f"and {left} more lines in events.jsonl", 1))
    return Diary(tuple(lines), table, note)


def origin_of(run: Run) -> tuple[tuple[str, str], ...]:
    """Name and value: hashes of the results, versions and machine; without ``environment.json`` the hashes alone."""
    found = [(key, str(run.summary[key])) for key in ("model_sha256", "state_sha256", "split_sha256")
             if run.summary.get(key)]  # fmt: skip
    try:
        environment = json.loads((run.folder / "environment.json").read_bytes())
        versions = environment.pop("versions", {})
    except (OSError, ValueError, AttributeError):
        return tuple(found)
    for name, value in environment.items():
        if value not in (None, []):
            found.append((name.replace("_", " "), _item(value)))
    return (*found, *((name, str(version)) for name, version in versions.items() if version))


def _item(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_item, value))
    return str(value)


def _where(event: Mapping[str, Any]) -> str:
    task, round_ = event.get("task"), event.get("round")
    if task is None:
        return "the run"
    return f"task {task + 1}" + ("" if round_ is None else f", round {round_ + 1}")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
