"""SimCLR: a contrastive loss between the views of each image, without labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.blocks.losses import nt_xent
from fedcl.cards import Card
from fedcl.strategy import Step

from ._views import ViewOptions, Views


class SimCLR(Views):
    """Adds the contrastive loss between views of the same image, over labelled and unlabelled images alike."""

    name = "simclr"
    aliases = ("nt_xent",)
    unlabelled = "learns"
    needs_others = True
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
    class Options(ViewOptions):
        def __post_init__(self) -> None:
            super().__post_init__()
            if self.views < 2 and self.weight:
                raise ValueError("views must be at least 2: one view alone has no pair to learn from")

    def loss(self, step: Step) -> dict[str, Tensor]:
        embeddings = self.embeddings(step)
        return {"contrastive": self.options.weight * nt_xent(embeddings, step.batch.views, self.options.temperature)}
