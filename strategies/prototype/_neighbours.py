"""Neighbourhoods of coding vectors, as in Neural Gas: edges, the repulsion of neighbours, prototypes mixed with them.

Everything is free of branches on data, so that clients can be trained as one stack.
"""

from __future__ import annotations

import torch
from torch import Tensor

DECAY = 0.9
"""Factor on the edges of a winning vector that its batch did not renew, for each image that it wins."""

FORGOTTEN = DECAY**10
"""Edges below are cut."""

SHARPNESS = 0.001
"""Factor on the squared distances by which neighbours are weighed."""


def squared_distances(x: Tensor, vectors: Tensor) -> Tensor:
    """``||x_i - v_m||^2``: (B, d) and (M, d) give (B, M)."""
    return (x[:, None] - vectors[None]).square().sum(dim=-1)


def grown_edges(edges: Tensor, count: int) -> Tensor:
    """Edges of ``count`` vectors: those given, none of the further ones, and 1 of each with itself.

    >>> grown_edges(torch.zeros(0, 0), 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    missing = count - len(edges)
    padded = torch.nn.functional.pad(edges, (0, missing, 0, missing))
    return torch.where(torch.eye(count, dtype=torch.bool, device=edges.device), 1.0, padded)


def neighbour_loss(x: Tensor, vectors: Tensor, labels: Tensor, edges: Tensor) -> Tensor:
    """``mean_i relu( d_i - sum_m a_im d_im )``, d_i to the image's own vector, m over that vector's neighbours.

    ``a_im`` is the softmax of ``-0.001 d_im`` over the neighbours, without gradient. An image whose vector has no
    neighbour adds 0.

    Args:
        x: (B, d).
        vectors: (M, d).
        labels: (B,) int64 in M.
        edges: (M, M); above 0: neighbours.

    >>> v = torch.tensor([[0.0], [1.0]])
    >>> neighbour_loss(torch.tensor([[1.0]]), v, torch.tensor([0]), torch.ones(2, 2)).item()
    1.0
    """
    distances = squared_distances(x, vectors)
    own = labels[:, None] == torch.arange(len(vectors), device=x.device)
    near = (edges[labels] > 0) & ~own
    lowest = torch.finfo(x.dtype).min
    share = torch.where(near, -SHARPNESS * distances.detach(), lowest).softmax(dim=-1)
    around = torch.where(near, share * distances, 0.0).sum(dim=-1)
    mine = torch.where(own, distances, 0.0).sum(dim=-1)
    return torch.where(near.any(dim=-1), (mine - around).clamp(min=0), 0.0).mean()


def neighbour_mix(
    prototypes: Tensor, held: Tensor, edges: Tensor, first: Tensor, second: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """``gamma p_c + (1 - gamma) p_n``: c any class with a prototype, n one of its neighbours, gamma in (0.5, 1).

    A class without a neighbour that has a prototype stays as it is.

    Args:
        prototypes: (C, d).
        held: (C,) bool, at least one.
        edges: (C, C).
        first, second: (P, C) uniform numbers that draw c and n.
        share: (P,) uniform numbers that draw gamma.

    Returns:
        (P, d) and the classes c, (P,) int64.
    """
    labels = torch.where(held, first, -1.0).argmax(dim=-1)
    itself = labels[:, None] == torch.arange(len(held), device=held.device)
    near = (edges[labels] > 0) & held & ~itself
    partners = torch.where(near, second, torch.where(itself, -1.0, -2.0)).argmax(dim=-1)
    gamma = 0.5 + 0.5 * share[:, None]
    return gamma * prototypes[labels] + (1 - gamma) * prototypes[partners], labels


def moved_edges(edges: Tensor, x: Tensor, vectors: Tensor, known: Tensor, neighbours: int) -> Tensor:
    """Edges after a batch.

    The vector nearest to an image wins it. Edges between a winner and the ``neighbours`` vectors nearest to it become
    1; its other edges fade by 0.9 for each image that it won. What fell below 0.9^10 is cut; then both directions are
    averaged, and each vector has an edge of 1 with itself.

    Args:
        edges: (M, M).
        x: (B, d).
        vectors: (M, d).
        known: (M,) bool, the vectors of classes met so far, at least one.
        neighbours: k.
    """
    count = len(vectors)
    itself = torch.eye(count, dtype=torch.bool, device=x.device)
    closest = torch.where(known, squared_distances(x, vectors), torch.inf).argmin(dim=-1)
    won = (closest[:, None] == torch.arange(count, device=x.device)).sum(dim=0)
    between = torch.where(known & ~itself, squared_distances(vectors, vectors), torch.inf)
    order = between.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    near = (order < neighbours) & known & ~itself
    faded = edges * DECAY ** won[:, None].to(edges.dtype)
    after = torch.where((won > 0)[:, None], torch.where(near, 1.0, faded), edges)
    after = torch.where(after < FORGOTTEN, 0.0, after)
    return torch.where(itself, 1.0, (after + after.mT) / 2)
