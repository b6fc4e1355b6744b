"""SupCon: supervised contrastive loss on projected embeddings of several views."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.blocks.losses import supervised_contrastive
from fedcl.cards import Card, option
from fedcl.strategy import Step

from ._views import ViewOptions, Views


class SupCon(Views):
    """Adds the supervised contrastive loss between the views of a batch to the local loss."""

    name = "supcon"
    neutral = {"weight": 0.0, "views": 1}
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
    class Options(ViewOptions):
        temperature: float = option(0.1, "temperature tau")

    def loss(self, step: Step) -> dict[str, Tensor]:
        embeddings = self.embeddings(step)
        return {
            "contrastive": self.options.weight * supervised_contrastive(embeddings, step.y, self.options.temperature)
        }
