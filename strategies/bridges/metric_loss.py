"""A loss of embeddings and labels from another library, by its dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedcl.bridges.avalanche_import import sealed
from fedcl.bridges.losses import OfLabels, build, some_embeddings, takes, try_out
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Batch, Step, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream


class MetricLoss(Strategy):
    """Adds a loss of pytorch-metric-learning between the labelled images of a batch to the local loss."""

    name = "metric_loss"
    family = "bridges"
    needs_projector = True
    neutral = {"weight": 0.0}
    card = Card(
        title="PyTorch Metric Learning",
        authors="Musgrave, Belongie, Lim",
        venue="arXiv 2008.09164",
        year=2020,
        bibtex="""@article{musgrave2020pytorch,
  title = {{PyTorch} Metric Learning},
  author = {Musgrave, Kevin and Belongie, Serge and Lim, Ser-Nam},
  journal = {arXiv preprint arXiv:2008.09164},
  year = {2020}
}""",
        certainty="The loss is the library's own, called with the projector's embeddings and the labels.",
        cost="That of the loss; a projector beside the encoder, and the loss's parameters where it has any (proxies, "
        "class weights), which travel with the model. Most of these losses choose pairs by their values: their clients "
        "are trained one by one.",
        notes="Not included: pip install 'fedcl-sim[losses]'. arguments are the loss's own; an argument that is an "
        "object is a mapping with its class, {class: pytorch_metric_learning.distances.LpDistance, p: 1}. The "
        "library's defaults are not always the papers' (its NTXentLoss has temperature 0.07). Losses that draw at "
        "random or remember embeddings between steps (memory banks, running centres) are refused, as a resumed run "
        "would not have these. Many are exactly 0 in a batch without a pair of one class and one of two classes: a "
        "client of one class then learns nothing from them, without a word; the library's SupConLoss is one of these, "
        "supcon is not. The num_classes of a loss with class weights are all classes of the stream.",
    )

    @dataclass(frozen=True)
    class Options:
        loss: str = option("pytorch_metric_learning.losses.TripletMarginLoss", "dotted name of the loss")
        arguments: dict[str, Any] = field(
            default_factory=dict, metadata={"help": "keyword arguments of the loss; {class: NAME, ...} is an object"}
        )
        miner: str = option("", "dotted name of a miner, which chooses the pairs or triplets; '' for all of them")
        miner_arguments: dict[str, Any] = field(
            default_factory=dict, metadata={"help": "keyword arguments of the miner"}
        )
        weight: float = option(1.0, "weight of the loss")
        views: int = option(1, "augmented views of each image")

        def __post_init__(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")
            if self.views < 1:
                raise ValueError(f"views must be at least 1, not {self.views}")

    def made(self) -> OfLabels:
        """The loss, and the miner where there is one.

        Raises:
            UsageError: they cannot be made, or the loss is not of embeddings and labels.
        """
        options, key = self.options, f"options.{self.name}"
        loss = build(options.loss, options.arguments, f"{key}.loss")
        if takes(loss, f"{key}.loss") != "labels":
            raise UsageError(
                f"{key}.loss", options.loss, "compares views, not labels: view_loss is the strategy for it"
            )
        miner = build(options.miner, options.miner_arguments, f"{key}.miner") if options.miner else None
        return OfLabels(loss, miner)

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        with torch.random.fork_rng(devices=[]):
            loss = self.made()
        last = len(stream.class_order) - 1
        labels = torch.tensor([0, last, last // 2, 0, last, last // 2])
        inputs = (some_embeddings(len(labels), config.model.projector_dim), labels)
        key = f"options.{self.name}"
        try_out(OfLabels(loss.loss), inputs, self.options.loss, f"{key}.loss")
        if loss.miner is not None:
            try_out(loss, inputs, self.options.miner, f"{key}.miner")
        size = config.federation.batch_size
        if size == 1 and self.options.weight and not self.learns_from_one(loss, config.model.projector_dim):
            raise UsageError("federation.batch_size", size, f"{self.options.loss} compares images: at least 2")

    def learns_from_one(self, loss: OfLabels, width: int) -> bool:
        """Whether the loss of the views of one image has a gradient, as with a proxy for each class."""
        embeddings = some_embeddings(self.options.views, width).requires_grad_()
        with sealed(0):
            value = loss(embeddings, torch.zeros(self.options.views, dtype=torch.int64))
        (slope,) = torch.autograd.grad(value, embeddings, allow_unused=True)
        return slope is not None and bool(slope.any())

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        return {"loss": self.made()}

    def prepare(self, batch: Batch) -> Batch:
        return batch.repeat(self.options.views)

    def loss(self, step: Step) -> dict[str, Tensor]:
        embeddings = step.output.embeddings
        if embeddings is None:
            raise ValueError(f"{self.name} needs a projector: set model.projector to auto, linear or mlp")
        return {"metric": self.options.weight * step.apply("loss", embeddings, step.y)}
