"""Flower's server strategies that ask something of the clients: a loss, a term of theirs, equal weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedcl.blocks.losses import proximal
from fedcl.cards import option
from fedcl.errors import RunFailed
from fedcl.random import key
from fedcl.strategy import Arrays, ClientContext, Server, Step, cross_entropy

from .flower import FlowerStrategy, flower_card

LEAST = 1e-10
"""What Flower's q-FedAvg adds to a loss."""


def own_loss(ctx: ClientContext) -> float:
    """F_k(w): the mean cross entropy of the received model over a client's labelled images, unaugmented.

    Raises:
        RunFailed: it has none.
    """
    if not len(ctx.ids):
        raise RunFailed(f"qfedavg weighs a client by its loss; client {ctx.client} has no labelled images")
    total = 0.0
    for x, y in ctx.batches():
        loss = cross_entropy(ctx.forward(x).logits, y, ctx.among(ctx.known, y))
        total += float(loss) * len(y)
    return total / len(ctx.ids)


def short(value: float) -> float:
    """``value`` with 24 binary digits: sums of such are exact, so that clients may be added up in any order.

    >>> short(0.1), short(3.0)
    (0.10000000149011612, 3.0)
    """
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


class QFedAvg(FlowerStrategy):
    """Clients with a high loss of the received model count for more."""

    name = flower_name = "qfedavg"
    card = flower_card(
        "Fair Resource Allocation in Federated Learning",
        "Li, Sanjabi, Beirami, Smith",
        "ICLR",
        2020,
        "li2020qffl",
        "none",
        "A client's weight is the power q of its loss of the received model (cross entropy over the known classes, "
        "one more pass over its images, in evaluation mode); it leaves the client in place of the number of images, so "
        "federation.weighting says nothing. The loss terms of other strategies do not count. The Lipschitz constant "
        "is 1 / client_learning_rate as in the paper; with q = 0 all clients count alike and it does not matter. "
        "BatchNorm buffers are averaged with the same weights.",
    )

    @dataclass(frozen=True)
    class Options:
        q: float = option(0.1, "0: all clients count alike; the more, the fairer; Flower's default")
        client_learning_rate: float = option(0.05, "1 / Lipschitz constant; as a rule optimiser.lr")

    def weight(self, ctx: ClientContext, samples: int, steps: int) -> float:
        return short((own_loss(ctx) + LEAST) ** self.options.q)

    def aggregate(self, server: Server, models: list[Arrays], weights: list[float]) -> tuple[Arrays, Arrays]:
        current = {n: server.arrays[n] for n in models[0]}
        q = self.options.q
        # Without q the loss is not in the weight, and not in Flower's formula either.
        losses = [max(0.0, weight ** (1 / q) - LEAST) if q else 1.0 for weight in weights]
        return self.adapter().aggregate(current, models, weights, server.state, server.rounds_done + 1, losses)


class FlowerFedProx(FlowerStrategy):
    """Flower's FedProx: its mean at the server, and at the clients the proximal term that it asks them for."""

    name = "flower_fedprox"
    flower_name = "fedprox"
    unlabelled = "sees"
    card = flower_card(
        "Federated Optimization in Heterogeneous Networks",
        "Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith",
        "MLSys",
        2020,
        "li2020fedprox",
        "none",
        "On the server Flower's FedProx is its FedAvg that tells clients mu; their half is here that of fedprox, with "
        "the 1/2. The same as the stack of fedprox and flower_fedavg. Flower's default mu is 0.",
    )

    @dataclass(frozen=True)
    class Options:
        proximal_mu: float = option(0.01, "weight of the proximal term")

    def loss(self, step: Step) -> dict[str, Tensor]:
        trained = {n: p for n, p in step.params.items() if p.requires_grad}
        return {"proximal": self.options.proximal_mu * proximal(trained, step.received)}


class DPFedAvg(FlowerStrategy):
    """The mean of clipped updates with Gaussian noise, both at the server."""

    name = flower_name = "dp_fedavg"
    card = flower_card(
        "Learning Differentially Private Recurrent Language Models",
        "McMahan, Ramage, Talwar, Zhang",
        "ICLR",
        2018,
        "mcmahan2018learning",
        "none",
        "Flower's server-side fixed clipping around its FedAvg. All clients count alike, for else the noise of "
        "multiplier * norm / clients would be too small; it is drawn anew from the seed of the run. The server is "
        "trusted: updates reach it unclipped. No epsilon is computed. BatchNorm buffers and what other strategies "
        "upload get neither clipping nor noise: for a guarantee they must not leave the clients (model.batch_norm). "
        "The default numbers are ours; the paper tunes the norm.",
    )

    @dataclass(frozen=True)
    class Options:
        noise_multiplier: float = option(1.0, "standard deviation of the noise in units of norm / clients; 0: none")
        clipping_norm: float = option(1.0, "largest norm of a client's update over all parameters")

    def weight(self, ctx: ClientContext, samples: int, steps: int) -> float:
        return 1.0

    def aggregate(self, server: Server, models: list[Arrays], weights: list[float]) -> tuple[Arrays, Arrays]:
        current = {n: server.arrays[n] for n in models[0]}
        seed = key(*server.key, self.name, "noise")
        return self.adapter().aggregate(current, models, weights, server.state, server.rounds_done + 1, seed=seed)


HALVES: tuple[type[Any], ...] = (QFedAvg, FlowerFedProx, DPFedAvg)
