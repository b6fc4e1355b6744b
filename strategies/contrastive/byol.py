"""BYOL: a predictor says what a momentum copy of the network makes of the other view."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fedcl.blocks.view_losses import negative_cosine
from fedcl.cards import Card, option
from fedcl.models.arrays import parameter_names
from fedcl.strategy import Arrays, Broadcast, ClientContext, Server, Step

from ._views import PairOptions, Views, predictor, projected_dim

if TYPE_CHECKING:
    from fedcl.models.model import FedModel

TARGET = "target/"


def rising_momentum(base: float, done: Tensor, total: int) -> Tensor:
    """``1 - (1 - base) (cos(pi done / total) + 1) / 2``: from ``base`` to 1 (Grill et al. 2020, section 3.2).

    Args:
        done: scalar, how much of ``total`` is done; beyond it the momentum stays 1.

    >>> round(rising_momentum(0.9, torch.tensor(5.0), 10).item(), 3)
    0.95
    """
    share = (done / total).clamp(max=1.0)
    return 1 - (1 - base) * (torch.cos(math.pi * share) + 1) / 2


class BYOL(Views):
    """Adds the distance between predicted and momentum views, over labelled and unlabelled images alike."""

    name = "byol"
    unlabelled = "learns"
    needs_others = True
    neutral = {"weight": 0.0, "views": 1}
    card = Card(
        title="Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
        authors="Grill, Strub, Altché, Tallec, Richemond and others",
        venue="NeurIPS",
        year=2020,
        bibtex="""@inproceedings{grill2020byol,
  title = {Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning},
  author = {Grill, Jean-Bastien and Strub, Florian and Altch{\\'e}, Florent and Tallec, Corentin and
            Richemond, Pierre and others},
  booktitle = {NeurIPS},
  year = {2020}
}""",
        certainty="Loss certain: 2 - 2 cos, the sum over both directions (equation 2), which is four times the mean "
        "negative cosine of lightly's examples, plus a constant. Momentum 0.996 and its rise to 1 certain. What "
        "becomes of the target network in a federation is a choice, see target; more than two views (the mean over "
        "ordered pairs, twice) are ours.",
        client_state="with target=kept the target network (encoder and projector); with received none",
        cost="One more forward pass of all views; projector and predictor travel with the model, the target never "
        "does.",
        notes="Needs augmentation that makes views differ. The target network (a copy of encoder and projector that "
        "follows by momentum after each step) never leaves a client. target=received, the default, restarts it each "
        "round from the received model, so that clients need no state and rare clients no stale target; target=kept "
        "continues the client's own from its last round, as in federations of few and faithful clients. A momentum "
        "near 1 moves it little in a short round: lower momentum where rounds have few steps. The paper's projector "
        "and predictor have a hidden layer of 4096 with BatchNorm and 256 outputs; the projector is model.projector "
        "here. The target normalises by the statistics of the batch, as the network itself does. A batch of one image, "
        "over which the predictor cannot normalise, adds exactly 0.",
    )

    @dataclass(frozen=True)
    class Options(PairOptions):
        momentum: float = option(0.996, "tau, how much of the target network stays at a step")
        rounds: int = option(0, "rounds of the run over which tau rises to 1 (cosine); 0: it stays")
        target: Literal["received", "kept"] = option(
            "received",
            "where a round's target network starts: the received model, or the client's own of its last round",
        )
        hidden: int | None = option(None, "width of the predictor's hidden layer; null: 16 times the embedding's")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.momentum <= 1:
                raise ValueError(f"momentum must be between 0 and 1, not {self.momentum}")
            if self.rounds < 0:
                raise ValueError(f"rounds must be at least 0, not {self.rounds}")
            if self.hidden is not None and self.hidden < 1:
                raise ValueError(f"hidden must be at least 1, not {self.hidden}")

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        width = projected_dim(model)
        return {"predictor": predictor(width, self.options.hidden or 16 * width)}

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        names = [n for n in parameter_names(ctx.model) if n.startswith(("encoder.", "projector."))]
        kept = {TARGET + n: ctx.received[n] for n in names}
        return kept | (ctx.state if self.options.target == "kept" else {})

    def loss(self, step: Step) -> dict[str, Tensor]:
        embeddings = self.embeddings(step)
        if self.alone(step):
            return {"prediction": embeddings.sum() * 0.0}
        predicted = step.apply("predictor", embeddings)
        target = {n.removeprefix(TARGET): a for n, a in step.carried.items()}
        # In training mode a pass writes running statistics: into copies, as these are the network's own.
        buffers = {n: b.clone() for n, b in step.buffers.items()}
        seen = step.forward(step.x, {**step.params, **buffers, **target}, mode="train").embeddings
        assert seen is not None
        distance = 2 + 2 * negative_cosine(predicted, seen, step.batch.views)
        return {"prediction": 2 * self.options.weight * distance}

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        momentum: Tensor | float = self.options.momentum
        if self.options.rounds:
            momentum = rising_momentum(self.options.momentum, step.down["done"], self.options.rounds)
        now = {**step.params, **params}  # what a phase does not train stays as it is
        return {n: momentum * a + (1 - momentum) * now[n.removeprefix(TARGET)] for n, a in step.carried.items()}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, dict(ctx.carried) if self.options.target == "kept" else ctx.state

    # server

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast({"done": torch.tensor(server.rounds_done, dtype=torch.float64)} if self.options.rounds else {})
