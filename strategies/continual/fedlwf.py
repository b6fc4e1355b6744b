"""FedLwF: distillation from the global model of the previous task on the images of the new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.blocks.losses import cross_entropy, distillation
from fedcl.cards import Card, option
from fedcl.masks import by_head
from fedcl.strategy import Step, Strategy

from ..federated.finetune import new_or_known


class FedLwF(Strategy):
    """Learning without forgetting with the previous global model as the teacher of every client."""

    name = "fedlwf"
    aliases = ("lwf",)
    family = "continual"
    stackable = True
    unlabelled = "sees"
    neutral = {"weight": 0.0, "task": "known"}
    needs_previous = True
    card = Card(
        title="Learning without Forgetting",
        authors="Li and Hoiem",
        venue="ECCV",
        year=2016,
        bibtex="""@inproceedings{li2016lwf,
  title = {Learning without Forgetting},
  author = {Li, Zhizhong and Hoiem, Derek},
  booktitle = {ECCV},
  year = {2016}
}""",
        certainty="Federated form, weight 3 and temperature 2 read in the released code of TARGET (ICCV "
        "2023), which uses it as a baseline. Written there, and here, as soft cross entropy without the "
        "factor T^2.",
        server_state="the global model of the previous task's end",
        cost="One more forward pass a step. The teacher is sent once per task and client.",
        notes="With a memory in the stack, images of old classes keep the softmax over all known classes. Where tasks "
        "are known at test (task_incremental), each old task's head is distilled by itself, as in the paper, and the "
        "terms add up.",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(3.0, "weight of the distillation term")
        temperature: float = option(2.0, "temperature of both softmaxes")
        task: Literal["new", "known"] = option("new", "classes of the cross entropy: the new ones, or all known")

        def __post_init__(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")
            if not 0 < self.temperature < float("inf"):
                raise ValueError(f"temperature must be above 0, not {self.temperature}")

    def task_loss(self, step: Step) -> Tensor:
        classes = new_or_known(step) if self.options.task == "new" else step.known
        return cross_entropy(step.output.logits, step.y, step.among(classes))

    def loss(self, step: Step) -> dict[str, Tensor]:
        if step.task == 0:
            return {}
        teacher = step.forward(step.x, "stage:previous").logits
        student = step.output.logits
        terms = [
            distillation(student, teacher, old, self.options.temperature)
            for old in by_head(step.known & ~step.new, step.heads, step.task)
        ]
        return {"distillation": self.options.weight * torch.stack(terms).sum()}
