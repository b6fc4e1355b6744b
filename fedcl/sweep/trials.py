"""Trials of a search: what optuna asks for, and what came of it."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import registry
from ..config import Config
from ..errors import RunFailed
from ..settings.merging import hint
from ..settings.resolve import resolve
from .grid import Axis, Range, Settings, same
from .plan import Loader, Variant, owner_of

REPEATS = 50
"""How often in a row optuna may ask for what was tried before it is taken to have nothing new."""

DIGITS = 3
"""Significant digits of a searched number, so that it can be written down."""


@dataclass
class Trial:
    """One try.

    Attributes:
        number: from 0, within its method.
        settings: what was tried, by dotted key.
        status: of its run.
        value: validation accuracy in [0, 1]; None where the run failed.
        cause: of a failure.
        folder: of its run.
        seconds, rounds, images: what it cost; images are those that steps were taken on.
    """

    number: int
    settings: Settings
    status: str
    value: float | None
    cause: str | None
    folder: str
    seconds: float = 0.0
    rounds: int = 0
    images: int = 0


@dataclass(frozen=True)
class Ask:
    """Settings that optuna asks for.

    Attributes:
        number: of the trial, from 0, within its method.
        settings: by dotted key.
        handle: optuna's.
    """

    number: int
    settings: Settings
    handle: Any


@dataclass
class Method:
    """What is searched for one method.

    Attributes:
        variant: the method.
        space: what is searched.
        study: optuna's.
        failed: optuna's word for a trial without a value.
        trials: so far, in the order of their numbers.
        exhausted: whether nothing is left to try.
    """

    variant: Variant
    space: list[Axis | Range]
    study: Any
    failed: Any
    trials: list[Trial] = field(default_factory=list)
    exhausted: bool = False

    @property
    def best(self) -> Trial:
        """The first of the trials with the highest value.

        Raises:
            RunFailed: none has a value.
        """
        valued = [trial for trial in self.trials if trial.value is not None]
        if not valued:
            cause = self.trials[0].cause if self.trials else "none was run"
            raise RunFailed(f"no trial of {self.variant.name} has a validation accuracy; the first: {cause}")
        return max(valued, key=lambda trial: (trial.value or 0.0, -trial.number))

    def tell(self, handle: Any, value: float | None) -> None:
        """Tells optuna what a trial was worth; None is a failure."""
        self.study.tell(handle, value, state=None if value is not None else self.failed)


def make_method(loader: Loader, variant: Variant, space: Sequence[Axis | Range], seed: int) -> Method:
    """A method and its study. Options of strategies that are not in its stack are no part of its space.

    Raises:
        UsageError: an end of an interval, or a listed value, is no value of its key.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    stack = loader.load(variant.settings, {}, variant.leave_out).strategy
    own = [settle(part) for part in space if not _foreign(part.key, stack)]
    for part in own:
        for value in part.values if isinstance(part, Axis) else (part.low, part.high):
            whole = int(value) if isinstance(part, Range) and part.whole else value
            resolve(loader.load({**variant.settings, part.key: whole}, {}, variant.leave_out))
    sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    return Method(variant, own, study, optuna.trial.TrialState.FAIL)


def settle(part: Axis | Range) -> Axis | Range:
    """An interval of whole numbers as one of numbers, where the setting is a number: ``optimiser.lr=0..1``."""
    if isinstance(part, Axis) or not part.whole:
        return part
    owner = owner_of(part.key)
    if owner is None:
        kind = hint(Config, part.key)
    else:
        options = registry.load("strategies", owner).Options
        kind = typing.get_type_hints(options).get(part.key.split(".", 2)[-1], Any)
    kinds = typing.get_args(kind) or (kind,)
    return replace(part, whole=float not in kinds)


def ask(method: Method, beside: Sequence[Ask]) -> Ask | None:
    """The next trial: settings that the method has not tried; None once it finds no more of them.

    Args:
        beside: asked for, and not told yet.
    """
    for _ in range(REPEATS):
        trial = method.study.ask()
        given = {part.key: suggest(trial, part) for part in method.space}
        earlier = next((one for one in method.trials if same(one.settings, given)), None)
        if earlier is None and not any(same(one.settings, given) for one in beside):
            return Ask(len(method.trials) + len(beside), given, trial)
        method.tell(trial, None if earlier is None else earlier.value)
    method.exhausted = True
    return None


def suggest(trial: Any, part: Axis | Range) -> Any:
    """A value of a key, as optuna draws it."""
    if isinstance(part, Axis):
        # The values themselves may be lists, which optuna does not take.
        names = [json.dumps(value) for value in part.values]
        return part.values[names.index(trial.suggest_categorical(part.key, names))]
    if part.whole:
        return trial.suggest_int(part.key, int(part.low), int(part.high), log=part.log)
    drawn = float(f"{trial.suggest_float(part.key, part.low, part.high, log=part.log):.{DIGITS}g}")
    return min(max(drawn, part.low), part.high)


def _foreign(key: str, stack: list[str]) -> bool:
    owner = owner_of(key)
    return owner is not None and not registry.in_stack(owner, stack)
