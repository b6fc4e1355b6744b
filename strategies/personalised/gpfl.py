"""GPFL: shared class embeddings guide a global and a personal feature, made of one by a shared conditional valve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.local.optim import Group
from fedcl.models.heads import Head
from fedcl.strategy import Arrays, ClientContext, Predictor, Sharing, Step, Strategy, cross_entropy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream

EMBEDDINGS = "extra.gpfl.embeddings.weight"


class ClassEmbeddings(Head):
    """The global category embeddings (GCE): a row g_c of the feature's length for each class."""

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 -> (B, d)."""
        return F.embedding(labels, self.weight)


class ConditionalValve(nn.Module):
    """CoV(z, v) = ReLU( z * (gamma(v) + 1) + beta(v) ), gamma and beta each LayerNorm(ReLU(Linear(v)))."""

    class_axis: ClassVar[Mapping[str, int]] = {}

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.LayerNorm(size))
        self.beta = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.LayerNorm(size))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, d) features and a (d,) condition -> (B, d)."""
        return F.relu(features * (self.gamma(condition) + 1.0) + self.beta(condition))


def conditions(embeddings: Tensor, counts: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The conditional inputs ``v^g = mean_c g_c`` over the known classes and ``v^p = sum_c n_c / n g_c``.

    Args:
        embeddings: (C, d) class embeddings g.
        counts: (C,) the client's images a class; all 0 gives v^p = 0.
        known: (C,) bool.

    >>> g = torch.tensor([[2.0], [4.0], [9.0]])
    >>> conditions(g, torch.tensor([3, 1, 0]), torch.tensor([True, True, False]))
    (tensor([3.]), tensor([2.5000]))
    """
    among = known.to(embeddings.dtype)
    share = counts.to(embeddings.dtype) / counts.sum().clamp(min=1)
    return among @ embeddings / among.sum().clamp(min=1), share @ embeddings


def guidance(features: Tensor, embeddings: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Angle guidance: cross entropy of the cosines between global features and class embeddings, no temperature.

    Args:
        features: (B, d) global features; embeddings: (C, d); labels: (B,); known: (C,) or (B, C) bool.
    """
    cosine = F.normalize(features, dim=-1) @ F.normalize(embeddings, dim=-1).mT
    return cross_entropy(cosine, labels, known)


def magnitude(features: Tensor, frozen: Tensor, labels: Tensor) -> Tensor:
    """Magnitude guidance: the un-squared Frobenius norm of Z^g - G_frozen[y] over the whole batch.

    It grows with the square root of the batch's size, as published.

    >>> magnitude(torch.tensor([[3.0], [4.0]]), torch.zeros(1, 1), torch.tensor([0, 0])).item()
    5.0
    """
    norm: Tensor = torch.linalg.vector_norm(features - F.embedding(labels, frozen))
    return norm


class GPFL(Strategy):
    """Encoder, class embeddings and valve are shared; the head on the personal feature stays at the client."""

    name = "gpfl"
    family = "personalised"
    stackable = True
    predicts_by_state = True
    card = Card(
        title="GPFL: Simultaneously Learning Global and Personalized Feature Information for Personalized "
        "Federated Learning",
        authors="Zhang, Hua, Wang, Song, Xue, Ma, Cao, Guan",
        venue="ICCV",
        year=2023,
        bibtex="""@inproceedings{zhang2023gpfl,
  title = {{GPFL}: Simultaneously Learning Global and Personalized Feature Information for Personalized Federated
           Learning},
  author = {Zhang, Jianqing and Hua, Yang and Wang, Hao and Song, Tao and Xue, Zhengui and Ma, Ruhui and
            Cao, Jian and Guan, Haibing},
  booktitle = {ICCV},
  year = {2023}
}""",
        certainty="Read in the authors' released code. There the conditional inputs come of the client's "
        "own embeddings of the round before, taken before the server's are copied in: conditions=released; "
        "the natural reading is the default. The release trains encoder and head, embeddings, and valve "
        "with three plain SGD optimisers of one learning rate; here it is one optimiser with a weight decay "
        "of its own for the last two.",
        client_state="its head, its images a class of the latest task, the embeddings of its last round",
        cost="C d + 2 (d^2 + d) + 4 d more floats each way (C classes, d features); two passes of the valve a step.",
        notes="Read the personal accuracies: the head that the server has is never trained. The condition "
        "is 0 in the very first round. weight was tuned by model in the paper: 0.01 (small CNN and MLP, "
        "decay 0.1), 0.0001 (ResNet-18, decay 0). In a stream the shares of classes in v^p are those of the "
        "client's latest task, and v^g is the mean over the classes known so far (ours).",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(0.01, "lambda: weight of the magnitude guidance")
        decay: float = option(0.1, "mu: weight decay of class embeddings and valve")
        conditions: Literal["received", "released"] = option(
            "received", "embeddings the conditions come of: the received ones, or the client's own of its last round"
        )

        def __post_init__(self) -> None:
            if not 0 <= self.weight < float("inf") or not 0 <= self.decay < float("inf"):
                raise ValueError("weight and decay must be at least 0")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            allowed = "linear: gpfl's head is a linear one on personal features"
            raise UsageError("model.head", config.model.head, allowed, ("linear",))
        if config.model.feature_norm != "none":
            allowed = "none: what goes into gpfl's head are personal features"
            raise UsageError("model.feature_norm", config.model.feature_norm, allowed, ("none",))

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        size = model.feature_dim
        return {"embeddings": ClassEmbeddings(size), "valve": ConditionalValve(size)}

    def groups(self) -> Sequence[Group]:
        return [Group(lambda name: name.startswith("extra.gpfl."), weight_decay=self.options.decay)]

    def share(self, name: str, model: FedModel) -> Sharing:
        return "private" if name.startswith("head.") else "shared"

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        embeddings = ctx.received[EMBEDDINGS]
        if self.options.conditions == "released":
            embeddings = ctx.state.get("last/" + EMBEDDINGS, embeddings)
        both = conditions(embeddings, ctx.counts, ctx.known)
        if ctx.task == 0 and ctx.round == 0:
            both = torch.zeros_like(both[0]), torch.zeros_like(both[1])
        return {"global": both[0], "personal": both[1]}

    def task_loss(self, step: Step) -> Tensor:
        personal = step.apply("valve", step.output.features, step.carried["personal"])
        logits = logits_of(step.params, personal)
        return cross_entropy(logits, step.y, step.among(step.known))

    def loss(self, step: Step) -> dict[str, Tensor]:
        features = step.apply("valve", step.output.features, step.carried["global"])
        norm = magnitude(features, step.received[EMBEDDINGS].detach(), step.y)
        angle = guidance(features, step.params[EMBEDDINGS], step.y, step.among(step.known))
        return {"angle": angle, "magnitude": self.options.weight * norm}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, {"counts": ctx.counts, "last/" + EMBEDDINGS: trained[EMBEDDINGS]}

    like_parameters = {"last": "initial"}

    # anywhere

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        features = predictor.forward(x).features
        embeddings = predictor.arrays[EMBEDDINGS]
        if self.options.conditions == "released":
            embeddings = predictor.own.get("last/" + EMBEDDINGS, embeddings)
        width = len(embeddings)
        counts = predictor.own.get("counts", torch.zeros(0, dtype=torch.int64, device=x.device))
        counts = F.pad(counts, (0, width - len(counts)))
        known = F.pad(predictor.known, (0, width - len(predictor.known)))
        whole, personal = conditions(embeddings, counts, known)
        condition = whole if predictor.client is None else personal
        return logits_of(predictor.arrays, predictor.apply("valve", features, condition))


def logits_of(arrays: Arrays, features: Tensor) -> Tensor:
    """(B, C) scores of a linear head for features that are not the encoder's."""
    return F.linear(features, arrays["head.weight"], arrays.get("head.bias"))
