"""What data-free inversion is made of: a generator of images and the losses that lead it.

The statistics loss is that of DeepInversion (Yin et al. 2020, CVPR), the disagreement with a student that of fast
data-free distillation (Fang et al. 2022, AAAI). :mod:`fedcl.blocks.inversion` trains with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Moments = tuple[Tensor, Tensor]
"""Mean and variance (divided by n) of each channel, (C,) each."""


class Generator(nn.Module):
    """Latent vectors (B, latent) to images (B, C, H, W) in (0, 1); sides need not be multiples of four."""

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        super().__init__()
        channels, *sides = shape
        half, quarter = ([-(-side // by) for side in sides] for by in (2, 4))
        self.grid = (2 * width, *quarter)
        self.project = nn.Linear(latent, math.prod(self.grid))
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(size=tuple(half)),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(size=tuple(sides)),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent) -> (B, C, H, W)."""
        images: Tensor = self.blocks(self.project(z).view(-1, *self.grid))
        return images


def norm_layers(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers with running statistics."""
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def moments(x: Tensor) -> Moments:
    """Mean and variance of each channel of (B, C, ...), over all other axes.

    >>> [m.tolist() for m in moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))]
    [[2.0, 0.0], [1.0, 0.0]]
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return x.mean(dim=axes), x.var(dim=axes, correction=0)


def smoothed(found: Moments, before: Moments | None, momentum: float) -> Moments:
    """``(1 - m) found + m before``, the gradient through ``found`` only; ``found`` where nothing was before."""
    if before is None:
        return found
    mean, var = ((1 - momentum) * new + momentum * old.detach() for new, old in zip(found, before, strict=True))
    return mean, var


def statistics_distance(found: Mapping[str, Moments], arrays: Mapping[str, Tensor]) -> Tensor:
    """``sum_l ||mean_l - running mean_l||_2 + ||var_l - running var_l||_2`` (Yin et al. 2020, DeepInversion).

    Args:
        found: by layer, the statistics of a batch at its input; at least one layer.
        arrays: with each layer's ``running_mean`` and ``running_var``.

    >>> running = {"n.running_mean": torch.zeros(2), "n.running_var": torch.ones(2)}
    >>> statistics_distance({"n": (torch.tensor([3.0, 4.0]), torch.ones(2))}, running).item()
    5.0
    """
    terms = []
    for name, (mean, var) in found.items():
        terms.append(torch.linalg.vector_norm(mean - arrays[f"{name}.running_mean"]))
        terms.append(torch.linalg.vector_norm(var - arrays[f"{name}.running_var"]))
    return torch.stack(terms).sum()


def disagreement(student: Tensor, teacher: Tensor, classes: Tensor) -> Tensor:
    """``-mean_i 1[argmax s_i = argmax t_i] KL(softmax(t_i) || softmax(s_i))`` over ``classes`` (Fang et al. 2022).

    Small where the student says less surely what the teacher says; where it says something else already, 0.

    Args:
        student, teacher: (B, C) logits; gradients flow through both.
        classes: (C,) bool mask, at least one class.

    >>> s, t = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    >>> round(disagreement(s, t, torch.tensor([True, True])).item(), 4)
    -0.0364
    """
    lowest = torch.finfo(student.dtype).min
    s, t = (torch.where(classes, logits, lowest) for logits in (student, teacher))
    ratio = t.log_softmax(dim=-1) - s.log_softmax(dim=-1)
    divergence = torch.where(classes, t.softmax(dim=-1) * ratio, 0.0).sum(dim=-1)
    return -torch.where(s.argmax(dim=-1) == t.argmax(dim=-1), divergence, 0.0).mean()
