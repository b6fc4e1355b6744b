"""Points of a sweep on this machine: worker processes that are kept, watched and replaced."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from ..errors import Interrupted
from .board import Board
from .job import Job, Outcome
from .machine import Room
from .plan import Point

Message = dict[str, Any]


class Scheduler(Protocol):
    """Whatever runs points."""

    @property
    def title(self) -> str:
        """What it runs them with, for a person."""

    def run(self, points: Sequence[Point], board: Board) -> list[Outcome]:
        """Runs points; an outcome for each, ``waiting`` for those that Ctrl-C kept from starting.

        Raises:
            RunFailed: Ray cannot be used.
            Interrupted: Ctrl-C was pressed a second time.
        """

    def close(self) -> None:
        """Ends what it started."""


class Child:
    """A worker process and the point it is at.

    Args:
        number: of the worker, from 0.
        room: what it may use.
        logs: folder for what it prints.
        keep: file descriptor that it holds open, so that the sweep's lock lasts as long as its workers.
        inbox: where its messages go, None for its end.
    """

    def __init__(self, number: int, room: Room, logs: Path, keep: int, inbox: queue.SimpleQueue[Any]) -> None:
        self.number, self.at = number, -1
        self.log = logs / f"worker-{number}.log"
        self._inbox = inbox
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in a terminal reaches the sweep alone, which tells its workers in order.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedcl.sweep.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, **room.environment(number)}, pass_fds=(keep,), start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self._inbox.put((self, json.loads(line)))
        self.process.wait()
        self._inbox.put((self, None))

    def give(self, place: int, job: Job) -> None:
        """Hands it a job."""
        assert self.process.stdin is not None
        self.at = place
        with contextlib.suppress(OSError):  # a worker that has died is noticed by its end
            self.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self.process.stdin.flush()

    def why(self) -> str:
        """Why it ended."""
        code = self.process.returncode
        said = self.log.read_text(errors="replace").strip().splitlines()
        last = f"; it said last: {said[-1]}" if said else ""
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (the system kills a process so when memory runs out)" if -code == signal.SIGKILL else ""
            return f"its worker was killed by {name}{hint}{last}"
        return f"its worker ended with exit code {code}{last}"

    def end(self) -> None:
        """No more jobs: it ends once it is idle."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class Pool:
    """Worker processes. Use as a context manager, from the main thread.

    Args:
        room: how many, and what each may use.
        logs: folder for what they print.
        keep: file descriptor that they hold open.
    """

    def __init__(self, room: Room, logs: Path, keep: int) -> None:
        self.room, self._logs, self._keep = room, logs, keep
        self._limit = room.workers
        self._peak = 0
        self._children: list[Child] = []
        self._inbox: queue.SimpleQueue[tuple[Child | None, Message | None]] = queue.SimpleQueue()
        self._stops = 0

    @property
    def title(self) -> str:
        """See :class:`Scheduler`."""
        return self.room.words

    def run(self, points: Sequence[Point], board: Board) -> list[Outcome]:
        """See :class:`Scheduler`."""
        outcomes = [Outcome("waiting") for _ in points]
        todo = list(range(len(points)))
        self._stops = 0
        with self._stopping():
            while todo or self._busy():
                self._hand_out(todo, points, board)
                child, message = self._inbox.get()
                if child is None:
                    self._stop(todo, board)
                elif message is None:
                    self._buried(child, outcomes, board)
                elif message["event"] == "at":
                    board.at(child.at, message)
                else:
                    self._ended(child, message, outcomes, board)
        return outcomes

    def _busy(self) -> list[Child]:
        return [child for child in self._children if child.at >= 0]

    def _hand_out(self, todo: list[int], points: Sequence[Point], board: Board) -> None:
        while todo and len(self._busy()) < self._limit:
            idle = next((child for child in self._children if child.at < 0), None)
            if idle is None:
                free = min(set(range(self._limit)) - {child.number for child in self._children})
                idle = Child(free, self.room, self._logs, self._keep, self._inbox)
                self._children.append(idle)
            place = todo.pop(0)
            idle.give(place, Job.of(points[place]))
            board.started(place)

    def _ended(self, child: Child, message: Message, outcomes: list[Outcome], board: Board) -> None:
        place, child.at = child.at, -1
        outcomes[place] = Outcome.of(message)
        board.ended(place, outcomes[place])
        if outcomes[place].peak > self._peak:
            self._peak = outcomes[place].peak
            fitting = self.room.fitting(self._peak)
            if fitting < self._limit:
                peak = f"{self._peak / 2**30:.1f} GB"
                board.message(f"note: {fitting} runs at a time from now on: one held {peak} of memory")
            self._limit = min(self._limit, fitting)
        if len(self._children) > self._limit:
            self._children.remove(child)
            child.end()

    def _buried(self, child: Child, outcomes: list[Outcome], board: Board) -> None:
        if child not in self._children:
            return
        self._children.remove(child)
        if child.at >= 0:
            outcomes[child.at] = Outcome("failed", child.why())
            board.ended(child.at, outcomes[child.at])

    def _stop(self, todo: list[int], board: Board) -> None:
        todo.clear()
        if self._stops > 1:
            raise Interrupted("stopped at once; the last checkpoints are whole")
        board.message("stopping: every run saves a checkpoint; Ctrl-C again stops at once")
        for child in self._busy():
            child.process.send_signal(signal.SIGINT)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self._stops += 1
            self._inbox.put((None, None))

        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def close(self) -> None:
        """Ends all workers; one that is busy is killed."""
        for child in self._children:
            if child.at >= 0:
                child.process.kill()
            child.end()
        for child in self._children:
            try:
                child.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
