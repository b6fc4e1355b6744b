"""FedBN: normalisation layers stay at the client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Sharing, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream

ALL_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


class FedBN(Strategy):
    """Parameters and statistics of normalisation layers are personal, everything else is averaged."""

    name = "fedbn"
    family = "personalised"
    stackable = True
    unlabelled = "sees"
    card = Card(
        title="FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
        authors="Li, Jiang, Zhang, Kamp, Dou",
        venue="ICLR",
        year=2021,
        bibtex="""@inproceedings{li2021fedbn,
  title = {FedBN: Federated Learning on Non-IID Features via Local Batch Normalization},
  author = {Li, Xiaoxiao and Jiang, Meirui and Zhang, Xiaofei and Kamp, Michael and Dou, Qi},
  booktitle = {ICLR},
  year = {2021}
}""",
        certainty="Certain (textbook). Layers are found by their type, not by their name.",
        client_state="parameters and statistics of its normalisation layers",
        cost="Less traffic than averaging: these layers do not travel.",
        notes="Read the personal accuracies: the global model's own normalisation layers are never trained. "
        "model.batch_norm must be average (the default), as this strategy says what stays. A network "
        "without such layers (layers=batch: without BatchNorm) makes it federated averaging, which is "
        "refused by name.",
    )
    tried_with = {"model.norm": "batch", "model.name": "resnet20", "model.width": 2, "model.depth": None}

    @dataclass(frozen=True)
    class Options:
        layers: Literal["batch", "all"] = option(
            "batch", "BatchNorm alone, as published, or the parameters of GroupNorm, LayerNorm and InstanceNorm too"
        )

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.batch_norm != "average":
            allowed = "average: with fedbn the strategy decides what stays at a client"
            raise UsageError("model.batch_norm", config.model.batch_norm, allowed, ("average",))

    @property
    def kinds(self) -> tuple[type[nn.Module], ...]:
        """The types of the layers that stay at a client."""
        return ALL_NORMS if self.options.layers == "all" else (_BatchNorm,)

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        if not any(isinstance(module, self.kinds) for module in model.modules()):
            allowed = (
                "a model with normalisation layers to keep (options.fedbn.layers=all takes those beside BatchNorm)"
            )
            raise UsageError("strategy", "fedbn", allowed)
        return {}

    def share(self, name: str, model: FedModel) -> Sharing:
        owner = model.get_submodule(name.rpartition(".")[0])
        return "private" if isinstance(owner, self.kinds) else "shared"
