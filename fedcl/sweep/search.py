"""Hyper-parameter search under the rules of continual learning, by optuna.

A trial sees the first tasks of the stream, or another stream, and is judged on the held-out training images alone: it
runs with ``evaluate.on=validation``, where no test image can be read. Each method (a strategy stack, a protocol, an
entry of ``sweep.runs``) gets the same number of trials; the best settings of each are then run on the full stream.

What is tried depends on the seed and on what was found, never on how many workers there are: trials are asked for in
groups of :data:`TOGETHER`. So a search that was stopped is gone on with by asking again; trials that are done are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import Config
from ..errors import Interrupted, UsageError
from ..records.events import read_events
from ..records.files import to_json, write_atomic
from ..records.runfolder import EVENTS
from ..settings.resolve import anchored, resolve
from ..stream import DatasetLabels, Stage, Stream
from ..streams.loading import load_images
from .board import Board
from .grid import Axis, Range, Settings
from .job import Outcome
from .names import name_variants
from .plan import PRIVATE, Loader, Point, Variant
from .pool import Scheduler
from .prepare import METHODS
from .results import number, read_finished
from .states import state_of
from .trials import Ask, Method, Trial, ask, make_method

if TYPE_CHECKING:
    from ..data.store import Dataset
    from .prepare import Prepared

TOGETHER = 4
"""Trials of a method that are asked for at once, none knowing the results of the others."""

OBJECTIVE = "validation_accuracy"


@dataclass(frozen=True)
class Rule:
    """What a trial may see.

    Attributes:
        first: tasks of the stream; None: all of another stream.
        seed: of the stream and of all else that is random.
    """

    first: int | None
    seed: int

    @property
    def settings(self) -> Settings:
        """What makes a run a trial."""
        first = {} if self.first is None else {"scenario.first": self.first}
        return {**first, "evaluate.on": "validation", "output.plots": False}

    @property
    def words(self) -> str:
        """For a person."""
        if self.first is None:
            return f"validation images of the stream of seed {self.seed}"
        tasks = f"{self.first} task{'s' * (self.first > 1)}"
        return f"validation images of the first {tasks} of the stream of seed {self.seed}"


def parse_rule(text: str | None, seeds: Sequence[int]) -> Rule:
    """What ``--tune-on`` says; ``first:2`` without it.

    Raises:
        UsageError: it says nothing of sense, or names the seed of a final run.
    """
    kind, colon, raw = (text or "first:2").partition(":")
    allowed = "must be first:K (the first K tasks) or stream:SEED (another stream)"
    if kind not in ("first", "stream") or not colon or not (raw.isascii() and raw.isdigit()):
        raise UsageError("--tune-on", text, allowed, ("first:2",))
    value = int(raw)
    if kind == "first":
        return Rule(value, seeds[0])
    if value in seeds:
        raise UsageError("--tune-on", text, f"must be a seed that no final run has: they have {_some(seeds)}")
    return Rule(None, value)


def check_apart(rule: Rule, config: Config) -> None:
    """Refuses a rule by which a trial would see all tasks of the stream that the final runs are tested on.

    Args:
        rule: what trials see.
        config: of a final run.

    Raises:
        UsageError: as said, or the stream cannot be built.
    """
    dataset, stream = load_tasks(config)
    if rule.first is not None:
        if not 1 <= rule.first < stream.num_tasks:
            allowed = f"must be at least first:1 and fewer tasks than the stream has, {stream.num_tasks}"
            raise UsageError("--tune-on", f"first:{rule.first}", allowed)
        return
    other_data, other = load_tasks(replace(config, seed=rule.seed))
    if stream.num_tasks == other.num_tasks and all(
        same_task(dataset, one, other_data, two) for one, two in zip(stream.stages, other.stages, strict=True)
    ):
        allowed = f"must be first:K: with these settings of {config.scenario.name} every seed has the same tasks"
        raise UsageError("--tune-on", f"stream:{rule.seed}", allowed)


def same_task(dataset: Dataset, task: Stage, other_data: Dataset, other: Stage) -> bool:
    """Whether two tasks have the same images; one stands for all where a scenario changes pixels."""
    rows = np.union1d(task.train_ids, task.validation_ids)
    if not np.array_equal(rows, np.union1d(other.train_ids, other.validation_ids)):
        return False
    one = torch.from_numpy(rows[:1])
    return torch.equal(dataset.train.gather(one), other_data.train.gather(one))


def load_tasks(config: Config) -> tuple[Dataset, Stream]:
    """The images and the stream of tasks of a run, which nobody holds yet."""
    scenario = resolve(config).scenario()
    dataset = load_images(config, scenario, "cpu")
    stream = scenario.build(DatasetLabels.of(dataset), config.scenario, config.data.validation, config.seed)
    return dataset, replace(stream, stages=stream.stages[: config.scenario.first])


@dataclass(frozen=True)
class Planned:
    """A search that is checked and ready.

    Attributes:
        trials: of each method.
        rule: what a trial may see.
        methods: what is searched for each.
    """

    trials: int
    rule: Rule
    methods: list[Method]


def plan_search(prepared: Prepared, trials: int, tune_on: str | None) -> Planned:
    """What is to be searched for each method, by which rule; checked before anything runs or is written.

    Raises:
        UsageError: there is nothing to search, or nothing that trials could be judged by.
    """
    rule = parse_rule(tune_on, prepared.seeds)
    if prepared.base.data.validation == 0:
        raise UsageError("data.validation", 0.0, "must be above 0 for a search: it is what trials are judged on")
    space: list[Axis | Range] = [axis for axis in prepared.request.axes if axis.key not in METHODS]
    space += prepared.request.ranges
    if not space:
        raise UsageError("--search", trials, "has nothing to search: give KEY=LOW..HIGH[:log] or KEY=A,B")
    for variant in prepared.variants:
        check_apart(rule, prepared.loader.load(variant.settings, {"seed": prepared.seeds[0]}, variant.leave_out))
    methods = [make_method(prepared.loader, variant, space, rule.seed) for variant in prepared.variants]
    return Planned(trials, rule, methods)


def search(
    prepared: Prepared, planned: Planned, scheduler: Scheduler, board: Board
) -> tuple[list[Variant], dict[str, Any]]:
    """Searches for each method, and writes ``search.json``.

    Returns:
        The methods with their best settings, to be run on the full stream, and the content of ``search.json``.

    Raises:
        RunFailed: all trials of a method failed.
        Interrupted: by Ctrl-C; calling again goes on.
    """
    trials, rule, methods = planned.trials, planned.rule, planned.methods
    place = prepared.root / PRIVATE / "search"
    board.message(f"{prepared.name}: {trials} trials of each of {len(methods)} methods, judged by {rule.words}")
    while asked := [pair for method in methods for pair in group(method, trials)]:
        points = [trial_point(prepared.loader, method, one, rule, place) for method, one in asked]
        last = max(one.number for _, one in asked)
        outcomes = judged(points, scheduler, board, f"{prepared.name}: trials up to {last + 1} of {trials} a method")
        for (method, one), point, outcome in zip(asked, points, outcomes, strict=True):
            method.trials.append(told(one, point, outcome))
            method.tell(one.handle, method.trials[-1].value)
    found = report(prepared, rule, trials, methods)
    write_atomic(prepared.root / "search.json", to_json(found, indent=2).encode() + b"\n")
    best = [{**method.variant.settings, **method.best.settings} for method in methods]
    names = name_variants(best, "tuned")
    variants = [
        replace(m.variant, name=name, settings=settings) for m, name, settings in zip(methods, names, best, strict=True)
    ]
    return variants, found


def group(method: Method, trials: int) -> list[tuple[Method, Ask]]:
    """The next trials of a method, at most :data:`TOGETHER`; [] once it has had its number of them."""
    found: list[Ask] = []
    while len(found) < min(TOGETHER, trials - len(method.trials)) and not method.exhausted:
        one = ask(method, found)
        found += [one] if one is not None else []
    return [(method, one) for one in found]


def trial_point(loader: Loader, method: Method, one: Ask, rule: Rule, place: Path) -> Point:
    """The run of a trial, in a folder that no comparison looks into."""
    settings = {**method.variant.settings, **one.settings}
    name = f"trial-{one.number:03d}"
    own = {"name": name, "seed": rule.seed, "output.dir": str(place / method.variant.name)}
    config = anchored(loader.load({**settings, **rule.settings}, own, method.variant.leave_out))
    folder = place / method.variant.name / name / f"seed-{rule.seed}"
    return Point(f"{method.variant.name} {name}", settings, config, folder, state_of(folder, config))


def judged(points: Sequence[Point], scheduler: Scheduler, board: Board, title: str) -> list[Outcome]:
    """Runs trials; those that are done already are read.

    Raises:
        Interrupted: some were not run to their end.
    """
    from .command import run_points

    outcomes = run_points(points, scheduler, board, title)
    if any(outcome.status in ("interrupted", "waiting") for outcome in outcomes):
        raise Interrupted("interrupted in the search")
    return outcomes


def objective(point: Point) -> float | None:
    """The value of a finished trial: accuracy on the held-out training images of the tasks that it saw.

    Nothing else of a run is read, and no run whose numbers could be of test images.

    Raises:
        RuntimeError: the run was not evaluated on validation images alone.
    """
    from ..config import load_config

    stored = load_config(point.folder / "config.yaml")
    if stored.evaluate.on != "validation" or point.config.evaluate.on != "validation":
        raise RuntimeError(f"{point.folder}: a trial must run with evaluate.on=validation")
    return number(read_finished(point.folder), OBJECTIVE)


def told(one: Ask, point: Point, outcome: Outcome) -> Trial:
    """What came of a trial, and what it cost."""
    value = objective(point) if outcome.status == "done" else None
    trial = Trial(one.number, one.settings, outcome.status, value, outcome.cause, str(point.folder))
    rounds = [event for event in read_events(point.folder / EVENTS) if event["event"] == "round"]
    federation = point.config.federation
    trial.rounds = len(rounds)
    if federation.epochs is not None:
        trial.images = sum(int(event["samples"]) * federation.epochs for event in rounds)
    else:
        trial.images = sum(int(event["steps"]) * federation.batch_size for event in rounds)
    if outcome.status == "done":
        trial.seconds = number(read_finished(point.folder), "wall_seconds") or 0.0
    return trial


def report(prepared: Prepared, rule: Rule, trials: int, methods: Sequence[Method]) -> dict[str, Any]:
    """The content of ``search.json``."""
    spent = [trial for method in methods for trial in method.trials]
    return {
        "name": prepared.name,
        "judged_by": f"{OBJECTIVE}: {rule.words}",
        "tuned_on": {"first": rule.first, "seed": rule.seed},
        "sampler": {"name": "TPE", "seed": rule.seed, "together": TOGETHER},
        "trials_a_method": trials,
        "budget": budget(spent),
        "final_seeds": prepared.seeds,
        "methods": [
            {
                "method": method.variant.name, "settings": method.variant.settings,
                "space": [_described(part) for part in method.space], "best": vars(method.best),
                "budget": budget(method.trials), "trials": [vars(trial) for trial in method.trials],
            }
            for method in methods
        ],
    }  # fmt: skip


def budget(trials: Sequence[Trial]) -> dict[str, float]:
    """What trials cost together."""
    return {
        "trials": len(trials), "failed": sum(trial.value is None for trial in trials),
        "rounds": sum(trial.rounds for trial in trials), "images": sum(trial.images for trial in trials),
        "seconds": round(math.fsum(trial.seconds for trial in trials), 3),
    }  # fmt: skip


def _described(part: Axis | Range) -> dict[str, Any]:
    if isinstance(part, Axis):
        return {"key": part.key, "values": list(part.values)}
    return {"key": part.key, "low": part.low, "high": part.high, "log": part.log, "whole": part.whole}


def _some(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds[:8])) + (" and more" if len(seeds) > 8 else "")
