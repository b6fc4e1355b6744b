"""VICReg: views agree, every dimension keeps its variance, and dimensions stay uncorrelated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.blocks.view_losses import between_views, vicreg
from fedcl.cards import Card, option
from fedcl.strategy import Step

from ._views import PairOptions, Views


class VICReg(Views):
    """Adds variance, invariance and covariance terms between views, over labelled and unlabelled images alike."""

    name = "vicreg"
    unlabelled = "learns"
    needs_others = True
    neutral = {"weight": 0.0, "views": 1}
    card = Card(
        title="VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        authors="Bardes, Ponce, LeCun",
        venue="ICLR",
        year=2022,
        bibtex="""@inproceedings{bardes2022vicreg,
  title = {{VICReg}: Variance-Invariance-Covariance Regularization for Self-Supervised Learning},
  author = {Bardes, Adrien and Ponce, Jean and LeCun, Yann},
  booktitle = {ICLR},
  year = {2022}
}""",
        certainty="Terms certain; 25, 25, 1 and epsilon 1e-4 are the paper's. The factors are those of the released "
        "code and of lightly, which the tests compare with: invariance is a mean over dimensions, variance the mean "
        "of both views, covariance their sum. More than two views (the mean over pairs) are ours.",
        cost="The batch is as many times larger as there are views; a projector beside the encoder.",
        notes="Needs augmentation that makes views differ. With the published factors the loss is in the tens: lower "
        "options.vicreg.weight, or optimiser.clip=1, if training does not stay finite. Variances and covariances are "
        "of the client's own batch; a batch of one image has none and adds exactly 0.",
        deviations="The equations sum the squared distance over dimensions and the variance over both views; 25, 25 "
        "and 1 were found with the code's means, which are the default and only form here.",
    )

    @dataclass(frozen=True)
    class Options(PairOptions):
        invariance: float = option(25.0, "lambda, weight of the distance between views")
        variance: float = option(25.0, "mu, weight of the hinge on the standard deviation of each dimension")
        covariance: float = option(1.0, "nu, weight of the covariances between dimensions")

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("invariance", "variance", "covariance"):
                if not 0 <= getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")

    def loss(self, step: Step) -> dict[str, Tensor]:
        options = self.options

        def pair(one: Tensor, other: Tensor) -> Tensor:
            return vicreg(one, other, options.invariance, options.variance, options.covariance)

        return {"vicreg": options.weight * between_views(self.embeddings(step), step.batch.views, pair)}
