"""What methods of several views of an image share: options, the repeated batch, embeddings of a projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from fedcl.cards import option
from fedcl.errors import UsageError
from fedcl.strategy import Batch, Step, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream


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


def projected_dim(model: FedModel) -> int:
    """Length p of an embedding.

    Raises:
        ValueError: the model has no projector.
    """
    if model.projector is None:
        raise ValueError("a predictor needs a projector: set model.projector to auto, linear or mlp")
    return [module.out_features for module in model.projector.modules() if isinstance(module, nn.Linear)][-1]


def predictor(width: int, hidden: int) -> nn.Module:
    """(B, width) embeddings -> (B, width), with one hidden layer, BatchNorm and ReLU on it alone."""
    # The first bias, which BatchNorm takes away again, keeps the running mean of centred embeddings from being
    # rounding errors alone, in which two right computations differ.
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width))


@dataclass(frozen=True)
class PairOptions:
    """Options of a loss that needs at least two views.

    Raises:
        ValueError: one is out of its range.
    """

    weight: float = option(1.0, "weight of the loss")
    views: int = option(2, "augmented views of each image; the loss is the mean over their pairs")

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be at least 0, not {self.weight}")
        if self.views < 1:
            raise ValueError(f"views must be at least 1, not {self.views}")
        if self.views < 2 and self.weight:
            raise ValueError("views must be at least 2: one view alone has no pair to learn from")


class Views(Strategy):
    """Shows each image ``options.views`` times; its loss is of the projector's embeddings.

    Class attributes:
        needs_others: the loss compares the images of a step, so that one image alone teaches nothing.
    """

    family = "contrastive"
    stackable = True
    needs_projector = True
    needs_others: ClassVar[bool] = False
    Options: ClassVar[type] = ViewOptions

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        size = config.federation.batch_size
        if self.needs_others and self.options.weight and size < 2:
            raise UsageError("federation.batch_size", size, f"{self.name} compares the images of a step: at least 2")

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

    def alone(self, step: Step) -> bool:
        """Whether there are no two images in a step."""
        return len(step.y) < 2 * step.batch.views
