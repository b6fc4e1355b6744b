"""A head trained again by the clients on class-balanced samples of their own images, the encoder being frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcl import random
from fedcl.cards import option
from fedcl.strategy import Arrays, ClientContext, Finished, Server, cross_entropy

from ._post_hoc import DECOUPLING, PostHoc, Sgd, Use, fit, head_logits

BALANCED = replace(
    DECOUPLING,
    server_state="the task of each class",
    deviations="Features are taken from the images as they are, once an epoch, without augmentation.",
)
"""What the cards of heads that are trained again on balanced samples have in common."""


def leaving(fitted: str) -> tuple[tuple[str, str, str, str], ...]:
    """What leaves a client, ``fitted`` being the shape of what it fits."""
    return (
        ("counts", "classes", "sum", "end of a task"),
        ("fitted", fitted, "sum", "epochs at the end of a task"),
        ("samples", "one number", "sum", "epochs at the end of a task"),
    )


def oversampled(labels: Tensor, counts: Tensor, *name: object) -> Tensor:
    """Places of a client's images, each repeated so that all clients' samples together hold every class alike.

    An image of class c stands ``n_max / n_c`` times, rounded up or down at random so that this is the mean.

    Args:
        labels: (n,) int64 of the client's images.
        counts: (C,) int64 images of each class at all clients; images of a class without a count are left out.
        name: names the rounding.

    Returns:
        (m,) int64, ascending.

    >>> oversampled(torch.tensor([0, 1]), torch.tensor([4, 2]), "name").tolist()
    [0, 1, 1]
    """
    held = counts[labels]
    wanted = torch.where(held > 0, counts.max() / held.clamp(min=1), 0.0).to(torch.float64)
    luck = torch.from_numpy(random.uniform(len(labels), *name)).to(labels.device)
    times = torch.where(held > 0, (wanted + luck).floor(), 0.0).to(torch.int64)
    return torch.arange(len(labels), device=labels.device).repeat_interleave(times)


@dataclass(frozen=True)
class BalancedOptions:
    """Options of a head that is trained again on class-balanced samples.

    Raises:
        ValueError: one is out of its range.
    """

    epochs: int = option(10, "class-balanced epochs of all clients, each one an exchange")
    lr: float = option(0.1, "learning rate, falls as a cosine over the epochs")
    momentum: float = option(0.9, "momentum, from 0 in each epoch")
    weight_decay: float = option(5e-4, "weight decay")
    batch_size: int = option(0, "images a step; 0 takes federation.batch_size")
    use: Use = option("evaluation", "what the new head is for: evaluation alone, or the next task starts from it")

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ValueError(f"batch_size must be at least 0, not {self.batch_size}")
        self.recipe(1)

    def recipe(self, batch_size: int) -> Sgd:
        """How the head is trained; a batch size of a client's own stands in for 0."""
        return Sgd(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size or batch_size, cosine=True)


class BalancedHead(PostHoc):
    """Base of heads that clients train again at the end of a task, epoch by epoch, from features of their images."""

    reductions = {"counts": "sum", "fitted/": "sum", "samples": "sum"}
    revisits = "to train the head again at the end of the task"
    Options = BalancedOptions

    # client

    def tally(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """How many images of each class this client has."""
        return {"counts": ctx.counts}, ctx.state

    def retrain(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """What is fitted, after one epoch of this client's balanced samples, times their number; and that number."""
        counts, epoch = ctx.down["counts"], int(ctx.down["epoch"])
        start = {n.removeprefix("fitted/"): a for n, a in ctx.down.items() if n.startswith("fitted/")}
        head = {n.removeprefix("given/"): a for n, a in ctx.down.items() if n.startswith("given/")}
        with torch.no_grad():
            features = torch.cat([ctx.forward(x).features for x, _ in ctx.batches()])
        name = (*ctx.key, self.name, epoch)
        rows = oversampled(ctx.labels, counts, *name, "times")

        def loss(fitted: Arrays, places: Tensor) -> Tensor:
            at = rows[places]
            logits = self.logits(ctx, head, fitted, features[at])
            return cross_entropy(logits, ctx.labels[at], ctx.among(counts > 0, ctx.labels[at]))

        recipe = self.options.recipe(ctx.batch_size)
        once = Sgd(1, recipe.rate(epoch), recipe.momentum, recipe.weight_decay, recipe.batch_size, cosine=False)
        fitted = fit(start, loss, len(rows), once, *name, "order")
        samples = torch.tensor(len(rows), dtype=torch.int64)
        return {**{f"fitted/{n}": a * len(rows) for n, a in fitted.items()}, "samples": samples}, ctx.state

    def logits(self, ctx: ClientContext, head: Arrays, fitted: Arrays, features: Tensor) -> Tensor:
        """(B, C) of what is fitted and of the rest of the head."""
        return head_logits(ctx.model, {**head, **fitted}, features)

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        counts = server.exchange(self.tally).get("counts")
        if counts is None or not bool((counts > 0).any()):
            return Finished(server.arrays), server.state
        head = {n: a for n, a in self.standing(server).items() if n.startswith("head.")}
        counts = counts.to(head["head.weight"].device)
        fitted = self.start(server, head, counts > 0)
        for epoch in range(self.options.epochs):
            sent = {f"fitted/{n}": a for n, a in fitted.items()}
            sent |= {f"given/{n}": a for n, a in head.items() if n not in fitted}
            found = server.exchange(
                self.retrain, down={**sent, "counts": counts, "epoch": torch.tensor(epoch, dtype=torch.int64)}
            )
            if int(found.get("samples", 0)):
                fitted = {n: (found[f"fitted/{n}"] / found["samples"]).to(a.dtype) for n, a in fitted.items()}
        return self.left(server, self.joined(head, fitted, counts > 0), server.state, self.options.use)

    def start(self, server: Server, head: Arrays, present: Tensor) -> Arrays:
        """What is fitted, before the first epoch."""
        raise NotImplementedError

    def joined(self, head: Arrays, fitted: Arrays, present: Tensor) -> Arrays:
        """The new head of what has been fitted; rows of classes that are not present stay."""
        raise NotImplementedError
