"""SimCLR: a contrastive loss between the views of each image, without labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.cards import Card, option
from fedcl.losses import nt_xent
from fedcl.strategy import Batch, Step, Strategy


class SimCLR(Strategy):
    """Adds the contrastive loss between views of the same image, over labelled and unlabelled images alike."""

    name = "simclr"
    aliases = ("nt_xent",)
    family = "contrastive"
    stackable = True
    unlabelled = "learns"
    needs_projector = True
    neutral = {"weight": 0.0, "views": 1}
    card = Card(
        title="A Simple Framework for Contrastive Learning of Visual Representations",
        authors="Chen, Kornblith, Norouzi, Hinton",
        venue="ICML",
        year=2020,
        bibtex="""@inproceedings{chen2020simclr,
  title = {A Simple Framework for Contrastive Learning of Visual Representations},
  author = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {ICML},
  year = {2020}
}""",
        certainty="Loss certain (equation 1); temperature 0.5 is the paper's best on CIFAR-10 (appendix B.9). The "
        "paper trains with LARS and batches of 256 to 8192; optimiser and batch size are settings here.",
        cost="The batch is as many times larger as there are views; a projector beside the encoder.",
        notes="Needs augmentation that makes views differ: data.augment=[simclr] is the paper's, without hue and blur. "
        "Negatives are the other images of the client's own batch: clients of few classes have few true negatives. "
        "Where images have labels too, the task loss of the stack trains the head beside it; where none has any "
        "(labels.rate=0), accuracy is that of a probe (evaluate.predict).",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "weight of the loss")
        temperature: float = option(0.5, "temperature tau")
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
            raise ValueError("simclr needs a projector: set model.projector to auto, linear or mlp")
        return {"contrastive": self.options.weight * nt_xent(embeddings, step.batch.views, self.options.temperature)}
