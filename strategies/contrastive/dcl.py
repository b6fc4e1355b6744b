"""DCL: SimCLR's loss without the positive pair in its denominator, for small batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedcl.blocks.view_losses import between_views, decoupled_contrastive
from fedcl.cards import Card, option
from fedcl.strategy import Step

from ._views import PairOptions, Views


class DCL(Views):
    """Adds the decoupled contrastive loss between views, over labelled and unlabelled images alike."""

    name = "dcl"
    aliases = ("decoupled_contrastive",)
    unlabelled = "learns"
    needs_others = True
    neutral = {"weight": 0.0, "views": 1}
    card = Card(
        title="Decoupled Contrastive Learning",
        authors="Yeh, Hong, Hsu, Liu, Chen, LeCun",
        venue="ECCV",
        year=2022,
        bibtex="""@inproceedings{yeh2022dcl,
  title = {Decoupled Contrastive Learning},
  author = {Yeh, Chun-Hsiao and Hong, Cheng-Yao and Hsu, Yen-Chi and Liu, Tyng-Luh and Chen, Yubei and LeCun, Yann},
  booktitle = {ECCV},
  year = {2022}
}""",
        certainty="Loss and weights certain: they are those of lightly's DCLLoss and DCLWLoss, which the tests compare "
        "with; temperature 0.1 and sigma 0.5 are its defaults. More than two views are ours: the mean over pairs of "
        "views, each with the negatives of its two views.",
        cost="The batch is as many times larger as there are views; a projector beside the encoder.",
        notes="Needs augmentation that makes views differ. Made for small batches: the gradient does not vanish with "
        "few negatives as SimCLR's does. The loss may be negative. Negatives are the other images of the client's own "
        "batch; a batch of one image has none and adds exactly 0.",
    )

    @dataclass(frozen=True)
    class Options(PairOptions):
        temperature: float = option(0.1, "temperature tau")
        weighting: Literal["none", "mises_fisher"] = option(
            "none", "weight of a positive pair: 1 (DCL), or less the nearer its views are (DCLW)"
        )
        sigma: float = option(0.5, "width sigma of the weights of DCLW")

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, value in (("temperature", self.temperature), ("sigma", self.sigma)):
                if not 0 < value < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {value}")

    def loss(self, step: Step) -> dict[str, Tensor]:
        options = self.options
        sigma = options.sigma if options.weighting == "mises_fisher" else None

        def pair(one: Tensor, other: Tensor) -> Tensor:
            return decoupled_contrastive(one, other, options.temperature, sigma)

        return {"contrastive": options.weight * between_views(self.embeddings(step), step.batch.views, pair)}
