"""Whoever wants to know between rounds how a run goes, and may end it: loggers, and functions of the user.

A callback sees numbers, never the model: what it does cannot change them. It is called on the server, between rounds,
when the state that it is told of is already safe to be saved. It answers

- nothing (None), or False: go on;
- True: end the run here. A checkpoint is saved, the status is ``stopped``, ``fedcl resume`` goes on;
- ``(stop, metrics)``: the same, and numbers of its own for ``events.jsonl`` and the loggers.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..dotted import find_object
from ..errors import RunFailed, Stopped, UsageError
from ..registry import failure

if TYPE_CHECKING:
    from ..config import Config, Output

Kind = Literal["run_start", "round", "task", "run_end"]
Answer = bool | tuple[bool, Mapping[str, float]] | None


@dataclass(frozen=True)
class Event:
    """What a callback is told.

    Attributes:
        kind: ``run_start``, ``round`` (one is over), ``task`` (one is over and evaluated) or ``run_end``.
        step: rounds since the start of the run, those before a resume included.
        task, round: 0-based; None where there is none.
        metrics: numbers by name; one that is undefined or was not measured is not there.
        folder: the run folder.
        settings: all settings, nested.
        status: of ``run_end``: done, stopped, interrupted or failed; empty before.
    """

    kind: Kind
    step: int
    task: int | None
    round: int | None
    metrics: dict[str, float]
    folder: Path
    settings: dict[str, Any]
    status: str = ""


class Callback:
    """Base of callbacks that are classes; every method's default does nothing."""

    def run_start(self, event: Event) -> Answer:
        """The run begins, or goes on at ``event.step``."""
        return None

    def round_done(self, event: Event) -> Answer:
        """A round is over: losses by term, clients, samples, bytes; ``accuracy_seen`` where it was evaluated."""
        return None

    def task_done(self, event: Event) -> Answer:
        """A task is over: ``accuracy_seen``, ``forgetting``, ``accuracy/task_1`` and on."""
        return None

    def run_end(self, event: Event) -> Answer:
        """The run is over, see ``event.status``; of a run that is done, the numbers of its summary."""
        return None


Function = Callable[[Event], Answer]
Told = Callback | Function

ALLOWED = "must be the dotted name of a function or of a fedcl.Callback, package.module:name"


def load_callbacks(output: Output, given: Sequence[Told] = ()) -> list[tuple[str, Told]]:
    """(name, callback) of those in the settings and of given ones, the loggers last.

    Args:
        output: the section with ``callbacks`` and ``loggers``.
        given: more of them, as objects.

    Raises:
        UsageError: a name that means nothing, no function and no callback, or a logger whose package is missing.
    """
    found = [(text, _made(text)) for text in output.callbacks]
    for one in given:
        if not (isinstance(one, Callback) or callable(one)):
            raise UsageError("callbacks", repr(one), "must be a function of an event, or a fedcl.Callback")
        found.append((getattr(one, "__qualname__", type(one).__qualname__), one))
    if output.loggers:
        from .loggers import make_logger

        found += [(name, make_logger(name)) for name in output.loggers]
    return found


def _made(text: str) -> Told:
    found = find_object(text, "output.callbacks", ALLOWED)
    if isinstance(found, type) and issubclass(found, Callback):
        try:
            return found()
        except Exception as error:
            raise UsageError("output.callbacks", text, f"cannot be made: {failure(error)}") from error
    if isinstance(found, Callback) or (callable(found) and not isinstance(found, type)):
        return found
    raise UsageError("output.callbacks", text, ALLOWED)


