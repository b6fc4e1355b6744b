"""Rotations of images as classes of their own: three more outputs a class beside a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl import random


class RotationHead(nn.Module):
    """Three more outputs a class, for its images turned by 90, 180 and 270 degrees: ``weight`` (C, 3, d)."""

    class_axis: ClassVar[Mapping[str, int]] = {"weight": 0}
    fixed: ClassVar[bool] = False

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.weight: Tensor = nn.Parameter(torch.zeros(0, 3, feature_dim))

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`fedcl.models.heads.ClassArrays`: uniform in +-1/sqrt(d), a stream a class."""
        count, bound = 3 * self.feature_dim, self.feature_dim**-0.5
        drawn = [torch.from_numpy(random.uniform(count, seed, "init", "rotation", int(c))) for c in class_ids]
        rows = torch.stack(drawn) if drawn else torch.zeros(0, count, dtype=torch.float64)
        shaped: Tensor = ((2 * rows - 1) * bound).reshape(-1, 3, self.feature_dim).to(torch.float32)
        return shaped

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) to (B, 3 C): all classes turned once, then twice, then three times."""
        out: Tensor = F.linear(features, self.weight.transpose(0, 1).reshape(-1, self.feature_dim))
        return out


def turned(x: Tensor) -> Tensor:
    """Square images (B, C, H, H) as they are, then all of them turned once, twice and three times by 90 degrees.

    >>> turned(torch.tensor([[[[1, 2], [3, 4]]]]))[1].tolist()
    [[[2, 4], [1, 3]]]
    """
    return torch.cat([torch.rot90(x, turns, (2, 3)) for turns in range(4)])
