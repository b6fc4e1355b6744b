"""Barlow Twins: the views of an image agree in every dimension, and no two dimensions say the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.blocks.view_losses import barlow_twins, between_views
from fedcl.cards import Card, option
from fedcl.strategy import Step

from ._views import PairOptions, Views


class BarlowTwins(Views):
    """Adds the redundancy reduction loss between views, over labelled and unlabelled images alike."""

    name = "barlow_twins"
    unlabelled = "learns"
    needs_others = True
    neutral = {"weight": 0.0, "views": 1}
    card = Card(
        title="Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        authors="Zbontar, Jing, Misra, LeCun, Deny",
        venue="ICML",
        year=2021,
        bibtex="""@inproceedings{zbontar2021barlow,
  title = {Barlow Twins: Self-Supervised Learning via Redundancy Reduction},
  author = {Zbontar, Jure and Jing, Li and Misra, Ishan and LeCun, Yann and Deny, St{\\'e}phane},
  booktitle = {ICML},
  year = {2021}
}""",
        certainty="Loss certain; standardisation is that of BatchNorm (variance over N, plus 1e-5), as in the released "
        "code and in lightly, which the tests compare with. lambda 5e-3 is the paper's for ImageNet; 1/128 is used "
        "for CIFAR. More than two views (the mean over pairs) are ours.",
        cost="The batch is as many times larger as there are views; a projector beside the encoder.",
        notes="Needs augmentation that makes views differ. The loss is about as large as model.projector_dim (the "
        "paper has 8192 dimensions, and three layers with BatchNorm): choose the weight by it. Correlations are over "
        "the client's own batch: with fewer images than dimensions they cannot vanish, and a batch of one image has "
        "none and adds exactly 0.",
    )

    @dataclass(frozen=True)
    class Options(PairOptions):
        redundancy: float = option(5e-3, "lambda, weight of the correlations between different dimensions")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.redundancy < float("inf"):
                raise ValueError(f"redundancy must be at least 0, not {self.redundancy}")

    def loss(self, step: Step) -> dict[str, Tensor]:
        def pair(one: Tensor, other: Tensor) -> Tensor:
            return barlow_twins(one, other, self.options.redundancy)

        return {"redundancy": self.options.weight * between_views(self.embeddings(step), step.batch.views, pair)}
