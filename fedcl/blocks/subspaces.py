"""Subspaces of what goes into a layer, and updates of its weight that leave its outputs on them as they are.

A layer's input is written as rows of length m: what one row of its weight, flattened, is multiplied with. A basis is
(m, r) with orthonormal columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d

NUMBERS = 1 << 24
"""Most numbers of one part of a layer's input."""


def weight_layers(module: nn.Module, prefix: str = "") -> dict[str, Layer]:
    """The linear and convolutional layers below ``module`` by name.

    Raises:
        ValueError: a layer with a weight matrix that :func:`input_rows` has no rows for.
    """
    found: dict[str, Layer] = {}
    for name, layer in module.named_modules(prefix=prefix):
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise ValueError(
                    f"{name} is a convolution with groups={layer.groups}, padding={layer.padding!r} and padding_mode="
                    f"{layer.padding_mode!r}; only groups=1 and numbers of zeros are understood"
                )
            found[name] = layer
        elif isinstance(layer, nn.Linear):
            found[name] = layer
        else:
            for own, array in layer.named_parameters(recurse=False):
                if own.endswith("weight") and array.dim() > 1:
                    raise ValueError(f"{name} is a {type(layer).__name__}; only Linear and Conv2d are understood")
    return found


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """What each output of a layer is computed from, (q, m).

    Args:
        x: the layer's input; (B, C, H, W) for a convolution, whose rows are its patches in the order of the images,
            (..., m) for a linear layer.

    >>> input_rows(nn.Conv2d(1, 1, (1, 2)), torch.tensor([[[[1.0, 2.0, 3.0]]]])).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    assert not isinstance(layer.padding, str)
    size = (layer.kernel_size[0], layer.kernel_size[1])
    patches = F.unfold(x, size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def outside(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of each row that is orthogonal to a basis: ``x - x O O^T``.

    Args:
        rows: (q, m): inputs of a layer, or its flattened weight or an update of it.
        basis: (m, r) with orthonormal columns; r may be 0.

    >>> outside(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])).tolist()
    [[0.0, 4.0]]
    """
    return rows - (rows @ basis) @ basis.T


def leading(sketch: Tensor, share: float, precision: torch.dtype = torch.float64) -> Tensor:
    """The fewest left singular vectors that hold more than ``share`` of a matrix's energy, at least one.

    Energy is the sum of squared singular values. Vectors of singular values that are rounding are left out, so a share
    of 1 gives the whole range and a matrix of zeros gives none.

    Args:
        sketch: (m, s) float64.
        precision: of the factorisation; float32 is three times as fast for large m.

    >>> leading(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)), 0.8).abs().tolist()
    [[1.0], [0.0]]
    """
    matrix = sketch.to(precision)
    if sketch.shape[1] < sketch.shape[0]:
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        energy = values.square()
    else:
        # An (m, m) product in place of the singular values of an (m, 5m) matrix; what it loses lies below `rounding`.
        energy, vectors = torch.linalg.eigh(matrix @ matrix.mT)
        energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    rounding = energy.max() * len(sketch) * torch.finfo(precision).eps
    rank = int((energy > rounding).sum())
    below = int((energy.cumsum(0) <= share * energy.sum()).sum())
    directions: Tensor = vectors[:, : min(below + 1, rank)].to(sketch.dtype)
    return directions


def joined(basis: Tensor, directions: Tensor) -> Tensor:
    """An orthonormal basis of what two sets of columns span together."""
    both: Tensor = torch.linalg.qr(torch.cat([basis, directions], dim=1)).Q
    return both


def wanted_share(left: float, threshold: float) -> float:
    """How much of the energy outside the basis must be taken in, for ``threshold`` of all energy to lie inside.

    ``(left - (1 - threshold)) / left``; not above 0 where the basis holds enough already.

    Args:
        left: share of the energy that lies outside, in (0, 1].

    >>> wanted_share(1.0, 0.9), wanted_share(0.5, 0.9)
    (0.9, 0.8)
    """
    return (left - (1.0 - threshold)) / left


def projected(before: Tensor, after: Tensor, basis: Tensor) -> Tensor:
    """The weight after an update without what the update changes on the basis.

    With ``G = W - W'`` as (out, m): ``W - (G - G O O^T)``, in float64.

    Args:
        before, after: (out, ...) weights W and W'.
        basis: (m, r) float64.

    >>> basis = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    >>> projected(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), basis).tolist()
    [[0.0, 4.0]]
    """
    start = before.to(torch.float64)
    update = outside((after.to(torch.float64) - start).flatten(1), basis)
    return (start + update.reshape(before.shape)).to(before.dtype)


def input_parts(layer: Layer, x: Tensor, columns: int) -> Iterator[Tensor]:
    """:func:`input_rows` of a few images at a time, so few that neither they nor ``columns`` a row fill the memory."""
    places = len(input_rows(layer, x[:1]))
    widest = max(layer.weight[0].numel(), columns)
    for images in torch.split(x, max(1, NUMBERS // (places * widest))):
        yield input_rows(layer, images)


def energy(rows: Tensor) -> Tensor:
    """The sum of squares as a float64 scalar."""
    return rows.to(torch.float64).square().sum()
