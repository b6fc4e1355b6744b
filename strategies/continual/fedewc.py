"""FedEWC: a quadratic penalty around the previous global model, weighed by pooled Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from fedcl.blocks.losses import cross_entropy
from fedcl.cards import Card, option
from fedcl.models.arrays import class_axes
from fedcl.strategy import Arrays, ClientContext, Finished, Server

from ._penalty import Penalty, PenaltyOptions


class FedEWC(Penalty):
    """Elastic weight consolidation; clients share one Fisher information and anchor, new once per task."""

    name = "fedewc"
    aliases = ("ewc",)
    revisits = "to measure the Fisher information at the end of the task"
    reductions = {"fisher/": "weighted_mean"}
    like_parameters = {"fisher": "zero", "anchor": "initial"}
    importance = "fisher"
    card = Card(
        title="Overcoming catastrophic forgetting in neural networks",
        authors="Kirkpatrick, Pascanu, Rabinowitz and others",
        venue="PNAS",
        year=2017,
        bibtex="""@article{kirkpatrick2017ewc,
  title = {Overcoming catastrophic forgetting in neural networks},
  author = {Kirkpatrick, James and Pascanu, Razvan and Rabinowitz, Neil and others},
  journal = {PNAS},
  year = {2017}
}""",
        certainty="Penalty certain. Weight 1000, cap 1e-4 and the running mean over tasks (rows of new "
        "classes enter it in full) are those of PyCIL and of TARGET's code. Federated: anchor is the global "
        "model, the Fisher information a mean over clients by images.",
        leaves_client=(("fisher", "as the parameters", "weighted_mean", "end of a task"),),
        server_state="Fisher information and anchor, two models",
        cost="One pass with a gradient per image at the end of a task; two models down per client and task.",
        deviations="TARGET's released code evaluates the penalty on the server's network, where it has no "
        "gradient; only the working form is offered. `fisher=batch` gives its squared batch gradients.",
        notes="New rows of the head have Fisher information 0: they are free. After a task without new "
        "classes the running mean gives every task the same weight, where the published share of old "
        "classes would ignore the new task.",
    )

    @dataclass(frozen=True)
    class Options(PenaltyOptions):
        weight: float = option(1000.0, "lambda of the penalty lambda/2 sum F (w - w*)^2")
        cap: float = option(1e-4, "largest Fisher information of a parameter")
        fisher: Literal["sample", "batch"] = option(
            "sample", "squared gradients of single images, or of batches as in TARGET's code"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.cap > 0:
                raise ValueError(f"cap must be above 0, not {self.cap}")

    # client

    def information(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The empirical Fisher diagonal of this client's images at the received model, capped."""
        params = {n: ctx.received[n] for n in ctx.shared}
        rest = {n: a for n, a in ctx.received.items() if n not in params}

        def loss(p: Arrays, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(ctx.forward(x, {**p, **rest}).logits, y, ctx.among(ctx.known, y))

        one = vmap(grad(lambda p, x, y: loss(p, x[None], y[None])), in_dims=(None, 0, 0))
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        terms = 0
        # Single images give the same sums in parts of any size; batches are those of training.
        size = ctx.batch_size if self.options.fisher == "batch" else 32
        for ids in torch.split(ctx.ids, size):
            x, y = ctx.store.batch(ids, next(iter(params.values())).dtype), ctx.store.label_tensor[ids]
            if self.options.fisher == "sample":
                squares = {n: g.square().sum(dim=0) for n, g in one(params, x, y).items()}
                terms += len(y)
            else:
                squares = {n: g.square() for n, g in grad(loss)(params, x, y).items()}
                terms += 1
            total = {n: t + squares[n] for n, t in total.items()}
        return {f"fisher/{n}": (t / max(terms, 1)).clamp(max=self.options.cap) for n, t in total.items()}, ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        found = server.exchange(self.information)
        if not found:
            return Finished(server.arrays), server.state
        fisher = {n: self.running_mean(server, n, f) for n, f in found.items()}
        anchor = {f"anchor/{n.removeprefix('fisher/')}": server.arrays[n.removeprefix("fisher/")] for n in found}
        return Finished(server.arrays), fisher | anchor

    def running_mean(self, server: Server, name: str, found: Tensor) -> Tensor:
        """``a F_old + (1 - a) F_new``, a = old / seen classes; rows of new classes are F_new alone."""
        if name not in server.state:
            return found
        old, seen = int((server.known & ~server.new).sum()), int(server.known.sum())
        share = old / seen if old < seen else server.task / (server.task + 1)
        mean = share * server.state[name] + (1 - share) * found
        axis = class_axes(server.model).get(name.removeprefix("fisher/"))
        if axis is None:
            return mean
        return torch.where(server.new.view([-1 if a == axis else 1 for a in range(found.dim())]), found, mean)
