"""DER++: replay with the logits that the global model had when an image entered the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.blocks.losses import cross_entropy
from fedcl.blocks.memory import MemoryOptions, Rehearsal, others
from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Server, Source, Step

LABELS = "derpp_labels"
"""The source of the second draw from the memory, whose labels are used."""


def dark_experience(logits: Tensor, stored: Tensor, width: Tensor) -> Tensor:
    """``mean (o - o')^2`` over the outputs that there were when an image was stored (Buzzega et al. 2020).

    Args:
        logits: (B, C).
        stored: (B, C), of which the first ``width`` of each row count; its gradient is stopped.
        width: (B,) int64, at least 1.

    >>> stored = torch.tensor([[1.0, 0.0, 9.0]])
    >>> dark_experience(torch.zeros(1, 3), stored, torch.tensor([2])).item()
    0.5
    """
    counted = torch.arange(logits.shape[-1], device=width.device) < width[:, None]
    return torch.where(counted, logits - stored.detach(), 0.0).square().sum() / counted.sum()


class DERPP(Rehearsal):
    """Dark experience replay: old logits for one batch of the memory, labels for another."""

    name = "derpp"
    aliases = ("der++",)
    family = "continual"
    stackable = True
    neutral = {"alpha": 0.0, "beta": 0.0}
    card = Card(
        title="Dark Experience for General Continual Learning: a Strong, Simple Baseline",
        authors="Buzzega, Boschini, Porrello, Abati, Calderara",
        venue="NeurIPS",
        year=2020,
        bibtex="""@inproceedings{buzzega2020dark,
  title = {Dark Experience for General Continual Learning: a Strong, Simple Baseline},
  author = {Buzzega, Pietro and Boschini, Matteo and Porrello, Angelo and Abati, Davide and Calderara, Simone},
  booktitle = {NeurIPS},
  year = {2020}
}""",
        certainty="Loss certain, with two draws of its own from the memory; alpha 0.1 and beta 0.5 are Avalanche's "
        "and about the paper's for CIFAR-10 (CIFAR-100: 0.3 and 0.5). Federated: the stored logits are the global "
        "model's, when the image is stored, of the image as it is; in the paper they are those of the training step "
        "that saw it.",
        leaves_client=(("stored", "1", "sum", "end of a task; each round where images are seen once"),),
        client_state="image ids within the byte budget (the images are the client's own), their priorities and logits",
        cost="Three times the images a step once the memory is filled; one pass over the images when they are stored.",
        notes="Logits count in the budget, with the width of the head at the time: a growing head leaves room for "
        "fewer images. Outputs of classes that came later have no stored logit and are left out of the mean, where "
        "the paper's head has all classes from the start. beta=0 is DER.",
    )

    @dataclass(frozen=True)
    class Options(MemoryOptions):
        alpha: float = option(0.1, "weight of the squared distance to the stored logits")
        beta: float = option(0.5, "weight of the cross entropy on the memory's labels")

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, value in (("alpha", self.alpha), ("beta", self.beta)):
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name} must be at least 0, not {value}")

    # client

    def attached(self, ctx: ClientContext, ids: Tensor) -> Arrays:
        width = len(ctx.known)
        none = next(iter(ctx.received.values())).new_zeros(0, width)
        logits = torch.cat([none, *(ctx.forward(x).logits for x, _ in ctx.batches(ids))])
        return {"logits": logits, "width": torch.full_like(ids, width)}

    def sources(self, ctx: ClientContext) -> list[Source]:
        if "ids" not in ctx.state:
            return []
        held = {n: a.to(ctx.ids.device) for n, a in ctx.state.items()}
        size = self.options.batch_size or ctx.batch_size
        # As wide as the head is now, so that clients that missed a task can be stacked with the others.
        logits = torch.nn.functional.pad(held["logits"], (0, len(ctx.known) - held["logits"].shape[1]))
        dark = Source(held["ids"], size, payload={"logits": logits, "width": held["width"]}, name=self.name)
        labels = Source(held["ids"], size, name=LABELS)
        return [dark] * (self.options.alpha > 0) + [labels] * (self.options.beta > 0)

    def task_loss(self, step: Step) -> Tensor:
        rows = others(step, self.name, LABELS)
        if not len(rows):
            return step.output.logits.sum() * 0.0  # none of the stream's images has a label
        return self.supervised(step, rows)

    def supervised(self, step: Step, rows: Tensor) -> Tensor:
        """The cross entropy of some of the step's images over all known classes."""
        known = step.among(step.known).expand(len(step.y), -1)
        return cross_entropy(step.output.logits[rows], step.y[rows], known[rows])

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = {}
        dark, labels = step.batch.rows(self.name), step.batch.rows(LABELS)
        if len(dark):
            # One row an image, whatever the number of views that another strategy of the stack asks for.
            kept = {
                n: torch.cat([step.batch.payload[f"{self.name}/{n}"]] * step.batch.views) for n in ("logits", "width")
            }
            value = dark_experience(step.output.logits[dark], kept["logits"], kept["width"])
            terms["logits"] = self.options.alpha * value
        if len(labels):
            terms["labels"] = self.options.beta * self.supervised(step, labels)
        return terms

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, ctx.state

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        if server.online:  # the logits to keep are those of the model that has seen the images of the round
            server.exchange(self.remember, server.cohort)
        return server.arrays, server.state
