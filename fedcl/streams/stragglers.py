"""Slow clients on a simulated clock: what a round waits for, whose update comes too late, who does less.

Time is counted in local steps of a nominal client; a straggler takes ``time.slowdown`` times longer for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .. import random as counter
from .arrival import size_at_hand
from .clocks import nearest

if TYPE_CHECKING:
    from ..settings.schema import Config, Federation
    from ..stream import Split


@dataclass(frozen=True)
class Pace:
    """How a round goes.

    Attributes:
        seconds: simulated duration, in local steps of a nominal client.
        limits: most local steps of stragglers that would be late; 0: what they do does not count, and is not computed.
    """

    seconds: float
    limits: dict[int, int] = field(default_factory=dict)


def stragglers(config: Config, split: Split) -> frozenset[int]:
    """The slow clients of a complete split, drawn once: ``time.stragglers`` of them, to the nearest whole number."""
    count = nearest(config.time.stragglers, split.clients)
    return frozenset(counter.sample(split.clients, count, config.seed, "time", "stragglers"))


def is_slow(config: Config, client: int) -> bool:
    """Whether a client of a drawn population is slow: each is by itself, with the probability ``time.stragglers``."""
    return bool(counter.uniform(1, config.seed, "time", "straggler", client)[0] < config.time.stragglers)


def round_pace(config: Config, split: Split, cohort: Sequence[int], task: int, round_: int) -> Pace:
    """How a round of a cohort goes, see :func:`pace`."""
    sizes = {client: size_at_hand(config, split, task, round_, client) for client in cohort}
    if not config.time.stragglers:
        return pace(config, sizes, frozenset())
    if split.rule:
        return pace(config, sizes, frozenset(client for client in cohort if is_slow(config, client)))
    return pace(config, sizes, stragglers(config, split))


def local_steps(count: int, federation: Federation) -> int:
    """Optimiser steps that a client with ``count`` images plans for a round, see :func:`fedcl.local.order.plan`."""
    size = federation.batch_size
    least = max(federation.batch_min, size if federation.drop_last else 1)
    full, rest = divmod(count, size)
    epoch = full * (size >= least) + (rest >= max(least, 1))
    if not epoch:
        return 0
    if federation.steps is not None:
        return federation.steps
    return epoch * (federation.epochs or 1) * federation.repeats


def pace(config: Config, sizes: Mapping[int, int], slow: frozenset[int]) -> Pace:
    """How a round of some clients goes, by ``time.straggler_policy``.

    The deadline is the time that the round would take if nobody were slow. ``wait``: the round takes as long as the
    slowest needs. ``partial``: who would be late does the steps that fit before the deadline, at least one.
    ``drop``: who would be late is not waited for.

    Args:
        sizes: training images of each client of the cohort.
        slow: the stragglers among all clients.
    """
    time = config.time
    steps = {client: local_steps(size, config.federation) for client, size in sizes.items()}
    takes = {client: count * (time.slowdown if client in slow else 1.0) for client, count in steps.items()}
    deadline = float(max(steps.values(), default=0))
    late = sorted(client for client, needed in takes.items() if needed > deadline)
    if time.straggler_policy == "wait" or not late:
        return Pace(max(takes.values(), default=0.0))
    if time.straggler_policy == "drop":
        return Pace(deadline, dict.fromkeys(late, 0))
    limits = {client: max(1, math.floor(deadline / time.slowdown)) for client in late}
    return Pace(max(deadline, *(most * time.slowdown for most in limits.values())), limits)
