"""MOON: local representations are drawn to those of the global model, away from the client's own previous ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import nearer_to_one
from fedcl.blocks.updates import named, under
from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Step, Strategy

if TYPE_CHECKING:
    from fedcl.models.model import Output

PARTS = ("encoder.", "projector.")


def seen(arrays: Arrays) -> Arrays:
    """What a representation in eval mode depends on; counters of batches are left out."""
    return {n: a for n, a in arrays.items() if n.startswith(PARTS) and a.is_floating_point()}


class MOON(Strategy):
    """Adds a contrast between three representations of each image: own, global and previous local model's."""

    name = "moon"
    family = "federated"
    stackable = True
    needs_projector = True
    neutral = {"mu": 0.0}
    card = Card(
        title="Model-Contrastive Federated Learning",
        authors="Li, He, Song",
        venue="CVPR",
        year=2021,
        bibtex="""@inproceedings{li2021moon,
  title = {Model-Contrastive Federated Learning},
  author = {Li, Qinbin and He, Bingsheng and Song, Dawn},
  booktitle = {CVPR},
  year = {2021}
}""",
        certainty="Loss, temperature 0.5 and evaluation mode of the two other models read in the released code; mu is "
        "1 there, and 5 for CIFAR-10 from memory of the paper. One previous model is kept, as published.",
        client_state="encoder and projector of its last round",
        cost="Two more forward passes of each image; the client keeps a model for as long as the run lasts.",
        notes="Before a client's second round its previous model is the received one: the term is then mu log 2, and "
        "its gradient 0. The projector is that of the model (model.projector=mlp, model.projector_dim=256 as "
        "published).",
        deviations="In the released code the head reads the projection; here it reads the features, as everywhere. "
        "There the first previous model is the client's own random initial one.",
    )

    @dataclass(frozen=True)
    class Options:
        mu: float = option(1.0, "weight of the contrast; the paper tries 0.1, 1, 5 and 10")
        temperature: float = option(0.5, "temperature tau")
        representation: Literal["projector", "encoder"] = option(
            "projector", "what is compared: the projector's output, or the encoder's as in PFLlib"
        )

        def __post_init__(self) -> None:
            if not 0 <= self.mu < float("inf"):
                raise ValueError(f"mu must be at least 0, not {self.mu}")
            if not 0 < self.temperature < float("inf"):
                raise ValueError(f"temperature must be above 0, not {self.temperature}")

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        own = under(ctx.state, "previous")
        return named({n: own.get(n, a).to(a) for n, a in seen(ctx.received).items()}, "previous")

    def loss(self, step: Step) -> dict[str, Tensor]:
        own = self.represented(step.output)
        received = self.represented(step.forward(step.x, "received"))
        previous = self.represented(step.forward(step.x, {**step.received, **under(step.carried, "previous")}))
        near, far = (torch.cosine_similarity(own, other.detach(), dim=-1) for other in (received, previous))
        tau = self.options.temperature
        return {"contrast": self.options.mu * nearer_to_one(near / tau, far / tau)}

    def represented(self, output: Output) -> Tensor:
        """(B, p) or (B, d): what is compared.

        Raises:
            ValueError: the model has no projector.
        """
        found = output.features if self.options.representation == "encoder" else output.embeddings
        if found is None:
            raise ValueError("moon needs a projector: set model.projector to auto, linear or mlp")
        return found

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, named(seen(trained), "previous")
