"""Local training of many clients as one stacked model: steps of :mod:`fedcl.local.training` under ``torch.func.vmap``.

Draws inside a step are counter-based, so a client sees the same numbers alone and stacked; results agree within
rounding. What all clients of a stack share (the broadcast model before the first step) is not copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import RunFailed
from .bank import Stacked
from .batching import make_plan
from .lanes import Training
from .phases import in_phases
from .training import Client, Trained, not_finite


@dataclass(frozen=True)
class Cohort:
    """What a stack of clients has trained.

    Attributes:
        clients: with their outcome, in the order in which they were given.
        active: places in ``clients`` of those that took a step.
        arrays: parameters and buffers of the active ones, (active, ...), in the order of ``active``.
        seconds: what one step of a client took: the time of all, shared by the steps.
    """

    clients: list[tuple[Client, Trained]]
    active: list[int]
    arrays: Stacked
    seconds: float = 0.0


def train_cohort(clients: Sequence[Client], limit: int | None = None) -> Cohort:
    """A round of local training of several clients of one node, each with images.

    Args:
        limit: most steps to take, to try a strategy out.

    Raises:
        RunFailed: a loss is not finite, or a strategy failed.
        Interrupted: the user asked to stop.
    """
    stacks: list[Phased] = []

    def train(now: list[Client]) -> list[Trained]:
        stacks.append(train_stack(now, limit))
        return stacks[-1].outcomes

    outcomes = in_phases(clients, train)
    active = [i for i in (stacks[0].order if stacks else []) if outcomes[i].steps]
    if len(stacks) == 1:
        arrays = stacks[0].arrays
    else:
        names = [*clients[0].node.trainable, *clients[0].node.buffers] if active else []
        arrays = {n: torch.stack([outcomes[i].arrays[n] for i in active]) for n in names}
    return Cohort(list(zip(clients, outcomes, strict=True)), active, arrays)


@dataclass(frozen=True)
class Phased:
    """What a stack has done in one phase.

    Attributes:
        outcomes: in the order in which the clients were given.
        order: their places, those with most steps first.
        arrays: parameters and buffers of those that took a step, in that order.
    """

    outcomes: list[Trained]
    order: list[int]
    arrays: Stacked


def train_stack(clients: Sequence[Client], limit: int | None = None) -> Phased:
    """One phase of local training of several clients, each from its ``begins``; see :func:`train_cohort`."""
    plans = [make_plan(client, limit) for client in clients]
    order = sorted(range(len(plans)), key=lambda i: -len(plans[i].batches))
    training = Training([plans[i] for i in order])
    training.run()
    back = dict(zip(order, training.results(), strict=True))
    for place, client in enumerate(clients):
        losses = back[place].losses
        if not all(math.isfinite(v) for v in losses.values()):
            raise RunFailed(not_finite(client, losses))
    active = sum(1 for p in plans if p.batches)
    arrays = training.params.stacked(active) | training.moving.stacked(active) | training.buffers.stacked(active)
    return Phased([back[i] for i in range(len(plans))], order, arrays)