class Observers:
    """All callbacks of a run.

    Args:
        callbacks: (name, callback) in the order in which they are called.
        config: of the run.
        folder: the run folder.
        log: writes an event of ``events.jsonl``.
    """

    def __init__(
        self,
        callbacks: Sequence[tuple[str, Told]],
        config: Config,
        folder: Path,
        log: Callable[[Mapping[str, object]], None],
    ) -> None:
        self._callbacks, self._log = callbacks, log
        self._rounds = config.federation.rounds
        self._plain = Event("run_start", 0, None, None, {}, folder, asdict(config) if callbacks else {})

    def start(self, task: int, round: int) -> None:
        """The run begins, or goes on, before a round of a task.

        Raises:
            Stopped: a callback asked to stop.
            RunFailed: a callback failed.
        """
        self._plain = replace(self._plain, step=task * self._rounds + round)
        self._tell(self._plain)

    def told(self, record: Mapping[str, Any]) -> None:
        """A round or a task is over; ``record`` is its event of ``events.jsonl``.

        Raises:
            Stopped: a callback asked to stop.
            RunFailed: a callback failed.
        """
        if not self._callbacks:
            return
        task, round = record["task"], record["round"]
        step = (task + 1) * self._rounds if round is None else task * self._rounds + round + 1
        self._plain = replace(self._plain, step=step)
        kind: Kind = "task" if round is None else "round"
        self._tell(replace(self._plain, kind=kind, task=task, round=round, metrics=numbers_of(record)))

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """The run is over. Every callback is told, also after one that fails.

        Raises:
            RunFailed: a callback failed.
        """
        first: RunFailed | None = None
        event = replace(self._plain, kind="run_end", status=status, metrics=numbers_of(summary))
        for pair in self._callbacks:
            try:
                event = self._one(pair, event)[1]
            except RunFailed as error:
                first = first or error
        self._callbacks = ()
        if first is not None:
            raise first

    def close(self, status: str, say: Callable[[str], None]) -> None:
        """The run ended early; what callbacks then get wrong is said, because the first cause is worth more."""
        try:
            self.end(status, {})
        except RunFailed as error:
            say(str(error))

    def _tell(self, event: Event) -> None:
        stops = []
        for pair in self._callbacks:
            stop, event = self._one(pair, event)
            if stop:
                stops.append(pair[0])
        if stops:
            after = "before the first round" if event.round is None and event.task is None else _place(event)
            raise Stopped(f"callback {stops[0]} asked to stop {after}")

    def _one(self, pair: tuple[str, Told], event: Event) -> tuple[bool, Event]:
        """Whether one callback asks to stop, and the event with its own metrics for those that follow."""
        name, callback = pair
        method = {"round": "round_done", "task": "task_done"}.get(event.kind, event.kind)
        try:
            answer = getattr(callback, method)(event) if isinstance(callback, Callback) else callback(event)
        except Exception as error:
            raise RunFailed(f"callback {name} failed in {method}: {failure(error)}") from error
        stop, own = _understood(name, answer)
        if own:
            twice = sorted(own.keys() & event.metrics.keys())
            if twice:
                raise RunFailed(f"callback {name} returned a metric {twice[0]!r}, a name that is taken; choose another")
            place = {"task": event.task, "round": event.round}
            self._log({"event": "callback", "source": name, "about": event.kind, **place, "metrics": own})
        return stop, replace(event, metrics={**event.metrics, **own})


def _understood(name: str, answer: object) -> tuple[bool, dict[str, float]]:
    """A callback's answer as (stop, metrics).

    >>> _understood("f", None), _understood("f", (True, {"gap": 1}))
    ((False, {}), (True, {'gap': 1.0}))
    """
    stop, own = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if not (stop is None or isinstance(stop, bool)) or not isinstance(own, Mapping):
        wanted = "it may return None, True (stop), False, or (stop, metrics by name)"
        raise RunFailed(f"callback {name} returned {type(answer).__name__}: {answer!r}; {wanted}")
    metrics: dict[str, float] = {}
    for key, value in own.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not isinstance(key, str) or not number or not math.isfinite(value):
            raise RunFailed(f"callback {name} returned the metric {key!r} = {value!r}; it must be a finite number")
        metrics[key] = float(value)
    return bool(stop), metrics


def _place(event: Event) -> str:
    task = f"after task {(event.task or 0) + 1}"
    return task if event.round is None else f"{task}, round {event.round + 1}"


def numbers_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name; those of inner mappings as ``outer/inner``, of each task as ``name/task_1``.

    >>> numbers_of({"event": "task", "accuracy": [0.5, None], "losses": {"task": 2.0}, "round": 1})
    {'accuracy/task_1': 0.5, 'losses/task': 2.0}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if not prefix and name in ("task", "round", "seed"):
            continue
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            found[prefix + name] = float(value)
        elif isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}/")
        elif name == "accuracy" and isinstance(value, list):
            found |= {f"{prefix}{name}/task_{i + 1}": float(v) for i, v in enumerate(value) if v is not None}
    return found
