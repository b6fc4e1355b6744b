"""Mergeable statistics of features: sums that clients send and the server adds up, exact over any partition."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def class_sums(
    batches: Iterable[tuple[Tensor, Tensor]],
    features: Callable[[Tensor], Tensor],
    num_classes: int,
    dimension: int,
) -> tuple[Tensor, Tensor]:
    """Sums and counts of features by class, in float64.

    Args:
        batches: (images (B, ...), labels (B,) int64).
        features: images -> (B, d).
        num_classes: C.
        dimension: d.

    Returns:
        (C, d) float64 sums and (C,) int64 counts; both add up over clients.

    >>> x, y = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> sums, counts = class_sums([(x, y)], lambda x: x, 2, 1)
    >>> sums.flatten().tolist(), counts.tolist()
    ([4.0, 5.0], [2, 1])
    """
    sums: Tensor | None = None
    counts: Tensor | None = None
    for x, y in batches:
        found = features(x).to(torch.float64)
        if sums is None or counts is None:
            sums = torch.zeros(num_classes, dimension, dtype=torch.float64, device=found.device)
            counts = torch.zeros(num_classes, dtype=torch.int64, device=found.device)
        sums = sums.index_add(0, y, found)
        counts = counts + torch.bincount(y, minlength=num_classes)
    if sums is None or counts is None:
        return torch.zeros(num_classes, dimension, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.int64)
    return sums, counts


def widen(array: Tensor, rows: int) -> Tensor:
    """An array whose first axis is classes, padded with zeros to ``rows`` of them.

    >>> widen(torch.ones(1, 2), 2).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    missing = rows - len(array)
    return torch.cat([array, array.new_zeros(missing, *array.shape[1:])]) if missing > 0 else array
