"""Ditto: a personal model beside the global one, held near it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedcl.blocks.losses import proximal
from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Phase, Step, Strategy

PERSONAL = "personal"


class Ditto(Strategy):
    """Each client trains the global model as usual, and its own one with lambda/2 ||v - w_t||^2 to the received one."""

    name = "ditto"
    family = "personalised"
    stackable = True
    unlabelled = "sees"
    like_parameters = {PERSONAL: "initial"}
    card = Card(
        title="Ditto: Fair and Robust Federated Learning Through Personalization",
        authors="Li, Hu, Beirami, Smith",
        venue="ICML",
        year=2021,
        bibtex="""@inproceedings{li2021ditto,
  title = {Ditto: Fair and Robust Federated Learning Through Personalization},
  author = {Li, Tian and Hu, Shengyuan and Beirami, Ahmad and Smith, Virginia},
  booktitle = {ICML},
  year = {2021}
}""",
        certainty="Objective certain (textbook); lambda is chosen from a grid, 0.01 to 1; the default is ours.",
        client_state="its personal model, all parameters and buffers",
        cost="Twice the local training; traffic as federated averaging.",
        notes="The personal model is what a client is tested with on images of its own; global accuracies "
        "are those of plain averaging with the same stack. It is trained only in the rounds in which its "
        "client takes part. Loss terms of other strategies of the stack act in both trainings. With "
        "federation.passes=once both go through the images of a round, in one pass each whatever epochs is.",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(0.1, "lambda: how near a personal model stays to the global one; 0 is local training")
        epochs: int = option(0, "passes over the images for the personal model; 0: as the global one", unit="epochs")

        def __post_init__(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")
            if self.epochs < 0:
                raise ValueError(f"epochs must be at least 0, not {self.epochs}")

    def phases(self, ctx: ClientContext) -> Sequence[Phase]:
        own = self.personal(ctx.received, ctx.state)
        return [Phase(), Phase(PERSONAL, start=own, side=True, epochs=self.options.epochs or None)]

    def loss(self, step: Step) -> dict[str, Tensor]:
        if step.phase != PERSONAL:
            return {}
        trained = {n: p for n, p in step.params.items() if p.requires_grad}
        return {PERSONAL: self.options.weight * proximal(trained, step.received)}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, {f"{PERSONAL}/{n}": a for n, a in ctx.outcomes[PERSONAL].items()}

    def personal(self, arrays: Arrays, state: Arrays) -> Arrays:
        return {n: state.get(f"{PERSONAL}/{n}", a) for n, a in arrays.items()}
