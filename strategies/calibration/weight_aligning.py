"""WA: after each task the server scales the new rows of the head to the mean norm of the old ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcl.blocks.losses import cross_entropy, tempered_kl
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.masks import by_head
from fedcl.strategy import Arrays, Finished, Server, Step, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def align(weight: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Rows of ``new`` classes times gamma = mean norm of old rows / mean norm of new rows.

    Args:
        weight: (C, d) rows of the head.
        old, new: (C,) bool masks.

    Returns the weight itself when there is no old or no new class, or the new rows are zero.

    >>> w = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    >>> align(w, torch.tensor([True, False]), torch.tensor([False, True])).tolist()
    [[3.0, 4.0], [0.0, 5.0]]
    """
    norms = torch.linalg.vector_norm(weight, dim=1)
    if not old.any() or not new.any() or not norms[new].any():
        return weight
    gamma = norms[old].mean() / norms[new].mean()
    return torch.where(new[:, None], gamma * weight, weight)


class WeightAligning(Strategy):
    """Fairness between old and new classes by aligning the head; alone, it also distils as the paper does."""

    name = "weight_aligning"
    aliases = ("wa",)
    family = "calibration"
    stackable = True
    unlabelled = "sees"
    needs_previous = True
    yields = ("task_loss",)
    common_clock = "scales the rows of the classes that are new to all clients at once"
    card = Card(
        title="Maintaining Discrimination and Fairness in Class Incremental Learning",
        authors="Zhao, Xiao, Gan, Zhang, Xia",
        venue="CVPR",
        year=2020,
        bibtex="""@inproceedings{zhao2020wa,
  title = {Maintaining Discrimination and Fairness in Class Incremental Learning},
  author = {Zhao, Bowen and Xiao, Xi and Gan, Guojun and Zhang, Bin and Xia, Shu-Tao},
  booktitle = {CVPR},
  year = {2020}
}""",
        certainty="Alignment certain. The loss (1 - lambda) CE + lambda KD is the specification's; a released "
        "version of PyCIL trains CE + 2 KD. That the paper keeps the head's weights non-negative during training is "
        "from memory; PyCIL leaves it out (`clip=false`), as it does the factor T^2 (`squared=false`).",
        server_state="the global model of the previous task's end",
        cost="The alignment costs nothing and sends nothing; the loss one more forward pass a step.",
        notes="Fills the task loss with (1 - lambda) CE + lambda KD, lambda = old / seen classes, unless "
        "another strategy of the stack has a task loss of its own: then it only aligns. Alignment assumes "
        "features that are not negative and a head without bias (`model.head_bias=false`); a bias is left "
        "as it is. The aligned model goes on training. A task without new classes is trained with the cross entropy "
        "alone, and nothing is aligned. Nor is anything where tasks are known at test (task_incremental): classes of "
        "different tasks do not compete; the distillation is then that of each old task's head, added up.",
    )

    @dataclass(frozen=True)
    class Options:
        temperature: float = option(2.0, "temperature of the distillation")
        squared: bool = option(True, "the distillation is multiplied by T^2; PyCIL's code does not")
        clip: bool = option(True, "head weights are kept at or above 0 after each step")

        def __post_init__(self) -> None:
            if not 0 < self.temperature < float("inf"):
                raise ValueError(f"temperature must be above 0, not {self.temperature}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            raise UsageError("model.head", config.model.head, f"linear: {self.name} scales the rows of a linear head")

    # client

    def task_loss(self, step: Step) -> Tensor:
        loss = cross_entropy(step.output.logits, step.y, step.among(step.known))
        if step.task == 0:
            return loss
        old = step.known & ~step.new
        share = old.sum().to(loss.dtype) / step.known.sum()
        share = torch.where(step.new.any(), share, torch.zeros_like(share))  # nothing new: nothing to weigh against
        teacher = step.forward(step.x, "stage:previous").logits
        terms = [
            tempered_kl(step.output.logits, teacher, group, self.options.temperature)
            for group in by_head(old, step.heads, step.task)
        ]
        divergence = torch.stack(terms).sum()
        if not self.options.squared:
            divergence = divergence / self.options.temperature**2
        return (1 - share) * loss + share * divergence

    def after_step(self, step: Step, params: Arrays) -> Arrays:
        if not self.options.clip:
            return params
        return {**params, "head.weight": params["head.weight"].clamp(min=0)}

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        if server.task == 0 or server.task_known:
            return Finished(server.arrays), server.state
        old = server.known & ~server.new
        aligned = align(server.arrays["head.weight"], old, server.new)
        return Finished({**server.arrays, "head.weight": aligned}), server.state
