"""What each round and each task did and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..records.runfolder import EVENTS
from ..records.runs import Run
from ..tell.progress import size
from .parts import SPACE, UNDEFINED, Cell, Column, Table, count, number, numbers, percent


def rounds_table(events: Sequence[Mapping[str, Any]], most: int) -> Table:
    """A row a round, from the events of a run."""
    told = [event for event in events if event["event"] == "round"]
    spent = {(e["task"], e["round"]): e for e in events if e["event"] == "costs"}
    rows = []
    for index, event in enumerate(told):
        place = (event["task"], event["round"])
        losses = event.get("losses") or {}
        cost = spent.get(place, {})
        rows.append((
            Cell(f"{place[0] + 1}.{place[1] + 1}", float(index)), percent(event.get("accuracy_seen")),
            number(sum(losses.values()) if losses else None, 4), count(event.get("clients")),
            count(event.get("samples")), count(event.get("steps")), _bytes(event.get("bytes_up")),
            _bytes(event.get("bytes_down")), number(_sum(cost.get("seconds")), 3),
        ))  # fmt: skip
    titles = (
        "Accuracy on seen tasks (%)",
        "Loss",
        "Clients",
        "Images",
        "Steps",
        "Sent up",
        "Sent down",
        "Time of clients (s)",
    )
    caption = "Rounds: task.round, both from 1"
    return Table("rounds", caption, (Column("Round", "text"), *numbers(titles)), tuple(rows)).cut(most, EVENTS)


def tasks_table(run: Run) -> Table:
    """A row a task: what it cost, and the accuracy after it."""
    sent = run.summary.get("bytes_per_task") or []
    costs = (run.metric("costs.per_task") or []) if isinstance(run.summary.get("costs"), Mapping) else []
    took = (run.metric("measured.per_task") or []) if isinstance(run.summary.get("measured"), Mapping) else []
    seen = run.summary.get("session_accuracy") or []
    tested = run.summary.get("test_counts") or []
    rows = []
    for task in range(run.num_tasks):
        up, down = sent[task] if task < len(sent) else (None, None)
        work, time = _at(costs, task), _at(took, task)
        rows.append((
            Cell(f"Task{SPACE}{task + 1}", task), count(_of(tested, task)), percent(_of(seen, task)), _bytes(up),
            _bytes(down), _flops(work.get("flops")), number(time.get("client_seconds"), 2),
        ))  # fmt: skip
    titles = (
        "Test images",
        "Accuracy on seen tasks (%)",
        "Sent up",
        "Sent down",
        "Work of clients (GFLOP)",
        "Time of clients (s)",
    )
    return Table("tasks", "What each task cost", (Column("Task", "text"), *numbers(titles)), tuple(rows))


def _at(rows: Sequence[Mapping[str, Any]], index: int) -> Mapping[str, Any]:
    return rows[index] if index < len(rows) else {}


def _of(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _bytes(value: float | None) -> Cell:
    return Cell(UNDEFINED, None) if value is None else Cell(size(round(value)), float(value))


def _flops(value: float | None) -> Cell:
    return number(None if value is None else value / 1e9, 3)


def _sum(values: Sequence[float] | None) -> float | None:
    return None if values is None else sum(values)
