"""CL2R: a fixed simplex classifier and distilled features of a memory, so that new features search old galleries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import feature_distillation
from fedcl.blocks.losses import cross_entropy
from fedcl.blocks.memory import MemoryOptions, Policy, Rehearsal
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, ClientContext, Step

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def most_of_each(priority: Tensor, labels: Tensor, most: int) -> Tensor:
    """Indices of at most ``most`` images of each class, those of lowest priority, ascending.

    Args:
        priority, labels: (n,) int64.

    >>> most_of_each(torch.tensor([3, 1, 2, 9]), torch.tensor([0, 0, 0, 1]), 2).tolist()
    [1, 2, 3]
    """
    order = torch.argsort(priority, stable=True)
    parts = [order[labels[order] == label][:most] for label in torch.unique(labels)]
    return torch.cat([order[:0], *parts]).sort().values


class CL2R(Rehearsal):
    """Cross entropy with the vertices of a simplex for all classes to come; features of the memory stay in place."""

    name = "cl2r"
    family = "contrastive"
    stackable = True
    needs_previous = True
    tried_with = {"model.head": "simplex", "model.head_allocate": "all"}
    card = Card(
        title="CL2R: Compatible Lifelong Learning Representations",
        authors="Biondi, Pernici, Bruni, Mugnai, Del Bimbo",
        venue="ACM TOMM",
        year=2023,
        bibtex="""@article{biondi2023cl2r,
  title = {{CL2R}: Compatible Lifelong Learning Representations},
  author = {Biondi, Niccol{\\`o} and Pernici, Federico and Bruni, Matteo and Mugnai, Daniele and Del Bimbo, Alberto},
  journal = {ACM Transactions on Multimedia Computing, Communications and Applications},
  year = {2023}
}""",
        certainty="Loss, schedule, 20 random images a class and weight 5 read in the released code and its settings "
        "(the default of its code is 10). The federated form is ours: clients share the vertices, which are never "
        "sent, the teacher is the global model of the previous task, and each client keeps a memory of its own.",
        leaves_client=(("stored", "1", "sum", "end of a task"),),
        client_state="image ids (the images are the client's own) and their priorities",
        server_state="the global model of the previous task's end",
        cost="Twice the images a step once the memory is filled, and one more forward pass of the memory's. The head "
        "is never sent after the start.",
        deviations="The paper ends the encoder with a linear layer of one output less than there are classes, which is "
        "the feature. Here the simplex is turned into the encoder's features by a fixed orthonormal matrix; what is "
        "orthogonal to it is held by the distillation alone.",
        notes="Needs model.head=simplex and model.head_allocate=all, and at least one feature less than classes. All "
        "vertices stay in the softmax, those of classes to come too. As published a batch is half memory, half stream: "
        "federation.batch_size is half of the paper's 128. Judged by evaluate.probes=[compatibility, retrieval]. In a "
        "task without new classes the published schedule weighs the distillation with 0 (`schedule=constant` does "
        "not). A client without a memory does not distil.",
    )

    @dataclass(frozen=True)
    class Options(MemoryOptions):
        policy: Policy = option("class_balanced", "which images stay: a uniform sample, or equally many of each class")
        per_class: int = option(20, "most images of a class in a memory; 0: what the budget allows", unit="images")
        weight: float = option(5.0, "lambda of the distilled features")
        schedule: Literal["classes", "constant"] = option(
            "classes", "lambda is multiplied by sqrt(new classes / old classes), or constant"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.per_class < 0:
                raise ValueError(f"per_class must be at least 0, not {self.per_class}")
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "simplex":
            raise UsageError("model.head", config.model.head, f"simplex, with model.head_allocate=all, for {self.name}")

    # client

    def remember(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        stored, state = super().remember(ctx)
        if not self.options.per_class:
            return stored, state
        labels = ctx.store.label_tensor[state["ids"]]
        kept = most_of_each(state["priority"], labels, self.options.per_class)
        return {"stored": torch.tensor(len(kept), dtype=torch.int64)}, {n: a[kept] for n, a in state.items()}

    def task_loss(self, step: Step) -> Tensor:
        # The vertices of classes to come stay free: no known class may take their place.
        return cross_entropy(step.output.logits, step.y, step.among(torch.ones_like(step.known)))

    def loss(self, step: Step) -> dict[str, Tensor]:
        memory = step.batch.rows(self.name)
        if step.task == 0 or not len(memory):
            return {}
        teacher = step.forward(step.x[memory], "stage:previous").features
        distance = feature_distillation(step.output.features[memory], teacher)
        if self.options.schedule == "constant":
            return {"feature_distillation": self.options.weight * distance}
        old, new = (step.known & ~step.new).sum(), step.new.sum()
        share = (new.to(distance.dtype) / old.clamp(min=1)).sqrt()
        return {"feature_distillation": self.options.weight * share * distance}
