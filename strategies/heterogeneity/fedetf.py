"""FedETF: instead of a trained head, fixed prototypes as far apart as they can be, and a projection that finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedcl.blocks.class_counts import balanced_softmax
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.models.heads import SimplexHead
from fedcl.strategy import (
    Arrays,
    ClientContext,
    Finished,
    Phase,
    Predictor,
    Server,
    Sharing,
    Step,
    Strategy,
    cross_entropy,
)

from ..calibration._post_hoc import Sgd, fit

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream

PERSONAL, CLASSIFIER = "personal", "extra.fedetf.classifier."


class EquiangularClassifier(nn.Module):
    """logits = s mu^T M with mu = P(h) / ||P(h)||: projection P and scale s are trained, the prototypes M are not.

    M is an equiangular tight frame (ETF): unit prototypes, every two of cosine -1/(C - 1).
    """

    def __init__(self, feature_dim: int, dim: int, scale: float) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_dim, dim)
        self.prototypes = SimplexHead(dim)
        self.prototypes.feature_norm = "l2"
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""
        logits: Tensor = self.scale * self.prototypes(self.projection(features))
        return logits


class FedETF(Strategy):
    """Balanced softmax on cosines to the prototypes of an equiangular tight frame, which all clients share."""

    name = "fedetf"
    family = "heterogeneity"
    stackable = True
    like_parameters = {PERSONAL: "initial"}
    tried_with = {"model.head_allocate": "all"}
    card = Card(
        title="No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with Synthetic and Fixed "
        "Classifier",
        authors="Li, Shang, He, Lin, Wu",
        venue="ICCV",
        year=2023,
        bibtex="""@inproceedings{li2023fedetf,
  title = {No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with Synthetic and Fixed
           Classifier},
  author = {Li, Zexi and Shang, Xinyi and He, Rui and Lin, Tao and Wu, Chao},
  booktitle = {ICCV},
  year = {2023}
}""",
        certainty="Classifier, loss and personalisation read in the released code; the paper was not available. "
        "Size 64 and scale 10 are those of its small CNN; its ResNets project to as many dimensions as there are "
        "classes and start at scale 1. A stream of tasks is ours.",
        client_state="with alternations above 0 its personal model, and prototypes of its own",
        cost="A linear layer of d x dim and one number more each way; the head is not trained. With alternations above "
        "0, at the end of each task one more round of local training and passes of the classifier over its features.",
        notes="Needs model.head_allocate=all: the prototypes of all classes of the stream are fixed before the first "
        "task, and the softmax runs over those known so far. The model's own head stays as it was drawn and nothing "
        "reads it here; a stage or loss that reads its logits does not go with this strategy. Counts of a client's "
        "images are used in its loss and do not leave it. The published personalisation comes after the training of "
        "the global model and does not change it: options.fedetf.alternations=20 has clients do it at the end of each "
        "task, which needs its images again. Personal accuracies show it; without it they are the global model's.",
        deviations="Prototypes are the same simplex turned by another random matrix. In the personalisation, "
        "prototypes and projection are tuned on features that are taken once, in eval mode and without augmentation, "
        "as the encoder does not change. Clients count by their images, in the released code by their batches.",
    )

    @dataclass(frozen=True)
    class Options:
        dim: int = option(64, "length of a prototype, at least the number of classes minus 1")
        scale: float = option(10.0, "initial value of the learned factor on the cosines")
        alternations: int = option(
            0, "turns of personal tuning of prototypes, then projection, at the end of a task; 20 as published"
        )
        epochs: int = option(3, "passes of each of the two in a turn", unit="epochs")
        lr_prototypes: float = option(0.1, "learning rate of a client's own prototypes")
        lr_projection: float = option(0.05, "learning rate of its projection, with momentum 0.9 and weight decay 5e-4")

        def __post_init__(self) -> None:
            if self.dim < 1:
                raise ValueError(f"dim must be at least 1, not {self.dim}")
            if not 0 < self.scale < float("inf"):
                raise ValueError(f"scale must be above 0, not {self.scale}")
            if self.alternations < 0:
                raise ValueError(f"alternations must be at least 0, not {self.alternations}")
            self.recipes(1)

        def recipes(self, batch_size: int) -> tuple[Sgd, Sgd]:
            """How prototypes and projection are tuned."""
            return (
                Sgd(self.epochs, self.lr_prototypes, 0.0, 0.0, batch_size, cosine=False),
                Sgd(self.epochs, self.lr_projection, 0.9, 5e-4, batch_size, cosine=False),
            )

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head_allocate != "all":
            allowed = f"all: {self.name} fixes the prototypes of all classes before the first task"
            raise UsageError("model.head_allocate", config.model.head_allocate, allowed)
        if self.options.dim < stream.num_classes - 1:
            allowed = f"at least {stream.num_classes - 1} for {stream.num_classes} classes"
            raise UsageError("options.fedetf.dim", self.options.dim, allowed)
        if self.options.alternations and config.federation.passes == "once":
            allowed = "many with options.fedetf.alternations above 0, which needs a task's images again at its end"
            raise UsageError("federation.passes", "once", allowed)

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        return {"classifier": EquiangularClassifier(model.feature_dim, self.options.dim, self.options.scale)}

    def share(self, name: str, model: FedModel) -> Sharing:
        return "frozen" if name.startswith("head.") else "shared"

    # client

    def task_loss(self, step: Step) -> Tensor:
        logits = step.apply("classifier", step.output.features)
        return balanced_softmax(logits, step.y, step.counts, step.among(step.known))

    def tune(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The client's own model: all of it trained as in a round, then prototypes and projection in turns."""
        own = ctx.train(Phase(PERSONAL))
        with torch.no_grad():
            features = torch.cat([ctx.forward(x, own).features for x, _ in ctx.batches()])
        parts = (
            [n for n in own if n.startswith(CLASSIFIER + "prototypes.")],
            [n for n in own if n.startswith(CLASSIFIER + "projection.")],
        )

        def loss(tuned: Arrays, places: Tensor) -> Tensor:
            labels = ctx.labels[places]
            logits = ctx.apply("classifier", features[places], which={**own, **tuned})
            return cross_entropy(logits, labels, ctx.among(ctx.known, labels))

        for turn in range(self.options.alternations):
            for names, recipe in zip(parts, self.options.recipes(ctx.batch_size), strict=True):
                order = (*ctx.key, self.name, turn, names[0])
                own = {**own, **fit({n: own[n] for n in names}, loss, len(features), recipe, *order)}
        return {}, {f"{PERSONAL}/{n}": a for n, a in own.items()}

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        if self.options.alternations:
            server.exchange(self.tune)
        return Finished(server.arrays), server.state

    # anywhere

    def personal(self, arrays: Arrays, state: Arrays) -> Arrays:
        return {n: state.get(f"{PERSONAL}/{n}", a) for n, a in arrays.items()}

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        scores: Tensor = predictor.apply("classifier", predictor.forward(x).features)
        return scores
