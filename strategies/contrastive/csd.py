"""CSD: contrastive supervised distillation, whose second view of an image is the previous model's feature of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import batch_hard_triplet, contrastive_distillation
from fedcl.blocks.losses import tempered_kl
from fedcl.cards import Card, option
from fedcl.masks import by_head
from fedcl.strategy import Step, Strategy


class CSD(Strategy):
    """Pulls each feature to the previous model's features of its class, and holds the old logits, without exemplars."""

    name = "csd"
    family = "contrastive"
    stackable = True
    needs_previous = True
    neutral = {"weight": 0.0, "triplet": 0.0, "distillation": 0.0}
    card = Card(
        title="Contrastive Supervised Distillation for Continual Representation Learning",
        authors="Barletti, Biondi, Pernici, Bruni, Del Bimbo",
        venue="ICIAP",
        year=2022,
        bibtex="""@inproceedings{barletti2022csd,
  title = {Contrastive Supervised Distillation for Continual Representation Learning},
  author = {Barletti, Tommaso and Biondi, Niccol{\\`o} and Pernici, Federico and Bruni, Matteo and
            Del Bimbo, Alberto},
  booktitle = {ICIAP},
  year = {2022}
}""",
        certainty="All terms, their weights of 1, temperatures 0.07 and 2 and the margin of 1 are those of the "
        "released code; the paper was not at hand. In it the triplet term is the mean over the triplets that are above "
        "0, and the distillation has no factor T^2. The federated form, the global model of the previous task as every "
        "client's teacher, is ours.",
        server_state="the global model of the previous task's end",
        cost="One more forward pass a step. The teacher is sent once per task and client.",
        deviations="The released code keeps the checkpoint with the best Recall@1 on test images and teaches with it; "
        "here the teacher is the last one. Its cross entropy gives old classes weight 0, which is plain cross entropy "
        "on a stream of new classes; here the task loss is the stack's, so that a memory's images count.",
        notes="Judged by retrieval on features (evaluate.probes=[retrieval]), not by the head. The released code "
        "divides the learning rate by 100 after the first task: optimiser.schedule=step, optimiser.per=task, "
        "optimiser.milestones=[1], optimiser.gamma=0.01. The teacher's feature of the image itself is always a "
        "positive, so that clients of one class have a loss too; the triplet term is 0 where a batch has no two images "
        "of a class or only one class.",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "weight of the contrastive distillation")
        temperature: float = option(0.07, "temperature of the contrastive distillation")
        triplet: float = option(1.0, "weight of the triplet term")
        margin: float = option(1.0, "margin of the triplet term, in cosines")
        distillation: float = option(1.0, "weight of the distillation of the old classes' logits")
        softening: float = option(2.0, "temperature T of that distillation")

        def __post_init__(self) -> None:
            for name in ("weight", "triplet", "distillation", "margin"):
                value = getattr(self, name)
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name} must be at least 0, not {value}")
            for name in ("temperature", "softening"):
                value = getattr(self, name)
                if not 0 < value < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {value}")

    def loss(self, step: Step) -> dict[str, Tensor]:
        o, features = self.options, step.output.features
        terms = {"triplet": o.triplet * batch_hard_triplet(features, step.y, o.margin)}
        if step.task == 0:
            return terms
        teacher = step.forward(step.x, "stage:previous")
        contrast = contrastive_distillation(features, teacher.features, step.y, o.temperature)
        kept = [
            tempered_kl(step.output.logits, teacher.logits, old, o.softening) / o.softening**2
            for old in by_head(step.known & ~step.new, step.heads, step.task)
        ]
        return {
            **terms,
            "contrastive_distillation": o.weight * contrast,
            "distillation": o.distillation * torch.stack(kept).sum(),
        }
