"""Classification heads. They compute from the arrays they are given, so any number of classes works.

Every head says which of its arrays have one entry a class, and draws the initial entries of a class from the
class's own id: when a class arrives does not change where it starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl import random
from fedcl.config import Model
from fedcl.errors import UsageError
from fedcl.models import catalog


@runtime_checkable
class ClassArrays(Protocol):
    """A module some of whose arrays have an axis of classes; strategies may add their own such modules."""

    class_axis: ClassVar[Mapping[str, int]]
    fixed: ClassVar[bool]  # all classes are allocated at once and the arrays never change

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """Initial entries of ``array`` for the classes, float32 on the CPU, classes along the class axis."""
        ...


def _keyed_uniform(count: int, bound: float, class_ids: Sequence[int], seed: int, *name: str) -> Tensor:
    rows = [random.uniform(count, seed, "init", *name, int(c)) for c in class_ids]
    stacked = torch.stack([torch.from_numpy(row) for row in rows]) if rows else torch.zeros(0, count)
    return ((2.0 * stacked - 1.0) * bound).to(torch.float32)


def normalised(features: Tensor, kind: str) -> Tensor:
    """Features (B, d) as a head sees them: as they are, or each of one length (Zhang et al. 2024, FN and LN).

    ``l2`` has length 1, ``l2_sqrt`` length sqrt(d), ``layer`` length sqrt(d) after its mean is subtracted, which is
    layer normalisation without learned scales. A feature of zeros stays one.

    >>> normalised(torch.tensor([[3.0, 4.0]]), "l2")
    tensor([[0.6000, 0.8000]])
    """
    if kind == "none":
        return features
    if kind == "layer":
        features = features - features.mean(dim=-1, keepdim=True)
    unit = F.normalize(features, dim=-1)
    return unit if kind == "l2" else math.sqrt(features.shape[-1]) * unit


class Head(nn.Module):
    """Base of the heads: ``weight`` (classes, d), drawn uniformly from ±1/sqrt(d) as in ``nn.Linear``.

    Attributes:
        feature_norm: what is done to the features first, see :func:`normalised`.
    """

    feature_norm: str = "none"
    class_axis: ClassVar[Mapping[str, int]] = {"weight": 0}
    fixed: ClassVar[bool] = False

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.weight: Tensor = nn.Parameter(torch.zeros(0, feature_dim))

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`ClassArrays`."""
        bound = 1.0 / math.sqrt(self.feature_dim)
        if array == "weight":
            return _keyed_uniform(self.feature_dim, bound, class_ids, seed, "head", array)
        return _keyed_uniform(1, bound, class_ids, seed, "head", array).reshape(-1)


class LinearHead(Head):
    """logits = f Wᵀ + b."""

    class_axis: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}

    def __init__(self, feature_dim: int, bias: bool) -> None:
        super().__init__(feature_dim)
        self.bias = nn.Parameter(torch.zeros(0)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""
        return F.linear(normalised(features, self.feature_norm), self.weight, self.bias)


class CosineHead(Head):
    """logits = s cos(f, w), with a learned scale s that starts at 10 (Hou et al. 2019, LUCIR)."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""
        unit = F.normalize(normalised(features, self.feature_norm), dim=1)
        return self.scale * F.linear(unit, F.normalize(self.weight, dim=1))


class NearestMeanHead(Head):
    """logits = -||f - μ_c||²; the rows of ``weight`` are the class means.

    They start as the rows of a linear head do and may be trained, or set from prototypes.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""
        features = normalised(features, self.feature_norm)
        cross: Tensor = F.linear(features, self.weight)
        distance: Tensor = features.square().sum(1, keepdim=True) + self.weight.square().sum(1) - 2.0 * cross
        return -distance


class SimplexHead(Head):
    """logits = f Wᵀ with fixed unit rows, every two of which have cosine -1/(C - 1).

    The regular simplex of CL2R (Biondi et al. 2022) in C - 1 dimensions, turned into the feature space by a
    seeded orthonormal matrix. All classes are allocated at once; a class's vertex is its rank among the
    class ids. ``weight`` is a buffer: it is never trained, and never changes.
    """

    fixed: ClassVar[bool] = True

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        del self.weight
        self.register_buffer("weight", torch.zeros(0, feature_dim))

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`ClassArrays`.

        Raises:
            UsageError: when the features have fewer than C - 1 dimensions.
        """
        count = len(class_ids)
        if count == 0:
            return torch.zeros(0, self.feature_dim)
        if self.feature_dim < count - 1:
            allowed = f"{count} classes need {count - 1} features, this encoder has {self.feature_dim}"
            raise UsageError("model.head", "simplex", allowed)
        rank = {c: position for position, c in enumerate(sorted(class_ids))}
        vertices = simplex(count)[[rank[c] for c in class_ids]]
        entries = random.uniform(self.feature_dim * vertices.shape[1], seed, "init", "head", "simplex")
        basis, _ = torch.linalg.qr(torch.from_numpy(entries).reshape(self.feature_dim, -1) - 0.5)
        rows: Tensor = vertices @ basis.T
        return rows.to(torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""
        return F.linear(normalised(features, self.feature_norm), self.weight)


def simplex(count: int) -> Tensor:
    """The ``count`` unit vertices of a regular simplex around 0, (count, max(count - 1, 1)) float64.

    Args:
        count: at least 1; a single vertex is 1.

    >>> simplex(3) @ simplex(3)[0]
    tensor([ 1.0000, -0.5000, -0.5000], dtype=torch.float64)
    """
    if count == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    size = count - 1
    apex = torch.full((1, size), (1.0 - math.sqrt(1.0 + size)) / size, dtype=torch.float64)
    points = torch.cat([torch.eye(size, dtype=torch.float64), apex])
    return F.normalize(points - points.mean(0), dim=1)


def build_head(config: Model, feature_dim: int) -> Head:
    """The head ``config.head`` on features of ``config.feature_norm``, without classes yet.

    Raises:
        UsageError: unknown head, allocation or normalisation, or a simplex that would have to grow.
    """
    if config.feature_norm not in catalog.FEATURE_NORMS:
        allowed = f"one of {', '.join(catalog.FEATURE_NORMS)}"
        raise UsageError("model.feature_norm", config.feature_norm, allowed, catalog.FEATURE_NORMS)
    head = _head(config, feature_dim)
    head.feature_norm = config.feature_norm
    return head


def _head(config: Model, feature_dim: int) -> Head:
    if config.head_allocate not in catalog.ALLOCATIONS:
        allowed = f"one of {', '.join(catalog.ALLOCATIONS)}"
        raise UsageError("model.head_allocate", config.head_allocate, allowed, catalog.ALLOCATIONS)
    if config.head == "linear":
        return LinearHead(feature_dim, config.head_bias)
    if config.head == "cosine":
        return CosineHead(feature_dim)
    if config.head == "nearest_mean":
        return NearestMeanHead(feature_dim)
    if config.head == "simplex":
        if config.head_allocate != "all":
            raise UsageError("model.head_allocate", config.head_allocate, "'all' for the fixed simplex head")
        return SimplexHead(feature_dim)
    raise UsageError("model.head", config.head, f"one of {', '.join(catalog.HEADS)}", catalog.HEADS)
