"""FSA: the encoder adapts in the first session alone; linear discriminant analysis of pooled statistics predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fedcl.blocks.closed_form import discriminant_head
from fedcl.blocks.statistics import MOMENT_SUMS, class_means, total_covariance, within_covariance
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.models.norms import scale_and_shift
from fedcl.strategy import Phase, Predictor, Sharing

from ._pooled import ADAPT, STATISTICS, Adapt, FrozenAfter, by_class

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


class FSA(FrozenAfter):
    """Adapts the encoder in the first task, then freezes it; an LDA head from counts, sums and second moments."""

    name = "fsa"
    family = "prototype"
    reductions = {"sums": "sum", "counts": "sum", "scatter": "sum"}
    scatter = True
    card = Card(
        title="First Session Adaptation: A Strong Replay-Free Baseline for Class-Incremental Learning",
        authors="Panos, Kobe, Olmeda Reino, Aljundi, Turner",
        venue="ICCV",
        year=2023,
        bibtex="""@inproceedings{panos2023fsa,
  title = {First Session Adaptation: A Strong Replay-Free Baseline for Class-Incremental Learning},
  author = {Panos, Aristeidis and Kobe, Yuriko and Olmeda Reino, Daniel and Aljundi, Rahaf and Turner, Richard E.},
  booktitle = {ICCV},
  year = {2023}
}""",
        certainty="Head read in the released code: the covariance of all features so far around their common mean, "
        "plus the identity, equal priors. That covariance is the total one, not that within classes of the textbook, "
        "which is cov=within (divided by images less classes, ours). The federated head is exact: all sums add up. "
        "Adaptation by federated averaging is ours.",
        leaves_client=(*STATISTICS, ("scatter", "features x features, float64", "sum", "end of a task")),
        server_state="sums and counts of all classes so far, and one matrix of second moments",
        cost="One forward pass over the task's images at the end of a task, and features^2 numbers up; one linear "
        "system at each evaluation.",
        notes="For a pre-trained encoder (init=, model.checkpoint). The first task trains it with the head and the "
        "cross entropy (the paper: dropout 0.5 before the head, model.dropout=0.5); from then on rounds train the head "
        "alone, which no prediction uses any more. tune=film trains scales and shifts of normalisation layers instead "
        "of the whole body, with BatchNorm on its running statistics; nothing else of the encoder is then sent up. "
        "The paper puts such layers behind each BatchNorm; here they are the normalisation layers' own. "
        "adapt=none judges the encoder as it came. Where images are seen once (federation.passes=once), those of a "
        "round are counted by the model of that round. Counts and second moments leave the client.",
    )

    @dataclass(frozen=True)
    class Options:
        tune: Literal["body", "film"] = option("body", "what adapts: the encoder, or scales and shifts of its norms")
        cov: Literal["total", "within"] = option("total", "covariance of all features, or that within classes")
        shrink: float = option(1.0, "multiple of the identity that is added to the covariance")
        adapt: Adapt = option("first", ADAPT)

        def __post_init__(self) -> None:
            if not 0 < self.shrink < float("inf"):
                raise ValueError(f"shrink must be above 0, not {self.shrink}")

    def share(self, name: str, model: FedModel) -> Sharing:
        if self.options.tune == "body" or not name.startswith("encoder."):
            return "shared"
        tuned = scale_and_shift(model.encoder)
        if not tuned:
            allowed = "body: this encoder has no normalisation layer with scale and shift; model.norm gives it some"
            raise UsageError(f"options.{self.name}.tune", "film", allowed)
        return "shared" if name.removeprefix("encoder.") in tuned else "frozen"

    def adapting(self) -> Phase:
        return Phase("adapt", batch_norm="eval" if self.options.tune == "film" else "same")

    def scores(self, predictor: Predictor, features: Tensor) -> Tensor:
        moments = {n: a for n, a in predictor.state.items() if n in MOMENT_SUMS}
        moments |= {n: by_class(predictor, n) for n in ("sums", "counts")}
        covariance = (total_covariance if self.options.cov == "total" else within_covariance)(moments)
        weight, bias = discriminant_head(class_means(moments), covariance, self.options.shrink)
        scores = features.to(weight.dtype) @ weight.mT + bias
        return scores.masked_fill(moments["counts"] == 0, float("-inf")).to(features.dtype)
