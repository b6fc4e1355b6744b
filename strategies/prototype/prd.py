"""PRD: a contrastive encoder, prototypes that follow it, and old prototypes that keep their relation to samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.blocks.losses import supervised_contrastive, tempered_kl
from fedcl.blocks.prototype_losses import attraction, relation_over_samples
from fedcl.blocks.statistics import widen
from fedcl.cards import Card, option
from fedcl.local.optim import Group
from fedcl.models.prototypes import ClassPrototypes
from fedcl.strategy import Arrays, Batch, Broadcast, ClientContext, Predictor, Server, Step, Strategy

if TYPE_CHECKING:
    from fedcl.models.model import FedModel

PROTOTYPES = "extra.prd.prototypes.weight"


class PRD(Strategy):
    """Prototype-sample relation distillation: replay-free, with a learned prototype a class and no cross entropy."""

    name = "prd"
    family = "prototype"
    stackable = True
    needs_projector = True
    needs_previous = True
    common_clock = "tells the prototypes that are new to all clients from the old ones"
    reductions = {"prototypes": "sum", "counts": "sum"}
    card = Card(
        title="Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning",
        authors="Asadi, Davari, Mudur, Aljundi, Belilovsky",
        venue="ICML",
        year=2023,
        bibtex="""@inproceedings{asadi2023prd,
  title = {Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning},
  author = {Asadi, Nader and Davari, MohammadReza and Mudur, Sudhir and Aljundi, Rahaf and Belilovsky, Eugene},
  booktitle = {ICML},
  year = {2023}
}""",
        certainty="Losses and weights (alpha 2, beta 4) read in a pre-release of the code, whose relation is a softmax "
        "over the classes of each old task (`axis=class`). That the paper's runs over the samples of the batch, the "
        "default here, is from memory and a public summary, and so is its temperature of 1. The federated form is "
        "ours: a new class's prototype is the mean over clients by their images of the class.",
        leaves_client=(
            ("prototypes", "classes x features, float64", "sum", "round"),
            ("counts", "classes", "sum", "round"),
        ),
        server_state="the task in which each class was new; the global model of the previous task's end",
        cost="Two views of each image; after the first task one more forward pass. Prototypes travel with the model "
        "and once more, by images, up. The previous model is sent once per task and client.",
        notes="The head is not trained: the nearest prototype by cosine predicts. Needs augmentation that makes views "
        "differ (data.augment=[simclr]). Prototypes are not decayed; the paper trains them without momentum too, which "
        "is a setting of the whole optimiser here. The distillation is a sum over old classes or tasks, so that its "
        "weight grows. Counts of images a class leave the client. A class that nobody in a round has keeps its "
        "prototype.",
    )

    @dataclass(frozen=True)
    class Options:
        attraction: float = option(2.0, "alpha of the prototypes' attraction to the features of their class")
        relation: float = option(4.0, "beta of the distilled relation between old prototypes and samples")
        axis: Literal["sample", "class"] = option(
            "sample", "what the relation's softmax runs over: samples, or classes of a task as in the released code"
        )
        temperature: float = option(0.1, "temperature of the contrastive loss")
        relation_temperature: float = option(1.0, "temperature of the relation")
        lr_scale: float = option(1.0, "learning rate of the prototypes, as a factor")

        def __post_init__(self) -> None:
            for name in ("attraction", "relation"):
                if not 0 <= getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
            for name in ("temperature", "relation_temperature", "lr_scale"):
                if not 0 < getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        return {"prototypes": ClassPrototypes(model.feature_dim)}

    def groups(self) -> Sequence[Group]:
        return (Group(lambda name: name == PROTOTYPES, lr_scale=self.options.lr_scale, weight_decay=0.0),)

    # client

    def prepare(self, batch: Batch) -> Batch:
        return batch.repeat(2)

    def task_loss(self, step: Step) -> Tensor:
        embeddings = step.output.embeddings
        if embeddings is None:
            raise ValueError("prd needs a projector: set model.projector to auto, linear or mlp")
        return supervised_contrastive(embeddings, step.y, self.options.temperature)

    def loss(self, step: Step) -> dict[str, Tensor]:
        features = step.output.features
        near = attraction(step.params[PROTOTYPES], features, step.y)
        terms = {"attraction": self.options.attraction * near}
        if step.task == 0:
            return terms
        student = step.apply("prototypes", features)
        before = step.forward(step.x, "stage:previous").features
        teacher = step.apply("prototypes", before, which="stage:previous")
        old, tau = step.known & ~step.new, self.options.relation_temperature
        if self.options.axis == "sample":
            relation = relation_over_samples(student, teacher, old, tau)
        else:
            tasks = [old & (step.down["born"] == t) for t in range(step.task)]
            relation = torch.stack([tempered_kl(student, teacher, m, tau) / tau**2 for m in tasks]).sum()
        return {**terms, "relation": self.options.relation * relation}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        weighed = ctx.counts[:, None] * trained[PROTOTYPES].to(torch.float64)
        return {"prototypes": weighed, "counts": ctx.counts}, ctx.state

    # server

    def begin_task(self, server: Server) -> Arrays:
        born = widen(server.state.get("born", torch.zeros_like(server.new[:0], dtype=torch.int64)), len(server.new))
        return {"born": torch.where(server.new, server.task, born)}

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast(server.state if self.options.axis == "class" else {}, scope="task")

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        if "counts" not in server.uploads:
            return server.arrays, server.state
        counts, mean = server.uploads["counts"][:, None], server.arrays[PROTOTYPES]
        weighed = (server.uploads["prototypes"] / counts.clamp(min=1)).to(mean.dtype)
        new = torch.where(counts > 0, weighed, server.before[PROTOTYPES])
        return {**server.arrays, PROTOTYPES: torch.where(server.new[:, None], new, mean)}, server.state

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        cosine: Tensor = predictor.apply("prototypes", F.normalize(predictor.forward(x).features, dim=1))
        return cosine
