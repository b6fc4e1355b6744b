"""Nearest mean classifier: class means pooled exactly over all clients that hold a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, Models, Predictor, Sharing

from ._pooled import STATISTICS, Pooled, means_of, of_head

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


def nearest_mean_scores(features: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """Negative Euclidean distance to each class mean; -inf for a class without a sample.

    Args:
        features: (B, d).
        means: (C, d).
        counts: (C,) int64.

    >>> nearest_mean_scores(torch.zeros(1, 1), torch.tensor([[2.0], [1.0]]), torch.tensor([3, 0])).tolist()
    [[-2.0, -inf]]
    """
    # Without matrix products: |f|^2 - 2 f m + |m|^2 cancels where a feature is near a mean.
    distance = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(counts > 0, -distance, -torch.inf)


class NearestMean(Pooled):
    """Predicts the class whose mean feature is nearest; means are sums and counts over all holders of a class."""

    name = "nearest_mean"
    aliases = ("nmc", "ncm")
    family = "prototype"
    neutral = {}
    card = Card(
        title="A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
        authors="Janson, Zhang, Aljundi, Elhoseiny",
        venue="NeurIPS Workshop on Distribution Shifts",
        year=2022,
        bibtex="""@inproceedings{janson2022simple,
  title = {A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning},
  author = {Janson, Paul and Zhang, Wenxuan and Aljundi, Rahaf and Elhoseiny, Mohamed},
  booktitle = {NeurIPS Workshop on Distribution Shifts},
  year = {2022}
}""",
        certainty="Rule read in the released code: normalised features, means not normalised again, Euclidean "
        "distance. "
        "The federated form is exact: sums and counts add up.",
        leaves_client=STATISTICS,
        server_state="sums and counts of all classes so far",
        cost="One forward pass over the task's images and one small upload at the end of a task.",
        notes="Counts of images a class leave the client. The paper keeps a pre-trained encoder frozen: "
        "adapt=none with init= or model.checkpoint, then only the head is trained. As a part of a stack the encoder "
        "is trained (adapt=all, the default); means of old "
        "classes stay those of their own task and drift away from the features. `score=both` adds the "
        "log-probabilities of "
        "the means and of the head (ours). Before the end of the first task the head predicts; "
        "within a task its new classes have no mean yet. Where images are seen once (federation.passes=once), those of "
        "a round are counted at its end, by the model of that round.",
    )

    @dataclass(frozen=True)
    class Options:
        normalise: bool = option(True, "features are divided by their norm before they are averaged and compared")
        score: Literal["means", "both"] = option(
            "means", "what predicts: the means, or the means and the head together"
        )
        adapt: Literal["none", "all"] = option("all", "which tasks train the encoder: none, as in the paper, or all")
        scale: float = option(10.0, "for score=both: softmax of -scale * squared distance")

        def __post_init__(self) -> None:
            if not 0 < self.scale < float("inf"):
                raise ValueError(f"scale must be above 0, not {self.scale}")

    def features(self, raw: Tensor) -> Tensor:
        """The features that means are taken of, (B, d) to (B, d)."""
        return F.normalize(raw, dim=-1) if self.options.normalise else raw

    def share(self, name: str, model: FedModel) -> Sharing:
        return "frozen" if self.options.adapt == "none" and not of_head(name) else "shared"

    def embedded(self, models: Models, arrays: Arrays, kept: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self.features(super().embedded(models, arrays, kept, x))

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        output = predictor.forward(x)
        if "counts" not in predictor.state:
            return output.logits
        means, counts = means_of(predictor)
        scores = nearest_mean_scores(self.features(output.features), means.to(output.features.dtype), counts)
        if self.options.score == "means":
            return scores
        head = torch.where(predictor.known, output.logits, -torch.inf).log_softmax(dim=-1)
        means_log: Tensor = (-self.options.scale * scores.square()).log_softmax(dim=-1)
        return head + means_log
