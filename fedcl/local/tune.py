"""Measures which settings of the engine are fastest for a run on this machine, and keeps them for later runs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import config as settings
from ..errors import Interrupted, RunFailed
from ..federation.cohort import cohort_size
from ..records.environment import usable_cpus
from ..run import execute
from ..settings.resolve import resolve
from ..tell.progress import QuietProgress, Standing
from .engine import Choice, device_of, key, prepare_table, remember

CHUNKS = (5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Trial:
    """One way to compute and what it took.

    Attributes:
        seconds: median of a round; None if it failed.
        why: the reason of a failure, else empty.
    """

    choice: Choice
    seconds: float | None
    why: str = ""

    def line(self) -> str:
        """One line for the terminal."""
        c = self.choice
        stack = "" if c.path == "sequential" else f", {c.chunk or 'all'} clients at once"
        took = f"{self.seconds:.3f} s a round" if self.seconds is not None else f"failed: {self.why}"
        return f"{c.path}{stack}, {c.threads or usable_cpus()} threads, {c.memory_format}: {took}"


@dataclass(frozen=True)
class Tuned:
    """What ``fedcl tune`` found.

    Attributes:
        name: what the choice is good for, see :func:`fedcl.local.engine.key`.
        trials: in the order of measuring.
        path: of the table that keeps the choice.
    """

    name: str
    trials: list[Trial]
    best: Trial
    path: Path

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        rows = [{**asdict(t.choice), "seconds": t.seconds, "why": t.why} for t in self.trials]
        return {"for": self.name, "chosen": asdict(self.best.choice), "trials": rows, "table": str(self.path)}


class Clock(QuietProgress):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def round(self, task: int, round: int, standing: Standing) -> None:
        """A round is over."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def tune(config: settings.Config, rounds: int, tell: Callable[[Trial], None]) -> Tuned:
    """Measures a run's settings in all sensible ways and stores the fastest.

    Args:
        config: the run; its first task is trained for a few rounds, in a temporary folder.
        rounds: measured ones a trial, after a first that is not.
        tell: called after each trial.

    Raises:
        RunFailed: no way works; the first reason is given.
    """
    device = device_of(config.engine.device)
    name = key(config, device)
    prepare_table()
    trials: list[Trial] = []

    def measure(choice: Choice) -> None:
        trials.append(measured(config, choice, rounds))
        tell(trials[-1])

    centralised = any(s.centralised for s in resolve(config).strategies)
    cohort = 1 if centralised else cohort_size(config, config.federation.clients)
    for choice in candidates(device, cohort):
        measure(choice)
    best = fastest(trials)
    if device.type == "cpu" and usable_cpus() > 1:
        for path in ("sequential", "stacked"):
            if done := [t for t in trials if t.choice.path == path and t.seconds is not None]:
                measure(replace(fastest(done).choice, threads=1))
        best = fastest(trials)
    return Tuned(name, trials, best, remember(name, best.choice))


def candidates(device: torch.device, cohort: int) -> Iterator[Choice]:
    """Ways to compute, with all threads."""
    yield Choice("sequential")
    if device.type == "cpu":
        yield Choice("sequential", memory_format="channels_last")
    if cohort > 1:
        yield from (Choice("stacked", chunk) for chunk in CHUNKS if chunk < cohort)
        yield Choice("stacked")


def measured(config: settings.Config, choice: Choice, rounds: int) -> Trial:
    """The median seconds of a round; of a way that fails, or that the engine had to leave, the reason."""
    engine = replace(config.engine, **(asdict(choice) | {"threads": choice.threads or usable_cpus()}))
    with tempfile.TemporaryDirectory(prefix="fedcl-tune-") as folder:
        short = replace(
            config, engine=engine, scenario=replace(config.scenario, first=1),
            federation=replace(config.federation, rounds=rounds + 1), output=settings.Output(folder, plots=False),
            checkpoint=replace(config.checkpoint, every=0), evaluate=replace(config.evaluate, every=0),
        )  # fmt: skip
        clock = Clock()
        try:
            execute(short, progress=clock)
        except RunFailed as error:
            return Trial(choice, None, str(error))
        except Interrupted:
            raise Interrupted("interrupted; nothing was kept") from None
    gaps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return Trial(choice, statistics.median(gaps))


def fastest(trials: list[Trial]) -> Trial:
    """The trial with the shortest round.

    Raises:
        RunFailed: none of them worked.
    """
    done = [t for t in trials if t.seconds is not None]
    if not done:
        raise RunFailed(f"nothing could be measured: {trials[0].why}")
    return min(done, key=lambda t: t.seconds or 0.0)
