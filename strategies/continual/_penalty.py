"""What methods with a quadratic penalty around the previous global model share: options, cross entropy, the term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedcl.blocks.losses import cross_entropy, quadratic
from fedcl.cards import option
from fedcl.strategy import Arrays, Broadcast, Server, Step, Strategy

from ..federated.finetune import new_or_known


@dataclass(frozen=True)
class PenaltyOptions:
    """Options of a penalty.

    Raises:
        ValueError: one is out of its range.
    """

    weight: float = option(1.0, "weight of the penalty")
    task: Literal["new", "known"] = option("new", "classes of the cross entropy: the new ones, or all known")

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be at least 0, not {self.weight}")


class Penalty(Strategy):
    """``weight * scale / 2 * sum_i importance_i (w_i - anchor_i)^2``, both arrays in the server's state, sent once a
    task.
    """

    family = "continual"
    stackable = True
    unlabelled = "sees"
    yields = ("task_loss",)
    neutral = {"weight": 0.0, "task": "known"}
    Options: ClassVar[type] = PenaltyOptions
    importance: ClassVar[str] = "importance"
    scale: ClassVar[float] = 1.0

    def task_loss(self, step: Step) -> Tensor:
        classes = new_or_known(step) if self.options.task == "new" else step.known
        return cross_entropy(step.output.logits, step.y, step.among(classes))

    def loss(self, step: Step) -> dict[str, Tensor]:
        importance = part(step.down, self.importance)
        if not importance:
            return {}
        value = quadratic(step.params, part(step.down, "anchor"), importance)
        return {"penalty": self.options.weight * self.scale * value}

    def broadcast(self, server: Server) -> Broadcast:
        """Importance and anchor; nothing before a task has ended."""
        sent = {f"{kind}/{n}": a for kind in (self.importance, "anchor") for n, a in part(server.state, kind).items()}
        return Broadcast(sent if part(server.state, self.importance) else {}, scope="task")


def part(arrays: Mapping[str, Tensor], kind: str) -> Arrays:
    """The entries ``KIND/name``, by name.

    >>> import torch
    >>> list(part({"anchor/w": torch.zeros(1), "path/w": torch.zeros(1)}, "path"))
    ['w']
    """
    return {n.removeprefix(f"{kind}/"): a for n, a in arrays.items() if n.startswith(f"{kind}/")}
