"""One point of a sweep, wherever it is run: starts or continues the run and says how it ended."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import FedclError, Interrupted
from ..tell.progress import QuietProgress, Standing

if TYPE_CHECKING:
    from .plan import Point

Status = Literal["done", "stopped", "failed", "interrupted", "waiting"]
Tell = Callable[[Mapping[str, Any]], None]

BETWEEN = 0.2
"""Seconds between two reports of where a run stands, at least."""


@dataclass(frozen=True)
class Job:
    """A point as a message to another process: plain JSON values.

    Attributes:
        settings: all settings, as a mapping of sections.
        folder: of the run.
        again: whether the folder holds a run to go on with.
    """

    settings: dict[str, Any]
    folder: str
    again: bool

    @classmethod
    def of(cls, point: Point) -> Job:
        """The job of a point that is not done."""
        return cls(asdict(point.config), str(point.folder), point.state == "resume")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``stopped`` where a callback asked for it, ``waiting`` where it has not been started.
        cause: of a failure or a stop, one line.
        peak: the most memory its process ever held, in bytes; 0 where it is not known.
    """

    status: Status
    cause: str | None = None
    peak: int = 0

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Outcome:
        """From a message; what else stands in it is left out."""
        return cls(**{field.name: told[field.name] for field in fields(cls) if field.name in told})


class Telling(QuietProgress):
    """Sends where a run stands, not more often than every :data:`BETWEEN` seconds but at the end of a task."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._tasks = self._rounds = 0
        self._last = 0.0

    def start(self, title: str, tasks: int, rounds: int, done: int) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        self._tasks, self._rounds = tasks, rounds
        self._say(done // max(rounds, 1), done % max(rounds, 1), Standing())

    def round(self, task: int, round: int, standing: Standing) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        if time.monotonic() - self._last >= BETWEEN:
            self._say(task, round + 1, standing)

    def task_done(self, task: int, standing: Standing) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        self._say(task, self._rounds, standing)

    def _say(self, task: int, round: int, standing: Standing) -> None:
        self._last = time.monotonic()
        at = {"task": task, "tasks": self._tasks, "round": round, "rounds": self._rounds}
        self._tell({"event": "at", **at, "accuracy": standing.accuracy, "forgetting": standing.forgetting})


def perform(job: Job, tell: Tell) -> Outcome:
    """Runs one point to its end, in this process.

    Args:
        tell: is given where the run stands.
    """
    status: Status = "done"
    cause = None
    folder = Path(job.folder)
    try:
        summary = _run(job, folder, tell)
        if summary["status"] == "stopped":
            status, cause = "stopped", str(summary["cause"])
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
    except FedclError as error:
        status, cause = "failed", str(error)
    except Exception as error:
        from ..commands.crash import stored

        status, cause = "failed", stored(error, folder)
    return Outcome(status, cause, peak_memory())


def _run(job: Job, folder: Path, tell: Tell) -> Mapping[str, Any]:
    from ..config import load_config
    from ..run import execute, resume
    from .states import clear_unstarted, write_asked

    if job.again:
        return resume(folder, progress=Telling(tell)).summary
    clear_unstarted(folder)
    config = load_config(job.settings)
    write_asked(folder, config)
    return execute(config, progress=Telling(tell)).summary


def peak_memory() -> int:
    """The most memory that this process held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
