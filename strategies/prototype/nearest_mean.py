"""Nearest mean classifier: class means pooled exactly over all clients that hold a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.statistics import class_sums, widen
from fedcl.strategy import Arrays, ClientContext, Finished, Predictor, Server, Strategy


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


class NearestMean(Strategy):
    """Predicts the class whose mean feature is nearest; means are sums and counts over all holders of a class."""

    name = "nearest_mean"
    aliases = ("nmc", "ncm")
    family = "prototype"
    stackable = True
    neutral = {}
    reductions = {"sums": "sum", "counts": "sum"}
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
        leaves_client=(
            ("sums", "classes x features, float64", "sum", "end of a task"),
            ("counts", "classes", "sum", "end of a task"),
        ),
        server_state="sums and counts of all classes so far",
        cost="One forward pass over the task's images and one small upload at the end of a task.",
        notes="Counts of images a class leave the client. The paper keeps the encoder frozen; where it is "
        "trained on, means of old "
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
        scale: float = option(10.0, "for score=both: softmax of -scale * squared distance")

        def __post_init__(self) -> None:
            if not 0 < self.scale < float("inf"):
                raise ValueError(f"scale must be above 0, not {self.scale}")

    def features(self, raw: Tensor) -> Tensor:
        """The features that means are taken of, (B, d) to (B, d)."""
        return F.normalize(raw, dim=-1) if self.options.normalise else raw

    # client

    def count(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Sums and counts of this client's features by class."""
        width = len(ctx.known)
        sums, counts = class_sums(
            ctx.batches(), lambda x: self.features(ctx.forward(x).features), width, ctx.model.feature_dim
        )
        return {"sums": sums, "counts": counts}, ctx.state

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        if not server.online:
            return server.arrays, server.state
        return server.arrays, self.added(server, server.exchange(self.count))

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        if server.online:  # the images have passed, each was counted in its round
            return Finished(server.arrays), server.state
        found = server.exchange(self.count)
        if server.repeats:
            # Old images were counted again, by the present encoder: their earlier sums are superseded.
            return Finished(server.arrays), found
        return Finished(server.arrays), self.added(server, found)

    def added(self, server: Server, found: Arrays) -> Arrays:
        """Sums and counts so far with those of one exchange."""
        width = len(server.known)
        state = {n: widen(a, width) + found[n] if n in found else widen(a, width) for n, a in server.state.items()}
        return state or found

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        output = predictor.forward(x)
        if "counts" not in predictor.state:
            return output.logits
        width = output.logits.shape[-1]
        counts = widen(predictor.state["counts"], width)
        means = (widen(predictor.state["sums"], width) / counts.clamp(min=1)[:, None]).to(output.features.dtype)
        scores = nearest_mean_scores(self.features(output.features), means, counts)
        if self.options.score == "means":
            return scores
        head = torch.where(predictor.known, output.logits, -torch.inf).log_softmax(dim=-1)
        means_log: Tensor = (-self.options.scale * scores.square()).log_softmax(dim=-1)
        return head + means_log
