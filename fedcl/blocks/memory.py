"""Exemplar memories of a client: which rows of its store it keeps, within a budget of bytes.

Every image gets a random priority once; a uniform sample of a stream is the images of lowest priority so far. That is
reservoir sampling in distribution (each image seen is kept with probability M / n), without a loop over images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import random as counter
from ..cards import option
from ..errors import UsageError
from ..strategy import Arrays, ClientContext, Finished, Server, Source, Step, Strategy

Policy = Literal["reservoir", "class_balanced"]

TIE = 1e-9
"""Distances closer than this are one: two samples are equally far from their mean, whatever the rounding says."""


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


def herding(features: Tensor, mean: Tensor, count: int) -> Tensor:
    """Indices (count,) of the samples whose running mean follows a mean best, in order (iCaRL, Rebuffi et al. 2017).

    ``p_k = argmin_x || mean - (phi(x) + sum_{j<k} phi(p_j)) / k ||``, each sample once; of equal ones the first.

    Args:
        features: (n, d).
        mean: (d,), usually but not always that of ``features``.
        count: at most n.

    >>> herding(torch.tensor([[0.0], [3.0], [2.0]]), torch.tensor([2.0]), 2).tolist()
    [2, 1]
    """
    chosen, total = [], torch.zeros_like(mean)
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for k in range(1, count + 1):
        distance = torch.linalg.vector_norm(mean - (features + total) / k, dim=1)
        distance = torch.where(taken, torch.inf, distance)
        pick = (distance <= distance.min() + TIE).int().argmax()
        chosen.append(pick)
        taken[pick] = True
        total = total + features[pick]
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=features.device)


def capacity(budget_bytes: int, image_bytes: int) -> int:
    """How many images of ``image_bytes`` (one byte a pixel and channel) fit into a budget.

    >>> capacity(1000, 64)
    15
    """
    return budget_bytes // image_bytes


@dataclass(frozen=True)
class BudgetOptions:
    """Options of a method with a memory at each client.

    Raises:
        ValueError: one is out of its range.
    """

    budget: int = option(100_000, "largest memory of one client", unit="bytes")
    batch_size: int = option(0, "memory images a step; 0 takes federation.batch_size", unit="images")

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget must be at least 0 bytes, not {self.budget}")
        if self.batch_size < 0:
            raise ValueError(f"batch_size must be at least 0, not {self.batch_size}")


@dataclass(frozen=True)
class MemoryOptions(BudgetOptions):
    """The same with a choice of which images stay."""

    policy: Policy = option("reservoir", "which images stay: a uniform sample, or equally many of each class")


class Rehearsal(Strategy):
    """Base of methods whose clients keep some of their own images, within a byte budget, and see them in each step.

    A client's state is ``ids``, (M,) int64 rows of its store, ``priority``, (M,) int64, and what `attached` gives with
    each image. The images of a task are offered at its end; where images are seen once, those of a round after it.
    """

    Options: ClassVar[type] = MemoryOptions
    reductions = {"stored": "sum"}
    exemplars = ("ids",)

    def attached(self, ctx: ClientContext, ids: Tensor) -> Arrays:
        """What is kept with the images ``ids``, (n,) rows of the store: arrays (n, ...), counted in the budget.

        Where an array has become wider since older images were stored (logits of a grown head), those are padded with
        zeros.
        """
        return {}

    def sources(self, ctx: ClientContext) -> list[Source]:
        if "ids" not in ctx.state:
            return []
        return [Source(ctx.state["ids"].to(ctx.ids.device), self.options.batch_size or ctx.batch_size)]

    def room(self, image_bytes: int) -> int:
        """How many images the budget holds; no memory at all is asked for by 0.

        Raises:
            UsageError: the budget is above 0 and below one image: the method would run without its memory.
        """
        limit = capacity(self.options.budget, image_bytes)
        if self.options.budget and not limit:
            said = f"at least the {image_bytes} bytes that one image takes here"
            raise UsageError(f"options.{self.name}.budget", self.options.budget, said)
        return limit

    def remember(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Offers the images at hand to the memory: (how many are stored now, the new state)."""
        words = counter.words(len(ctx.ids), *ctx.key, "memory")
        ids, priority = ctx.ids, torch.from_numpy((words >> 1).astype("int64")).to(ctx.ids.device)
        held = {n: a.to(ids.device) for n, a in ctx.state.items()}
        if held:
            fresh = ~torch.isin(ids, held["ids"])  # an image that stands in several tasks takes one place
            ids, priority = ids[fresh], priority[fresh]
        offered = {"ids": ids, "priority": priority, **self.attached(ctx, ids)}
        offered = {n: appended(held[n], a) for n, a in offered.items()} if held else offered
        extra = sum(a[:1].nbytes for n, a in offered.items() if n not in ("ids", "priority"))
        limit = self.room(ctx.store.image_bytes + extra)
        labels = ctx.store.label_tensor[offered["ids"]]
        kept = keep(offered["priority"], labels, limit, self.options.policy)
        stored = torch.tensor(len(kept), dtype=torch.int64)
        return {"stored": stored}, {n: a[kept] for n, a in offered.items()}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, self.remember(ctx)[1] if ctx.online else ctx.state

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        if server.online:  # the images have passed, each was offered in its round
            return Finished(server.arrays), server.state
        return Finished(server.arrays), server.exchange(self.remember)


def appended(held: Tensor, more: Tensor) -> Tensor:
    """The rows of both, (M, ...) and (n, ...); where ``more`` is wider, ``held`` is padded with zeros at the end.

    >>> appended(torch.ones(1, 1), torch.ones(1, 2)).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    if held.ndim > 1 and held.shape[1] < more.shape[1]:
        held = torch.cat([held, held.new_zeros(len(held), more.shape[1] - held.shape[1], *held.shape[2:])], dim=1)
    return torch.cat([held, more])


def others(step: Step, *names: str) -> Tensor:
    """(n,) int64 places of the step's images that are of none of the named sources; ``stream`` is the client's own."""
    places = torch.arange(len(step.y), device=step.y.device)
    named = torch.cat([step.batch.rows(name) for name in names])
    return places[~torch.isin(places, named)]
