"""SimSiam: a predictor of one view says the embedding of the other, whose gradient is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fedcl.blocks.view_losses import negative_cosine
from fedcl.cards import Card, option
from fedcl.strategy import Step

from ._views import PairOptions, Views, predictor, projected_dim

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


class SimSiam(Views):
    """Adds the distance between predicted and seen views, over labelled and unlabelled images alike."""

    name = "simsiam"
    unlabelled = "learns"
    needs_others = True
    neutral = {"weight": 0.0, "views": 1}
    card = Card(
        title="Exploring Simple Siamese Representation Learning",
        authors="Chen, He",
        venue="CVPR",
        year=2021,
        bibtex="""@inproceedings{chen2021simsiam,
  title = {Exploring Simple Siamese Representation Learning},
  author = {Chen, Xinlei and He, Kaiming},
  booktitle = {CVPR},
  year = {2021}
}""",
        certainty="Loss certain (equation 2), the same as lightly's NegativeCosineSimilarity both ways, which the "
        "tests compare with. Predictor (one hidden layer a quarter as wide, BatchNorm and ReLU on it alone) and the "
        "BatchNorm without weights on the projector's output are the paper's. Both are a part of the model and "
        "averaged like it: the paper has no federation. More than two views (the mean over ordered pairs) are ours.",
        cost="The batch is as many times larger as there are views; projector and predictor travel with the model.",
        notes="Needs augmentation that makes views differ. Without negatives it can collapse: watch the variance of "
        "the features. The paper's projector has two hidden layers with BatchNorm; model.projector has one without. "
        "BatchNorm of output and predictor sees both views together. The paper keeps the predictor's learning rate "
        "constant while the others decay; here all follow optimiser.schedule. A batch of one image, over which these "
        "cannot normalise, adds exactly 0.",
    )

    @dataclass(frozen=True)
    class Options(PairOptions):
        hidden: int | None = option(None, "width of the predictor's hidden layer; null: a quarter of the embedding's")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.hidden is not None and self.hidden < 1:
                raise ValueError(f"hidden must be at least 1, not {self.hidden}")

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        width = projected_dim(model)
        # The last layer of the paper's projector: without it the embeddings collapse.
        return {
            "norm": nn.BatchNorm1d(width, affine=False),
            "predictor": predictor(width, self.options.hidden or max(1, width // 4)),
        }

    def loss(self, step: Step) -> dict[str, Tensor]:
        embeddings = self.embeddings(step)
        if self.alone(step):
            return {"prediction": embeddings.sum() * 0.0}
        normed = step.apply("norm", embeddings)
        predicted = step.apply("predictor", normed)
        return {"prediction": self.options.weight * negative_cosine(predicted, normed, step.batch.views)}
