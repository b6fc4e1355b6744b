"""Which classes a softmax runs over where the task of an image is known: every task has a head of its own.

The heads are rows of one layer. ``heads`` (C,) int64 says which task each class belongs to.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def own_head(classes: Tensor, labels: Tensor, heads: Tensor) -> Tensor:
    """(B, C) bool: those of ``classes`` that are of the same task as each image's label.

    Args:
        classes: (C,) or (B, C) bool mask.
        labels: (B,) int64; -1 where the label is hidden, and its task with it: then all of ``classes``.
        heads: (C,) int64, the task of each class.

    >>> own_head(torch.tensor([True, True, True]), torch.tensor([2, 0, -1]), torch.tensor([0, 0, 1])).tolist()
    [[False, False, True], [True, True, False], [True, True, True]]
    """
    return classes & ((heads == heads[labels][:, None]) | (labels < 0)[:, None])


@lru_cache(maxsize=16)
def on_device(heads: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The task of each class, (C,) int64; None where there are no heads. Kept, as each client of a call asks for it."""
    return torch.tensor(heads, device=device) if heads else None


def by_head(classes: Tensor, heads: Tensor | None, tasks: int) -> list[Tensor]:
    """Masks (C,) of ``classes``, one for each softmax: of the first ``tasks`` tasks, or one for all where there are no
    heads.

    >>> [m.tolist() for m in by_head(torch.tensor([True, True, False]), torch.tensor([0, 1, 2]), 2)]
    [[True, False, False], [False, True, False]]
    """
    return [classes] if heads is None else [classes & (heads == task) for task in range(tasks)]
