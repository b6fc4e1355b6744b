"""The order in which a client sees its images: the batches of a round, and those of a strategy's extra sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import random as counter
from ..strategy import Phase, Source

Picked = npt.NDArray[np.int64]  # indices into a client's images


def epoch_batches(count: int, size: int, minimum: int, drop_last: bool, *parts: object) -> list[Picked]:
    """The batches of one epoch over ``range(count)`` in a random order.

    Returns index arrays; the last may be smaller, is left out by ``drop_last`` and below ``minimum``.

    >>> [len(b) for b in epoch_batches(5, 2, 1, False, 0)], len(epoch_batches(5, 2, 1, True, 0))
    ([2, 2, 1], 2)
    """
    order = counter.permutation(count, *parts)
    floor = max(minimum, size if drop_last else 1)
    return [order[at : at + size] for at in range(0, count, size) if min(size, count - at) >= floor]


def once_batches(count: int, size: int, minimum: int, drop_last: bool, repeats: int) -> list[Picked]:
    """The batches of one pass over ``range(count)`` in its own order, each ``repeats`` times in a row.

    >>> [b.tolist() for b in once_batches(3, 2, 1, False, 2)]
    [[0, 1], [0, 1], [2], [2]]
    """
    floor = max(minimum, size if drop_last else 1)
    parts = [np.arange(at, min(at + size, count)) for at in range(0, count, size)]
    return [part for part in parts if len(part) >= floor for _ in range(repeats)]


def plan(count: int, config: Any, key: tuple[object, ...], phase: Phase | None = None) -> tuple[list[Picked], int]:
    """All batches of a round and how many images an epoch, or the one pass, leaves out.

    An empty client has an empty plan.

    Args:
        phase: a part of the round with a length of its own.
    """
    federation = config.federation
    epochs, wanted = federation.epochs, federation.steps
    if phase is not None and (phase.epochs is not None or phase.steps is not None):
        epochs, wanted = phase.epochs, phase.steps
    if federation.passes == "once":  # the images come in the order in which the stream shows them
        once = once_batches(
            count, federation.batch_size, federation.batch_min, federation.drop_last, federation.repeats
        )
        dropped = count - sum(len(b) for b in once) // federation.repeats
        return (once if phase is None or phase.steps is None else once[: phase.steps]), dropped

    def epoch(index: int) -> list[Picked]:
        return epoch_batches(
            count, federation.batch_size, federation.batch_min, federation.drop_last, *key, "order", index
        )

    first = epoch(0) if count else []
    dropped = count - sum(len(b) for b in first)
    if not first:
        return [], dropped
    if wanted is None:
        return [b for e in range(1 if epochs is None else epochs) for b in (epoch(e) if e else first)], dropped
    batches = list(first)
    while len(batches) < wanted:
        batches += epoch(len(batches) // len(first))
    return batches[:wanted], dropped


def cycle(source: Source, *parts: object) -> Iterator[Tensor]:
    """Places in a source for batch after batch, without end: each pass in a new order, a batch repeats no image."""
    size = min(source.batch_size, len(source.ids))
    turn = 0
    while True:
        order = torch.from_numpy(counter.permutation(len(source.ids), *parts, turn)).to(source.ids.device)
        for batch in torch.split(order, size):
            if len(batch) == size:
                yield batch
        turn += 1
