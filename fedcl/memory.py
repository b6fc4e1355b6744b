"""Exemplar memories of a client: which rows of its store it keeps, within a budget of bytes.

Every image gets a random priority once; a uniform sample of a stream is the images of lowest priority so far. That is
reservoir sampling in distribution (each image seen is kept with probability M / n), without a loop over images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Policy = Literal["reservoir", "class_balanced"]


def keep(priority: Tensor, labels: Tensor, capacity: int, policy: Policy) -> Tensor:
    """Indices of the images to keep, ascending.

    Args:
        priority: (n,) int64, uniform and drawn once an image.
        labels: (n,) int64.
        capacity: most images to keep.
        policy: ``reservoir``, a uniform sample of all images seen; ``class_balanced``, as many of each class as
            fit, the largest classes cut first (GDumb's rule, Prabhu et al. 2020), uniform within a class.

    >>> keep(torch.tensor([3, 1, 2]), torch.tensor([0, 0, 1]), 2, "reservoir").tolist()
    [1, 2]
    >>> keep(torch.tensor([1, 2, 9]), torch.tensor([0, 0, 1]), 2, "class_balanced").tolist()
    [0, 2]
    """
    order = torch.argsort(priority, stable=True)
    if policy == "reservoir":
        return order[:capacity].sort().values
    rank = torch.empty_like(order)
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members), device=rank.device)
    # Rank first, then priority: every class fills up at the same pace, and the last places are drawn at random.
    by_rank = order[torch.argsort(rank[order], stable=True)]
    return by_rank[:capacity].sort().values


def capacity(budget_bytes: int, image_bytes: int) -> int:
    """How many images of ``image_bytes`` (one byte a pixel and channel) fit into a budget.

    >>> capacity(1000, 64)
    15
    """
    return budget_bytes // image_bytes
