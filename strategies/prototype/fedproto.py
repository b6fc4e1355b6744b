"""FedProto: clients share mean features of their classes and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.blocks.statistics import class_sums, widen
from fedcl.cards import Card, option
from fedcl.strategy import Arrays, Broadcast, ClientContext, Predictor, Server, Sharing, Step, Strategy

from .nearest_mean import nearest_mean_scores

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


def prototype_distance(features: Tensor, labels: Tensor, prototypes: Tensor, held: Tensor) -> Tensor:
    """``1/(B d) sum_i ||f_i - p_{y_i}||^2`` over the images whose class has a prototype; the others add 0.

    Args:
        features: (B, d).
        labels: (B,) int64.
        prototypes: (C, d); its gradient is stopped.
        held: (C,) bool, the classes with a prototype.

    >>> f = torch.tensor([[3.0, 1.0], [5.0, 5.0]])
    >>> prototype_distance(f, torch.tensor([0, 1]), torch.ones(2, 2), torch.tensor([True, False])).item()
    1.0
    """
    apart = features - F.embedding(labels, prototypes.detach())
    return torch.where(held[labels][:, None], apart.square(), 0.0).mean()


class FedProto(Strategy):
    """Each client keeps a model of its own, and its features near the prototypes that all clients pool."""

    name = "fedproto"
    family = "prototype"
    stackable = True
    reductions = {"sums": "sum", "counts": "sum"}
    card = Card(
        title="FedProto: Federated Prototype Learning across Heterogeneous Clients",
        authors="Tan, Long, Liu, Zhou, Lu, Jiang, Zhang",
        venue="AAAI",
        year=2022,
        bibtex="""@inproceedings{tan2022fedproto,
  title = {{FedProto}: Federated Prototype Learning across Heterogeneous Clients},
  author = {Tan, Yue and Long, Guodong and Liu, Lu and Zhou, Tianyi and Lu, Qinghua and Jiang, Jing and
            Zhang, Chengqi},
  booktitle = {AAAI},
  year = {2022}
}""",
        certainty="Loss, private models and prediction by the nearest prototype are certain; that images of classes "
        "without a prototype count in the mean, with 0, is from memory of the released code. The paper's pooling can "
        "be read as a mean over clients or over images: average=clients and average=samples.",
        leaves_client=(
            ("sums", "classes x features, float64", "sum", "each round"),
            ("counts", "classes", "sum", "each round"),
        ),
        client_state="its whole model",
        server_state="prototypes and numbers of the classes met so far",
        cost="C d + C numbers each way and round in place of the model (C classes, d features); one pass over the "
        "client's images after its training.",
        notes="Read the personal accuracies (partition.test=same_mix or holdout(p)): no global model is ever trained. "
        "Counts of images a class leave the client; with average=clients only which classes it holds. A class that no "
        "client of a round holds keeps its prototype of an earlier round: in a stream, that of its last task. All "
        "clients have the same network here; the paper lets them differ.",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "lambda: weight of the distance to the prototypes")
        average: Literal["samples", "clients"] = option(
            "samples", "prototypes: means over all images, or over the means of the clients that hold the class"
        )
        predict: Literal["prototypes", "head"] = option("prototypes", "what predicts: nearest prototype or own head")

        def __post_init__(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")

    def share(self, name: str, model: FedModel) -> Sharing:
        return "private"

    # client

    def loss(self, step: Step) -> dict[str, Tensor]:
        if "prototypes" not in step.down:
            return {}
        features = step.output.features
        prototypes = step.down["prototypes"].to(features.dtype)
        distance = prototype_distance(features, step.y, prototypes, step.down["held"])
        return {"prototypes": self.options.weight * distance}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        width = len(ctx.known)
        sums, counts = class_sums(
            ctx.batches(), lambda x: ctx.forward(x, trained).features, width, ctx.model.feature_dim
        )
        if self.options.average == "clients":
            sums, counts = sums / counts.clamp(min=1)[:, None], (counts > 0).to(torch.int64)
        return {"sums": sums, "counts": counts}, ctx.state

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        found, state, width = server.uploads, server.state, len(server.known)
        if not found:
            return server.arrays, state
        counts = found["counts"]
        means = found["sums"] / counts.clamp(min=1)[:, None]
        if state:
            held = (counts > 0)[:, None]
            means = torch.where(held, means, widen(state["prototypes"], width))
            counts = torch.where(held[:, 0], counts, widen(state["counts"], width))
        return server.arrays, {"prototypes": means, "counts": counts}

    def broadcast(self, server: Server) -> Broadcast:
        if not server.state:
            return Broadcast({})
        width = len(server.known)
        held = widen(server.state["counts"], width) > 0
        return Broadcast({"prototypes": widen(server.state["prototypes"], width), "held": held})

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        output, state = predictor.forward(x), predictor.state
        if self.options.predict == "head" or not state:
            return output.logits
        width = output.logits.shape[-1]
        prototypes, counts = (widen(state[n], width) for n in ("prototypes", "counts"))
        scores = nearest_mean_scores(output.features, prototypes.to(output.features.dtype), counts)
        # Where none of the classes that may be predicted has a prototype, the head knows more than nothing.
        return torch.where((predictor.known & (counts > 0)).any(), scores, output.logits)
