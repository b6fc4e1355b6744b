"""Learned prototypes of classes, which strategies add to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl import random


class ClassPrototypes(nn.Module):
    """One vector a class, ``weight`` (C, d), drawn uniformly from +-1/sqrt(d) by the class's own stream."""

    class_axis: ClassVar[Mapping[str, int]] = {"weight": 0}
    fixed: ClassVar[bool] = False

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension
        self.weight: Tensor = nn.Parameter(torch.zeros(0, dimension))

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`fedcl.models.heads.ClassArrays`."""
        drawn = [random.uniform(self.dimension, seed, "init", "prototypes", int(c)) for c in class_ids]
        rows = torch.stack([torch.from_numpy(d) for d in drawn]) if drawn else torch.zeros(0, self.dimension)
        shaped: Tensor = ((2 * rows - 1) / math.sqrt(self.dimension)).to(torch.float32)
        return shaped

    def forward(self, features: Tensor) -> Tensor:
        """``p_c f / ||p_c||`` of features (B, d), (B, C): the cosine times the feature's length."""
        return F.linear(features, F.normalize(self.weight, dim=1))
