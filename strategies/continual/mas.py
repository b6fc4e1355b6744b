"""MAS: a quadratic penalty, weighed by how much the outputs of the global model change with each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Finished, Server

from ._penalty import Penalty, PenaltyOptions, part


def squared_norm(logits: Tensor, classes: Tensor) -> Tensor:
    """``mean_i ||o(x_i)||_2^2`` over some outputs (Aljundi et al. 2018).

    Args:
        logits: (B, C).
        classes: (C,) bool, or (B, C).

    >>> squared_norm(torch.tensor([[1.0, 2.0], [3.0, 7.0]]), torch.tensor([True, False])).item()
    5.0
    """
    return torch.where(classes, logits, 0.0).square().sum(dim=-1).mean()


class MAS(Penalty):
    """Memory aware synapses; clients share one importance and anchor, new once per task, measured without labels."""

    name = "mas"
    revisits = "to measure the importance of parameters at the end of the task"
    reductions = {"slopes/": "sum", "terms": "sum"}
    like_parameters = {"importance": "zero", "anchor": "initial"}
    scale = 2.0
    card = Card(
        title="Memory Aware Synapses: Learning what (not) to forget",
        authors="Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars",
        venue="ECCV",
        year=2018,
        bibtex="""@inproceedings{aljundi2018mas,
  title = {Memory Aware Synapses: Learning what (not) to forget},
  author = {Aljundi, Rahaf and Babiloni, Francesca and Elhoseiny, Mohamed and Rohrbach, Marcus and
            Tuytelaars, Tinne},
  booktitle = {ECCV},
  year = {2018}
}""",
        certainty="Importance E|d ||o||^2 / dw| and penalty lambda sum Omega (w - w*)^2 certain. Weight 1 and the "
        "running mean over tasks with factor 0.5 are Avalanche's (there old importance of a new class is 0, as here). "
        "That the authors add tasks up (`tasks=sum`) is from memory. Federated: sums over all images at the global "
        "model, exact for any partition.",
        leaves_client=(
            ("slopes", "as the parameters, float64", "sum", "end of a task"),
            ("terms", "1", "sum", "end of a task"),
        ),
        server_state="importance and anchor, two models",
        cost="One pass with a gradient per image at the end of a task; two models down per client and task.",
        notes="Images without labels count too. The outputs are the logits of the classes known; where tasks are known "
        "at test (task_incremental), those of an image's own task. With `measure=batch` (Avalanche) the absolute "
        "gradient of a batch's mean takes the place of the mean absolute gradient: signs cancel within a batch.",
    )

    @dataclass(frozen=True)
    class Options(PenaltyOptions):
        tasks: Literal["mean", "sum"] = option(
            "mean", "importance over tasks: alpha old + (1 - alpha) new, or their sum"
        )
        alpha: float = option(0.5, "share of the old importance in the running mean")
        measure: Literal["sample", "batch"] = option(
            "sample", "absolute gradients of single images, or of the means over batches as in Avalanche"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.alpha < 1:
                raise ValueError(f"alpha must be at least 0 and below 1, not {self.alpha}")

    # client

    def slopes(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Sums of absolute gradients of the squared output norm at the received model, and how many."""
        params = {n: ctx.received[n] for n in ctx.shared}
        rest = {n: a for n, a in ctx.received.items() if n not in params}
        dtype = next(iter(params.values())).dtype

        def size(p: Arrays, x: Tensor, y: Tensor) -> Tensor:
            return squared_norm(ctx.forward(x, {**p, **rest}).logits, ctx.among(ctx.known, y))

        one = vmap(grad(lambda p, x, y: size(p, x[None], y[None])), in_dims=(None, 0, 0))
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}
        images = torch.cat([ctx.ids, ctx.unlabelled.to(ctx.ids.device)])
        terms = 0
        # Single images give the same sums in parts of any size; batches are those of training.
        for ids in torch.split(images, ctx.batch_size if self.options.measure == "batch" else 32):
            x, y = ctx.store.batch(ids, dtype), ctx.store.label_tensor[ids]
            if self.options.measure == "sample":
                found = {n: g.double().abs().sum(dim=0) for n, g in one(params, x, y).items()}
                terms += len(ids)
            else:
                found = {n: g.double().abs() for n, g in grad(size)(params, x, y).items()}
                terms += 1
            total = {n: t + found[n] for n, t in total.items()}
        sent = {f"slopes/{n}": t for n, t in total.items()}
        return {**sent, "terms": torch.tensor(terms, device=ctx.ids.device)}, ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        found = server.exchange(self.slopes)
        if not found or not int(found["terms"]):
            return Finished(server.arrays), server.state
        old = part(server.state, "importance")
        state = {}
        for name, total in part(found, "slopes").items():
            new = (total / found["terms"]).to(server.arrays[name].dtype)
            state[f"importance/{name}"] = self.joined(old[name], new) if name in old else new
            state[f"anchor/{name}"] = server.arrays[name]
        return Finished(server.arrays), state

    def joined(self, old: Tensor, new: Tensor) -> Tensor:
        """The importance over all tasks from that of the earlier ones and of the last one."""
        if self.options.tasks == "sum":
            return old + new
        mean: Tensor = self.options.alpha * old + (1 - self.options.alpha) * new
        return mean
