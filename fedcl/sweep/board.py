"""Where a sweep stands, on stderr: one live table on a terminal, a line for each run elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..tell.progress import Clock, duration, percent
from .job import Outcome
from .plan import Point

HEARTBEAT = 60.0
"""Seconds after which lines tell of runs that are on, where nothing else was told."""

MOST_ROWS = 20
"""Variants in the live table; with more, those that are running come first."""


@dataclass
class Standing:
    """What is known of one run.

    Attributes:
        status: of an outcome, or ``running``.
        at: its last report.
        accuracy, forgetting: of a finished one, else as last reported.
        started: when, by the clock of the board.
    """

    status: str = "waiting"
    at: Mapping[str, Any] | None = None
    accuracy: float | None = None
    forgetting: float | None = None
    started: float = 0.0

    @property
    def where(self) -> str:
        """Task and round, for a person."""
        if self.at is None:
            return "starting"
        at = self.at
        return f"task {min(at['task'] + 1, at['tasks'])}/{at['tasks']} round {at['round']}/{at['rounds']}"

    @property
    def so_far(self) -> str:
        """The accuracy that was last reported, for a person; empty before there is one."""
        return "" if self.accuracy is None else f", {percent(self.accuracy)}"

    @property
    def share(self) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.at is None:
            return float(self.status == "done")
        return float(min(1.0, (self.at["task"] + self.at["round"] / self.at["rounds"]) / self.at["tasks"]))


class Board:
    """Says nothing; the base of those that do.

    Args:
        results: reads accuracy and forgetting of a finished point.
        clock: seconds, from any start.
    """

    def __init__(
        self, results: Callable[[Point], tuple[float | None, float | None]], clock: Clock = time.monotonic
    ) -> None:
        self._results, self._clock = results, clock
        self.points: Sequence[Point] = ()
        self.standings: list[Standing] = []
        self.title = ""
        self._begun = 0.0

    def begin(self, title: str, points: Sequence[Point]) -> None:
        """A set of points is to be run."""
        self.title, self.points = title, points
        self.standings = [Standing() for _ in points]
        self._begun = self._clock()
        self.message(title)

    def started(self, place: int) -> None:
        """A point was handed to a worker."""
        standing = self.standings[place]
        standing.status, standing.started = "running", self._clock()
        self.changed()

    def at(self, place: int, told: Mapping[str, Any]) -> None:
        """A point reports ``task``, ``tasks``, ``round``, ``rounds``, ``accuracy`` and ``forgetting``."""
        standing = self.standings[place]
        standing.at, standing.accuracy, standing.forgetting = told, told["accuracy"], told["forgetting"]
        self.changed()

    def ended(self, place: int, outcome: Outcome) -> None:
        """A point has ended, well or not."""
        standing = self.standings[place]
        standing.status = outcome.status
        if outcome.status == "done":
            standing.accuracy, standing.forgetting = self._results(self.points[place])
        self.told(place, outcome)
        self.changed()

    def left(self) -> float | None:
        """Seconds until all is done, if the rest goes as what was done; None before anything was."""
        ended = ("done", "failed", "stopped")
        done = sum(1.0 if s.status in ended else s.share for s in self.standings if s.status != "waiting")
        spent = self._clock() - self._begun
        return spent / done * (len(self.standings) - done) if done >= 0.05 else None

    def count(self, status: str) -> int:
        """How many points have a status."""
        return sum(s.status == status for s in self.standings)

    def told(self, place: int, outcome: Outcome) -> None:
        """Hook: a point has ended."""

    def changed(self) -> None:
        """Hook: something is to be drawn again."""

    def message(self, text: str) -> None:
        """Hook: something that the user should know, one line."""

    def close(self) -> None:
        """Nothing more will be told."""


class LineBoard(Board):
    """A line for each run that ends, and one a minute for those that are on."""

    def __init__(
        self,
        stream: TextIO,
        results: Callable[[Point], tuple[float | None, float | None]],
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(results, clock)
        self._stream, self._last = stream, clock()

    def told(self, place: int, outcome: Outcome) -> None:
        """See :class:`Board`."""
        standing, point = self.standings[place], self.points[place]
        over = self.count("done") + self.count("failed")
        head = f"{over}/{len(self.points)} {point.label}"
        if outcome.status == "done":
            spent = duration(self._clock() - standing.started)
            values = f"accuracy {percent(standing.accuracy)}, forgetting {percent(standing.forgetting)}"
            rest = f", ETA {duration(self.left())}" if over < len(self.points) else ""
            self.message(f"{head}: {values}, {spent}{rest}")
        elif outcome.status == "failed":
            self.message(f"{head}: FAILED: {outcome.cause}")
        else:
            why = f": {outcome.cause}" if outcome.cause else ""
            self.message(f"{point.label}: {outcome.status} at {standing.where}{why}")

    def changed(self) -> None:
        """See :class:`Board`."""
        if self._clock() - self._last >= HEARTBEAT:
            on = [f"{p.label} at {s.where}" for p, s in self._running()]
            self.message(f"running: {'; '.join(on)}; ETA {duration(self.left())}")

    def _running(self) -> list[tuple[Point, Standing]]:
        return [(p, s) for p, s in zip(self.points, self.standings, strict=True) if s.status == "running"]

    def message(self, text: str) -> None:
        """See :class:`Board`."""
        self._last = self._clock()
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveBoard(Board):
    """One table at the bottom of a terminal: a row for each variant; messages scroll above it."""

    def __init__(
        self,
        stream: TextIO,
        results: Callable[[Point], tuple[float | None, float | None]],
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(results, clock)
        self._console = Console(file=stream)
        # What is printed on standard output is the machine's and must not be drawn into.
        self._live = Live(
            get_renderable=self.draw, console=self._console, refresh_per_second=4, transient=True, redirect_stdout=False
        )

    def begin(self, title: str, points: Sequence[Point]) -> None:
        """See :class:`Board`."""
        super().begin(title, points)
        self._live.start()

    def told(self, place: int, outcome: Outcome) -> None:
        """See :class:`Board`."""
        if outcome.status == "failed":
            self.message(f"{self.points[place].label}: FAILED: {outcome.cause}")

    def message(self, text: str) -> None:
        """See :class:`Board`."""
        self._console.print(Text(text))

    def close(self) -> None:
        """See :class:`Board`."""
        self._live.stop()

    def draw(self) -> RenderableType:
        """The table as it stands."""
        rows: dict[str, list[tuple[Point, Standing]]] = {}
        for point, standing in zip(self.points, self.standings, strict=True):
            rows.setdefault(point.variant, []).append((point, standing))
        shown = sorted(rows, key=lambda name: all(s.status != "running" for _, s in rows[name]))[:MOST_ROWS]
        table = Table(box=SIMPLE_HEAD)
        for name, side in (("variant", "left"), ("done", "right"), ("accuracy", "right"), ("forgetting", "right")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]  # one of rich's words
        table.add_column("now")
        for name in (name for name in rows if name in shown):
            runs = rows[name]
            done = [s for _, s in runs if s.status == "done"]
            now = [f"seed {p.seed}: {s.where}{s.so_far}" for p, s in runs if s.status == "running"]
            failed = [f"seed {p.seed} failed" for p, s in runs if s.status == "failed"]
            table.add_row(
                Text(name), f"{len(done)}/{len(runs)}", spread([s.accuracy for s in done]),
                spread([s.forgetting for s in done]), Text("; ".join([*now, *failed])),
            )  # fmt: skip
        hidden = f", {len(rows) - len(shown)} variants not shown" if len(rows) > len(shown) else ""
        text = (
            f"{self.count('done')}/{len(self.points)} done, {self.count('running')} running, "
            f"{self.count('failed')} failed, ETA {duration(self.left())}{hidden}"
        )
        return Group(table, Text(text))


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation of shares in [0, 1], for people; '-' without any.

    >>> spread([0.25, 0.75]), spread([0.5]), spread([None]), spread([0.5, None])
    ('50.0 ± 35.4 %', '50.0 %', '-', '50.0 % (1 of 2 defined)')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = 100 * statistics.fmean(known)
    text = f"{mean:.1f} ± {100 * statistics.stdev(known):.1f} %" if len(known) > 1 else f"{mean:.1f} %"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} defined)"


def make_board(quiet: bool, stream: TextIO, results: Callable[[Point], tuple[float | None, float | None]]) -> Board:
    """Nothing if ``quiet``; live if ``stream`` is a terminal that can move its cursor; else lines."""
    if quiet:
        return Board(results)
    if stream.isatty() and not Console(file=stream).is_dumb_terminal:
        return LiveBoard(stream, results)
    return LineBoard(stream, results)
