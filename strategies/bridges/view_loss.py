"""A loss between the views of images from another library, by its dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedcl.blocks.view_losses import between_views
from fedcl.bridges.losses import OfViews, build, some_embeddings, takes, try_out
from fedcl.cards import Card, option
from fedcl.strategy import Step

from ..contrastive._views import PairOptions, Views

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream


class ViewLoss(Views):
    """Adds a loss of lightly, or of pytorch-metric-learning, between the views of labelled and unlabelled images."""

    name = "view_loss"
    family = "bridges"
    stackable = False
    unlabelled = "learns"
    needs_others = True
    neutral = {"weight": 0.0, "views": 1}
    card = Card(
        title="Lightly, a library for self-supervised learning on images",
        authors="The Lightly team",
        venue="software",
        year=2020,
        bibtex="""@misc{lightly2020,
  title = {Lightly},
  author = {{The Lightly team}},
  year = {2020},
  note = {Software}
}""",
        certainty="The loss is the library's own, called with the projector's embeddings of two views; with more views "
        "the mean over their pairs. Losses of embeddings and labels get the number of the image as its label.",
        cost="That of the loss; the batch is as many times larger as there are views; a projector beside the encoder.",
        notes="Not included: pip install --no-deps lightly (with its dependencies it asks for an older omegaconf), or "
        "pip install 'fedcl-sim[losses]' for pytorch-metric-learning. arguments are the loss's own, as in metric_loss. "
        "Losses that draw at random or remember embeddings between steps (memory banks, running centres) and those of "
        "other inputs (masks, prototypes, lists of views) are refused. Nothing stops the gradient of a view: "
        "NegativeCosineSimilarity alone collapses, simsiam and byol do not. A batch of one image adds exactly 0.",
    )

    @dataclass(frozen=True)
    class Options(PairOptions):
        loss: str = option("pytorch_metric_learning.losses.NTXentLoss", "dotted name of the loss")
        arguments: dict[str, Any] = field(
            default_factory=dict, metadata={"help": "keyword arguments of the loss; {class: NAME, ...} is an object"}
        )

    def made(self) -> OfViews:
        """The loss.

        Raises:
            UsageError: it cannot be made, or is not of two views.
        """
        key = f"options.{self.name}.loss"
        loss = build(self.options.loss, self.options.arguments, key)
        return OfViews(loss, takes(loss, key))

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        super().check(config, stream, split)
        with torch.random.fork_rng(devices=[]):
            loss = self.made()
        one, other = some_embeddings(10, config.model.projector_dim).reshape(2, 5, -1)
        try_out(loss, (one, other), self.options.loss, f"options.{self.name}.loss")

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        return {"loss": self.made()}

    def loss(self, step: Step) -> dict[str, Tensor]:
        def pair(one: Tensor, other: Tensor) -> Tensor:
            found: Tensor = step.apply("loss", one, other)
            return found

        return {"views": self.options.weight * between_views(self.embeddings(step), step.batch.views, pair)}
