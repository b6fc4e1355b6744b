"""How a run tells a person where it stands, on stderr: live on a terminal, in plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

Clock = Callable[[], float]


@dataclass(frozen=True)
class Standing:
    """What is known after a round or a task; None where it was not measured or is undefined.

    Attributes:
        accuracy: on the classes seen so far, in [0, 1].
        forgetting: over the tasks so far, in [-1, 1].
        bytes_sent: up and down, since the start of the run.
    """

    accuracy: float | None = None
    forgetting: float | None = None
    bytes_sent: int = 0


class Progress(Protocol):
    """What a run tells. Tasks and rounds count from 0, people read them from 1."""

    def start(self, title: str, tasks: int, rounds: int, done: int) -> None:
        """The run begins: ``tasks`` times ``rounds``, of which ``done`` were done before a resume."""

    def round(self, task: int, round: int, standing: Standing) -> None:
        """A round is over."""

    def task_done(self, task: int, standing: Standing) -> None:
        """A task is over and evaluated."""

    def message(self, text: str) -> None:
        """Something that the user should know, one line."""

    def finish(self) -> None:
        """The run is over, well or not; may be called twice."""


def percent(share: float | None) -> str:
    """A share in [0, 1] for people.

    >>> percent(0.8314), percent(None)
    ('83.1 %', '-')
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def size(count: int) -> str:
    """Bytes for people, in powers of 1000.

    >>> size(999), size(12_345_678), size(999_950)
    ('999 B', '12.3 MB', '1.0 MB')
    """
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} PB"


def duration(seconds: float | None) -> str:
    """A time span for people.

    >>> duration(59.2), duration(125), duration(3725), duration(200_000), duration(None)
    ('59 s', '2 min 05 s', '1 h 02 min', '2 d 07 h', '-')
    """
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


class Pace:
    """Time left, from the mean time a round took since the start, evaluations included."""

    def __init__(self, total: int, done: int, clock: Clock) -> None:
        self.total, self.done = total, done
        self._first, self._clock, self._start = done, clock, clock()

    def left(self) -> float | None:
        """Seconds; None before the first round."""
        new = self.done - self._first
        if new <= 0:
            return None
        return (self._clock() - self._start) / new * (self.total - self.done)


def _story(standing: Standing) -> str:
    return (
        f"accuracy {percent(standing.accuracy)}, forgetting {percent(standing.forgetting)}, "
        f"sent {size(standing.bytes_sent)}"
    )


class QuietProgress:
    """Says nothing."""

    def start(self, title: str, tasks: int, rounds: int, done: int) -> None:
        """See :class:`Progress`."""

    def round(self, task: int, round: int, standing: Standing) -> None:
        """See :class:`Progress`."""

    def task_done(self, task: int, standing: Standing) -> None:
        """See :class:`Progress`."""

    def message(self, text: str) -> None:
        """See :class:`Progress`."""

    def finish(self) -> None:
        """See :class:`Progress`."""


class PlainProgress:
    """One line a round; in runs of over 200 rounds one for every 2 %, or every minute if that is more.

    Args:
        stream: where lines go.
        clock: seconds, from any start.
    """

    many = 200
    share = 0.02
    heartbeat = 60.0

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._tasks = self._rounds = self._told_done = 0
        self._told_at = 0.0
        self._pace = Pace(0, 0, clock)

    def start(self, title: str, tasks: int, rounds: int, done: int) -> None:
        """See :class:`Progress`."""
        self._tasks, self._rounds, self._told_done = tasks, rounds, done
        self._told_at = self._clock()
        self._pace = Pace(tasks * rounds, done, self._clock)
        again = f", going on after round {done} of {tasks * rounds}" if done else ""
        self.message(f"{title}: {tasks} tasks of {rounds} rounds{again}")

    def round(self, task: int, round: int, standing: Standing) -> None:
        """See :class:`Progress`."""
        pace = self._pace
        pace.done = task * self._rounds + round + 1
        few = pace.total <= self.many
        enough = pace.done - self._told_done >= self.share * pace.total
        if few or enough or self._clock() - self._told_at >= self.heartbeat:
            self._told_done, self._told_at = pace.done, self._clock()
            self.message(
                f"task {task + 1}/{self._tasks} round {round + 1}/{self._rounds}: {_story(standing)}, "
                f"ETA {duration(pace.left())}"
            )

    def task_done(self, task: int, standing: Standing) -> None:
        """See :class:`Progress`."""
        self.message(f"task {task + 1}/{self._tasks} done: {_story(standing)}")

    def message(self, text: str) -> None:
        """See :class:`Progress`."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def finish(self) -> None:
        """See :class:`Progress`."""
        self._stream.flush()


class RichProgress:
    """A live line at the bottom of a terminal; finished tasks and messages scroll above it.

    Args:
        stream: the terminal.
        clock: seconds, from any start.
    """

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._console = Console(file=stream)
        self._clock = clock
        self._tasks = self._rounds = 0
        self._pace = Pace(0, 0, clock)
        # Standard output is the machine's: a line printed there must not be sent to the terminal's live area.
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[story]}", markup=False),
            console=self._console,
            redirect_stdout=False,
            transient=True,
            get_time=clock,
        )
        self._line = self._bar.add_task("", total=None, story="", visible=False)

    def start(self, title: str, tasks: int, rounds: int, done: int) -> None:
        """See :class:`Progress`."""
        self._tasks, self._rounds = tasks, rounds
        self._pace = Pace(tasks * rounds, done, self._clock)
        self.message(title)
        where = f"task {min(done // max(rounds, 1) + 1, tasks)}/{tasks}"
        self._bar.update(self._line, total=tasks * rounds, completed=done, description=where, visible=True)
        self._bar.start()

    def round(self, task: int, round: int, standing: Standing) -> None:
        """See :class:`Progress`."""
        self._pace.done = task * self._rounds + round + 1
        where = f"task {task + 1}/{self._tasks} round {round + 1}/{self._rounds}"
        story = (
            f"ETA {duration(self._pace.left())} | acc {percent(standing.accuracy)} | "
            f"forget {percent(standing.forgetting)} | {size(standing.bytes_sent)}"
        )
        self._bar.update(self._line, completed=self._pace.done, description=where, story=story)

    def task_done(self, task: int, standing: Standing) -> None:
        """See :class:`Progress`."""
        self.message(f"task {task + 1}/{self._tasks}: {_story(standing)}")

    def message(self, text: str) -> None:
        """See :class:`Progress`."""
        self._console.print(Text(text))

    def finish(self) -> None:
        """See :class:`Progress`."""
        self._bar.stop()


def make_progress(quiet: bool, stream: TextIO) -> Progress:
    """Nothing if ``quiet``; live if ``stream`` is a terminal that can move its cursor; else plain lines."""
    if quiet:
        return QuietProgress()
    if stream.isatty() and not Console(file=stream).is_dumb_terminal:
        return RichProgress(stream)
    return PlainProgress(stream)
