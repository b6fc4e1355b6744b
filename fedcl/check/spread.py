"""Checks of scenarios and partitions: the stream and its split are sound, and a pure function of the settings."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..build import build_split
from ..cards import summary_of
from ..errors import UsageError
from ..strategy import Strategy
from ..stream import Split, Stream
from . import generators
from .declared import NAME
from .lab import EDGE, Lab
from .results import Failed, NotApplicable, Report, Result, outcome, silence


class Plain(Strategy):
    """Federated averaging: what the stream is trained with."""

    name = "plain_averaging_of_fedcl_check"


@dataclass
class Ground:
    """Streams and splits of one scenario or partition class."""

    cls: type[Any]
    kind: registry.Kind
    lab: Lab

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that name the class."""
        key = "scenario.name" if self.kind == "scenarios" else "partition.name"
        return {**EDGE, key: self.cls.name}

    def split(self, changes: Mapping[str, Any] | None = None) -> tuple[Stream, Split]:
        """Stream and split, not trained on."""
        with registry.standing_in(self.kind, self.cls), registry.standing_in("strategies", Plain):
            stream, split, _ = build_split(self.lab.config({**self.changes, **(changes or {})}))
        return stream, split


def check_told(ground: Ground) -> str:
    """The class has a name and a line of description."""
    if not NAME.fullmatch(ground.cls.name):
        raise Failed(f"name = {ground.cls.name!r} must be lower case with underscores")
    summary = summary_of(ground.cls)
    if not summary:
        raise Failed("the class has no docstring or summary; it is what `fedcl list` shows")
    return summary


def check_stream(ground: Ground) -> str:
    """Tasks hold training rows that exist, none of them also held out for validation or tested before its class."""
    stream, _ = ground.split()
    for stage in stream.stages:
        if not len(stage.train_ids):
            raise Failed(f"task {stage.index + 1} has no training images")
        if len(np.intersect1d(stage.train_ids, stage.validation_ids)):
            raise Failed(f"task {stage.index + 1}: a training image is also held out for validation")
        for what, ids, labels in (
            ("training", stage.train_ids, stream.train_labels), ("test", stage.test_ids, stream.test_labels),
        ):  # fmt: skip
            if len(ids) and not 0 <= ids.min() <= ids.max() < len(labels):
                raise Failed(f"task {stage.index + 1}: a {what} row is not in the data set")
            unseen = set(labels[ids].tolist()) - set(stream.known(stage.index))
            if unseen:
                raise Failed(f"task {stage.index + 1} has {what} images of class {min(unseen)}, which it never exposed")
    return f"{stream.num_tasks} tasks, {len(stream.known(stream.num_tasks - 1))} classes"


def check_disjoint(ground: Ground) -> str:
    """No image of a task is at two clients, and all are at one, unless the rule leaves some out."""
    stream, split = ground.split()
    left = 0
    for stage, task in zip(stream.stages, split.rows, strict=True):
        rows = np.concatenate(task)
        if len(np.unique(rows)) < len(rows):
            raise Failed(f"task {stage.index + 1}: two clients hold the same image")
        if len(np.setdiff1d(rows, stage.train_ids)):
            raise Failed(f"task {stage.index + 1}: a client holds an image that is not of this task")
        left += len(stage.train_ids) - len(rows)
    return "every image is at one client" + (f"; {left} are left to nobody" if left else "")


def check_pure(ground: Ground) -> str:
    """The same settings give the same stream and split, whatever the global generators say, which stay untouched."""
    found = []
    for seed in (21, 22):
        with generators.seeded(seed):
            before = generators.states()
            stream, split = ground.split()
            moved = [n for n, a, b in zip(generators.NAMES, before, generators.states(), strict=True) if a != b]
        if moved:
            raise Failed(f"{moved[0]} is drawn from; fedcl.random draws by name instead")
        held = [[ids.tolist() for ids in task] for task in split.rows]
        found.append((stream.class_order, [s.train_ids.tolist() for s in stream.stages], held))
    if found[0] != found[1]:
        raise Failed("two builds with the same settings differ; it must depend on its arguments only")
    return "the same settings give the same rows"


def check_crowd(ground: Ground) -> str:
    """More clients than images: some are empty, or the setting is refused."""
    try:
        _, split = ground.split({"federation.clients": 90})
    except UsageError as error:
        raise NotApplicable(f"refused: {error}") from error
    return f"{sum(map(len, split.empty))} empty clients of {90 * len(split.rows)}"


def check_trains(ground: Ground) -> str:
    """A run on it ends."""
    with registry.standing_in(ground.kind, ground.cls):
        summary = ground.lab.run(ground.changes).summary
    return f"{summary['num_tasks']} tasks with {summary['num_clients']} clients"


CHECKS: dict[str, Callable[[Ground], str]] = {
    "told": check_told,
    "stream": check_stream,
    "disjoint": check_disjoint,
    "pure": check_pure,
    "crowd": check_crowd,
    "trains": check_trains,
}


def check_spread(
    cls: type[Any],
    kind: registry.Kind,
    settings: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
    tell: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Checks a scenario or a partition; arguments as of :func:`fedcl.check.check_strategy`.

    Raises:
        UsageError: no such check, or the settings do not fit the class.
    """
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise UsageError("--only", unknown[0], f"must be one of {', '.join(CHECKS)}", CHECKS)
    started = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="fedcl-check-") as place, silence():
        ground = Ground(cls, kind, Lab(Plain, settings or {}, Path(place)))
        try:
            ground.split()
        except UsageError as error:
            hint = f"{error.allowed}; give the check settings that fit, as {error.key}=VALUE"
            raise UsageError(error.key, error.value, hint) from error
        for name, check in CHECKS.items():
            if not only or name in only:
                results.append(outcome(name, partial(check, ground)))
                tell(results[-1])
    return Report(cls.name, f"{cls.__module__}:{cls.__qualname__}", tuple(results), time.monotonic() - started)
