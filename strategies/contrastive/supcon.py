"""SupCon: supervised contrastive loss on projected embeddings of several views."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.cards import Card, option
from fedcl.losses import supervised_contrastive
from fedcl.strategy import Batch, Step, Strategy


class SupCon(Strategy):
    """Adds the supervised contrastive loss between the views of a batch to the local loss."""

    name = "supcon"
    family = "contrastive"
    stackable = True
    neutral = {"weight": 0.0, "views": 1}
    needs_projector = True
    card = Card(
        title="Supervised Contrastive Learning",
        authors="Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan",
        venue="NeurIPS",
        year=2020,
        bibtex="""@inproceedings{khosla2020supcon,
  title = {Supervised Contrastive Learning},
  author = {Khosla, Prannay and Teterwak, Piotr and Wang, Chen and Sarna, Aaron and Tian, Yonglong and
            Isola, Phillip and Maschinot, Aaron and Liu, Ce and Krishnan, Dilip},
  booktitle = {NeurIPS},
  year = {2020}
}""",
        certainty="Loss certain (equation 2, the sum outside of the logarithm); temperature 0.1 is the "
        "paper's for its best models. "
        "The paper trains the encoder alone and a linear head after it; here both losses train together.",
        cost="The batch is as many times larger as there are views; a projector beside the encoder.",
        notes="Views are drawn by data.augment; without augmentation they are equal. A batch with no pair of one class "
        "adds exactly 0, a batch of a single class still has a gradient.",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "weight of the loss")
        temperature: float = option(0.1, "temperature tau")
        views: int = option(2, "augmented views of each image; the other losses see all of them")

        def __post_init__(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")
            if not 0 < self.temperature < float("inf"):
                raise ValueError(f"temperature must be above 0, not {self.temperature}")
            if self.views < 1:
                raise ValueError(f"views must be at least 1, not {self.views}")

    def prepare(self, batch: Batch) -> Batch:
        return batch.repeat(self.options.views)

    def loss(self, step: Step) -> dict[str, Tensor]:
        embeddings = step.output.embeddings
        if embeddings is None:
            raise ValueError("supcon needs a projector: set model.projector to auto, linear or mlp")
        return {
            "contrastive": self.options.weight * supervised_contrastive(embeddings, step.y, self.options.temperature)
        }
