"""Federated training with one memory a client, written out as plain loops in float64.

As :mod:`oracle`: from fedcl come the images, who holds which, and the documented random streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.config import Config

Arrays = dict[str, Tensor]


@dataclass
class Here:
    """What a client's step may look at.

    Attributes:
        draws: rows of each batch from the memory.
        kept: what `stored` left with a row, by row.
    """

    oracle: ModuleType
    world: Any
    known: list[int]
    stream: list[int]
    draws: list[list[int]]
    kept: dict[int, Any]

    def labels(self, rows: list[int]) -> list[int]:
        return [self.world.y[r] for r in rows]

    def loss(self, w: Arrays, rows: list[int], classes: list[int] | None = None) -> Tensor:
        """Mean cross entropy of some rows over ``classes``, by default all known ones."""
        scores = self.oracle.logits(w, self.world.x[rows])
        found: Tensor = self.oracle.cross_entropy(scores, self.labels(rows), classes or self.known)
        return found


Gradient = Callable[[Arrays, Here], Arrays]


@dataclass
class Memories:
    """What all clients have seen and hold.

    Attributes:
        limit: most images of a client, by the number of classes known.
        history: (row, priority, label) of all images ever offered, by client.
        rows: rows held, by client.
    """

    limit: Callable[[int], int]
    policy: str
    history: list[list[tuple[int, int, int]]]
    rows: list[list[int]]
    kept: dict[int, Any] = field(default_factory=dict)


def remembered(seen: list[tuple[int, int, int]], limit: int, policy: str) -> list[int]:
    """Rows kept of all (row, priority, label) ever seen by a client, chosen anew from the full history."""
    if policy == "reservoir":
        kept = sorted(seen, key=lambda item: item[1])[:limit]
    else:
        queues = {label: sorted(i for i in seen if i[2] == label) for _, _, label in seen}
        queues = {c: sorted(q, key=lambda item: item[1]) for c, q in queues.items()}
        kept = []
        while len(kept) < min(limit, len(seen)):
            fronts = sorted((q.pop(0) for q in queues.values() if q), key=lambda item: item[1])
            kept += fronts[: limit - len(kept)]
    order = {item: at for at, item in enumerate(seen)}
    return [row for row, _, _ in sorted(kept, key=lambda item: order[item])]


def marked(world: Any, rows: list[int], *name: object) -> list[tuple[int, int, int]]:
    """(row, priority, label) of images that are offered."""
    words = counter.words(len(rows), *name, "memory")
    return [(r, int(p) >> 1, world.y[r]) for r, p in zip(rows, words, strict=True)]


def draws(rows: list[int], size: int, *name: object) -> Iterator[list[int]]:
    """Batches of a memory without end; a pass over it ends with its last whole batch."""
    take, turn = min(size, len(rows)), 0
    while True:
        queue = [rows[i] for i in counter.permutation(len(rows), *name, turn).tolist()]
        turn += 1
        while len(queue) >= take:
            yield queue[:take]
            queue = queue[take:]


def federated(
    oracle: ModuleType,
    config: Config,
    gradient: Gradient,
    limit: Callable[[int], int],
    policy: str = "reservoir",
    sizes: tuple[int, ...] = (0,),
    stored: Callable[[Arrays, Here], dict[int, Any]] = lambda w, here: {},
    present: bool = False,
) -> tuple[Arrays, Memories]:
    """A whole run: the final model and the memories.

    Args:
        gradient: of one step of a client.
        limit: most images of a memory, by the number of classes known.
        sizes: images of each draw from the memory in a step; 0 is a batch.
        stored: what is kept with images when they are offered, by row; ``here.stream`` are these.
        present: a round draws from the memory as it would be with the images at hand.
    """
    world, seed, fed = oracle.World.of(config), config.seed, config.federation
    clients, w = range(fed.clients), world.start
    memory = Memories(limit, policy, [[] for _ in clients], [[] for _ in clients])
    for task, held in enumerate(world.held):
        known = world.known[task]
        w = oracle.grown(w, world, len(known))
        for round_ in range(fed.rounds):
            sums, total = {n: torch.zeros_like(a) for n, a in w.items()}, 0
            for k in clients:
                if not held[k]:
                    continue
                name = (seed, "client", k, task, round_)
                own = {n: a.clone() for n, a in w.items()}
                velocity = {n: torch.zeros_like(a) for n, a in w.items()}
                memories = memory.rows[k]
                if present:
                    offered = memory.history[k] + marked(world, held[k], *name)
                    memories = remembered(offered, limit(len(known)), policy)
                sources = [
                    draws(memories, size or fed.batch_size, *name, "source", i) for i, size in enumerate(sizes)
                ] if memories else []  # fmt: skip
                for epoch in range(fed.epochs or 1):
                    order = counter.permutation(len(held[k]), *name, "order", epoch).tolist()
                    for at in range(0, len(order), fed.batch_size):
                        rows = [held[k][i] for i in order[at : at + fed.batch_size]]
                        here = Here(oracle, world, known, rows, [next(s) for s in sources], memory.kept)
                        grads = gradient(own, here)
                        with torch.no_grad():
                            for n in own:
                                velocity[n] = config.optimiser.momentum * velocity[n] + grads[n]
                                own[n] = own[n] - config.optimiser.lr * velocity[n]
                for n in sums:
                    sums[n] += len(held[k]) * own[n].detach()
                total += len(held[k])
            w = {n: a / total for n, a in sums.items()}
        for k in clients:
            memory.history[k] += marked(world, held[k], seed, "client", k, task, fed.rounds)
            memory.rows[k] = remembered(memory.history[k], limit(len(known)), policy)
            if held[k]:
                memory.kept |= stored(w, Here(oracle, world, known, held[k], [], {}))
    return w, memory
