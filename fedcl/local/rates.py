"""Learning rate schedules, and what the section ``optimiser`` may say (no torch)."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence

from fedcl.config import Optimiser
from fedcl.errors import UsageError

NAMES = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "linear", "step")
UNITS = ("step", "round", "task")


def check(config: Optimiser) -> None:
    """Raises :class:`fedcl.errors.UsageError` for the first value of the section that is not allowed."""

    def need(good: bool, field: str, allowed: str, names: Sequence[str] = ()) -> None:
        if not good:
            raise UsageError(f"optimiser.{field}", getattr(config, field), allowed, names)

    for field, names in (("name", NAMES), ("schedule", SCHEDULES), ("per", UNITS)):
        need(getattr(config, field) in names, field, f"one of {', '.join(names)}", names)
    need(math.isfinite(config.lr) and config.lr > 0, "lr", "a finite number above 0")
    need(0 <= config.momentum < 1, "momentum", "at least 0 and below 1")
    need(not config.nesterov or config.momentum > 0, "nesterov", "only with a momentum above 0")
    need(0 <= config.weight_decay < math.inf, "weight_decay", "a finite number of at least 0")
    need(len(config.betas) == 2 and all(0 <= b < 1 for b in config.betas), "betas", "two numbers in [0, 1)")
    need(0 < config.eps < math.inf, "eps", "a finite number above 0")
    need(config.clip is None or 0 < config.clip < math.inf, "clip", "a finite number above 0, or null")
    need(config.warmup >= 0, "warmup", "a whole number of at least 0")
    need(0 < config.gamma < math.inf, "gamma", "a finite number above 0")
    need(0 <= config.final <= 1, "final", "a fraction of the learning rate, 0 to 1")
    rising = all(a < b for a, b in itertools.pairwise([0, *config.milestones]))
    need(rising, "milestones", "ascending whole numbers above 0")
    need(config.schedule != "step" or bool(config.milestones), "milestones", "at least one for schedule=step")


def schedule(config: Optimiser, *, step: int = 0, round: int = 0, task: int = 0, total: int) -> float:
    """The learning rate at one moment.

    ``config.per`` picks which of the three counters is t. During ``warmup`` the rate is lr (t + 1) / warmup.
    Cosine and linear then go from lr to final lr over the rest of ``total`` and stay there; ``step``
    multiplies by gamma at each milestone, counted from 0.

    Args:
        step, round, task: 0-based counters, in whatever span the caller lets the schedule run over.
        total: how many of the counted unit the span has.

    Raises:
        UsageError: an unknown schedule or unit.

    >>> [schedule(Optimiser(lr=1.0, schedule="linear"), round=r, total=4) for r in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    counters = {"step": step, "round": round, "task": task}
    if config.per not in counters:
        raise UsageError("optimiser.per", config.per, f"one of {', '.join(UNITS)}", UNITS)
    t = counters[config.per]
    if t < config.warmup:
        return config.lr * (t + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return float(config.lr * config.gamma ** bisect_right(config.milestones, t))
    done = min(1.0, (t - config.warmup) / max(1, total - config.warmup))
    if config.schedule == "linear":
        return config.lr * (1.0 + (config.final - 1.0) * done)
    if config.schedule == "cosine":
        return config.lr * (config.final + (1.0 - config.final) * (1.0 + math.cos(math.pi * done)) / 2.0)
    raise UsageError("optimiser.schedule", config.schedule, f"one of {', '.join(SCHEDULES)}", SCHEDULES)
