"""What methods of several views of an image share: options, the repeated batch, embeddings of a projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedcl.cards import option
from fedcl.strategy import Batch, Step, Strategy


@dataclass(frozen=True)
class ViewOptions:
    """Options of a contrastive loss between views.

    Raises:
        ValueError: one is out of its range.
    """

    weight: float = option(1.0, "weight of the loss")
    temperature: float = option(0.5, "temperature tau")
    views: int = option(2, "augmented views of each image; the other losses see all of them")

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be at least 0, not {self.weight}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.views < 1:
            raise ValueError(f"views must be at least 1, not {self.views}")


class Views(Strategy):
    """Shows each image ``options.views`` times; its loss is of the projector's embeddings."""

    family = "contrastive"
    stackable = True
    needs_projector = True
    Options: ClassVar[type] = ViewOptions

    def prepare(self, batch: Batch) -> Batch:
        return batch.repeat(self.options.views)

    def embeddings(self, step: Step) -> Tensor:
        """(B, p) embeddings of the step's images.

        Raises:
            ValueError: the model has no projector.
        """
        found = step.output.embeddings
        if found is None:
            raise ValueError(f"{self.name} needs a projector: set model.projector to auto, linear or mlp")
        return found
