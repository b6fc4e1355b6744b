"""What ``fedcl sweep`` does between its arguments and what it prints."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UsageError
from ..records.files import writing
from .board import Board, make_board
from .job import Outcome
from .machine import make_room
from .plan import PRIVATE, Point, make_points
from .pool import Pool, Scheduler
from .prepare import Asked, Prepared, prepare
from .results import number, read_finished
from .states import state_of
from .table import Swept


def dry_run(asked: Asked) -> list[dict[str, Any]]:
    """What a sweep would do: ``variant``, ``seed``, ``settings``, ``folder`` and ``todo`` of every run.

    Raises:
        UsageError: see :func:`prepare`; a search has no list of runs.
    """
    if asked.search is not None:
        raise UsageError("--dry-run", True, "cannot list a search: what it tries depends on what it finds")
    words = {"new": "run", "resume": "resume", "done": "nothing, it is done"}
    return [
        {"variant": p.variant, "seed": p.seed, "settings": p.settings, "folder": str(p.folder), "todo": words[p.state]}
        for p in prepare(asked).points()
    ]


def sweep(asked: Asked) -> Swept:
    """Runs a sweep to its end: points that are done are left, others are started or gone on with.

    Raises:
        UsageError: wrong arguments; nothing has run. Or another sweep works in the folder.
        RunFailed: Ray cannot be used, or the folder cannot be written.
        Interrupted: Ctrl-C; the command that goes on is named.
    """
    prepared = prepare(asked)
    points = prepared.points() if asked.search is None else []
    planned = None
    if asked.search is not None:
        from .search import plan_search

        planned = plan_search(prepared, asked.search, asked.tune_on)
    with locked(prepared.root) as (logs, lock):
        points = [p if p.state == "done" else replace(p, state=state_of(p.folder, p.config)) for p in points]
        board = make_board(asked.quiet, sys.stderr, results)
        trials = len(prepared.variants) * (asked.search or 0)
        todo = sum(p.state != "done" for p in points)
        scheduler = make_scheduler(asked, prepared, max(todo, min(trials, 8)), logs, lock)
        try:
            board.message(scheduler.title)
            searched = None
            if planned is not None:
                from .search import search

                best, searched = search(prepared, planned, scheduler, board)
                points = make_points(prepared.loader, best, prepared.seeds, prepared.root)
            outcomes = run_points(points, scheduler, board, prepared.name)
        except Interrupted as stop:
            raise Interrupted(f"{stop}; go on with: {asked.command}") from None
        finally:
            board.close()
            scheduler.close()
    swept = Swept(prepared.name, prepared.root, points, outcomes, searched)
    open_ = sum(outcome.status in ("interrupted", "waiting") for outcome in outcomes)
    if open_:
        raise Interrupted(f"interrupted, {open_} of {len(points)} runs are not done; go on with: {asked.command}")
    return swept


def run_points(points: Sequence[Point], scheduler: Scheduler, board: Board, title: str) -> list[Outcome]:
    """Runs what is not done; an outcome for every point."""
    todo = [point for point in points if point.state != "done"]
    done, resumed = len(points) - len(todo), sum(point.state == "resume" for point in todo)
    counts = f", {done} done already" * bool(done) + f", {resumed} to go on with" * bool(resumed)
    board.begin(f"{title}: {len(points)} runs{counts}", todo)
    found = iter(scheduler.run(todo, board) if todo else [])
    return [Outcome("done") if point.state == "done" else next(found) for point in points]


def make_scheduler(asked: Asked, prepared: Prepared, runs: int, logs: Path, lock: int) -> Scheduler:
    """Whatever runs the points."""
    if asked.scheduler == "ray":
        from .on_ray import Cluster

        return Cluster(prepared.base.engine, asked.workers)
    return Pool(make_room(asked.workers, max(1, runs), prepared.base), logs, lock)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[tuple[Path, int]]:
    """The sweep's folder for one sweep at a time: the folder for what workers print, and the lock.

    Raises:
        UsageError: another sweep works there.
    """
    logs = root / PRIVATE
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
        lock = os.open(logs / "lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            allowed = "another sweep works in this folder, or workers of a killed one, which stop at their next step"
            raise UsageError("output.dir", str(root), f"{allowed}; wait for it, or choose another name") from None
        yield logs, lock
    finally:
        os.close(lock)


def results(point: Point) -> tuple[float | None, float | None]:
    """Accuracy and forgetting of a finished point."""
    finished = read_finished(point.folder)
    return number(finished, "average_accuracy"), number(finished, "forgetting")
