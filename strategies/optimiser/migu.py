"""MIGU: from the second task on, only the units of each layer that answer most strongly are updated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, Step, Strategy


def magnitudes(outputs: Tensor, units: int = -1) -> Tensor:
    """L1-normalised mean magnitude of each output unit, (n,).

    Args:
        outputs: (B, n) of a linear layer, (B, ..., n) with tokens or places, or (B, n, H, W) of a convolution.
        units: the axis of the n units, 1 for a convolution.

    >>> magnitudes(torch.tensor([[1.0, -3.0], [1.0, 3.0]])).tolist()
    [0.25, 0.75]
    """
    mean = outputs.abs().movedim(units, -1).flatten(end_dim=-2).mean(dim=0)
    return mean / mean.sum().clamp(min=torch.finfo(mean.dtype).tiny)


def strongest(values: Tensor, quantile: float) -> Tensor:
    """(n,) bool: those at or above the quantile, the smallest value that a share of ``quantile`` lies below.

    >>> strongest(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.5).tolist()
    [True, False, True, False]
    """
    place = min(math.floor(quantile * len(values) + 1e-9), len(values) - 1)
    return values >= values.sort().values[place]


class MIGU(Strategy):
    """Gradients of the rows of a layer whose outputs are small on the batch are left out."""

    name = "migu"
    family = "optimiser"
    stackable = True
    neutral = {"quantile": 0.0}
    card = Card(
        title="Unlocking Continual Learning Abilities in Language Models",
        authors="Du, Cheng, Luo, Qiu, Huang, Cheung, Cheng, Fu",
        venue="Findings of EMNLP",
        year=2024,
        bibtex="""@inproceedings{du2024unlocking,
  title = {Unlocking Continual Learning Abilities in Language Models},
  author = {Du, Wenyu and Cheng, Shuang and Luo, Tongxu and Qiu, Zihan and Huang, Zeyu and Cheung, Ka Chun and
            Cheng, Reynold and Fu, Jie},
  booktitle = {Findings of EMNLP},
  year = {2024}
}""",
        certainty="Mask and threshold read in the released code, which is for linear layers of language "
        "models. Convolutions by output channel (mean over places), biases with the rows of their weights, "
        "and masks for each client by itself are ours.",
        cost="One more forward pass a step from the second task on.",
        notes="The head is left out unless head=true: its units are classes. The pass that measures "
        "magnitudes runs in evaluation mode. Momentum and weight decay still move rows without a gradient, "
        "as in the release. by=random draws as many rows at random: the paper's baseline. The output projection "
        "of torch's own attention, which is never called by itself, is updated whole.",
    )

    @dataclass(frozen=True)
    class Options:
        quantile: float = option(0.7, "part of the units of a layer that is not updated")
        by: Literal["magnitude", "random"] = option("magnitude", "what decides which units are updated")
        head: bool = option(False, "the head's units too")

        def __post_init__(self) -> None:
            if not 0 <= self.quantile < 1:
                raise ValueError(f"quantile must be at least 0 and below 1, not {self.quantile}")

    def edit_gradients(self, step: Step, grads: Arrays) -> Arrays:
        if step.task == 0 or not self.options.quantile:
            return grads
        layers = self.layers(step, grads)
        taps = step.forward(step.x, "own", "eval", tuple(layers)).taps
        kept = dict(grads)
        for layer in (n for n in layers if n in taps):
            values = magnitudes(taps[layer].output.detach(), 1 if grads[f"{layer}.weight"].dim() == 4 else -1)
            if self.options.by == "random":
                values = step.uniform((len(values),), f"migu {layer}")
            mask = strongest(values, self.options.quantile)
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if name in kept:
                    rows = mask.view(-1, *(1 for _ in kept[name].shape[1:]))
                    kept[name] = torch.where(rows, kept[name], 0.0)
        return kept

    def layers(self, step: Step, grads: Arrays) -> list[str]:
        """Names of the linear and convolutional layers whose weights are trained."""
        names = [n.removesuffix(".weight") for n, g in grads.items() if n.endswith(".weight") and g.dim() in (2, 4)]
        return [n for n in names if not n.startswith("extra.") and (self.options.head or not n.startswith("head"))]
