"""A hypernetwork as functions of named arrays, and a network that describes a client by its labelled images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl import random as counter
from fedcl.strategy import Arrays


def drawn_hypernetwork(
    start: Mapping[str, Tensor], inputs: int, width: int, depth: int, *key: object
) -> dict[str, Tensor]:
    """A hypernetwork whose outputs for any descriptor lie around the arrays of ``start``.

    Returns ``hidden/i.weight`` and ``hidden/i.bias`` of ``depth`` layers, and for each array of ``start``, of shape
    ``s``, a linear output: ``slope/NAME`` (width, s), drawn, and ``base/NAME`` (s), which is the array itself. Drawn as
    in ``nn.Linear``, uniformly within ``1 / sqrt(inputs of the layer)``.

    Args:
        start: the model that the outputs have the shapes of; at least one array.
        inputs: length of a descriptor.
        width: units of a hidden layer.
        key: names the random stream.
    """
    generator = torch.Generator().manual_seed(counter.key(*key) & (2**63 - 1))
    like = next(iter(start.values()))

    def drawn(shape: Sequence[int], fan_in: int) -> Tensor:
        return ((2.0 * torch.rand(*shape, generator=generator) - 1.0) / math.sqrt(fan_in)).to(like)

    arrays = {}
    for layer in range(depth):
        fan_in = width if layer else inputs
        arrays[f"hidden/{layer}.weight"] = drawn((width, fan_in), fan_in)
        arrays[f"hidden/{layer}.bias"] = drawn((width,), fan_in)
    for name, array in start.items():
        arrays[f"slope/{name}"] = drawn((width, *array.shape), width)
        arrays[f"base/{name}"] = array.clone()
    return arrays


def generated(network: Mapping[str, Tensor], descriptors: Tensor) -> Arrays:
    """``theta_k = h(v_k)``: by name, the arrays (K, ...) of a model for each descriptor (K, l).

    >>> network = {"hidden/0.weight": torch.eye(1), "hidden/0.bias": torch.zeros(1)}
    >>> network |= {"slope/w": torch.tensor([[2.0]]), "base/w": torch.tensor([1.0])}
    >>> generated(network, torch.tensor([[3.0], [-3.0]]))["w"].tolist()
    [[7.0], [1.0]]
    """
    units, layer = descriptors, 0
    while f"hidden/{layer}.weight" in network:
        units = F.linear(units, network[f"hidden/{layer}.weight"], network[f"hidden/{layer}.bias"]).relu()
        layer += 1
    names = [n.removeprefix("base/") for n in network if n.startswith("base/")]
    return {n: network[f"base/{n}"] + torch.tensordot(units, network[f"slope/{n}"], dims=1) for n in names}


def pulled_back(
    network: Mapping[str, Tensor], descriptors: Tensor, changes: Mapping[str, Tensor]
) -> tuple[Arrays, Tensor]:
    """Gradients of ``sum_k <d_k, h(v_k)>``, d_k constant: by the network's arrays, and by each v_k (K, l).

    Args:
        descriptors: (K, l).
        changes: d_k, by name (K, ...), of the outputs' shapes.
    """
    with torch.enable_grad():
        leaves = {n: a.detach().requires_grad_() for n, a in network.items()}
        inputs = descriptors.detach().requires_grad_()
        made = generated(leaves, inputs)
        given = [changes[n].detach() for n in made]
        *slopes, last = torch.autograd.grad(list(made.values()), [*leaves.values(), inputs], given)
    return dict(zip(leaves, slopes, strict=True)), last


class Embedding(nn.Module):
    """A small convolutional network that sees an image and its label, the label as planes of zeros and one of ones.

    Two convolutions (5 x 5, padded, ``kernels`` and twice as many), each with ReLU and pooling, then layers of 120, 84
    and ``size`` units. The first one's kernels for labels are an array with an axis of classes, so that they grow with
    the head.

    Args:
        shape: (channels, height, width) of the images.
        size: length l of a descriptor.
        kernels: of the first convolution.
    """

    class_axis: ClassVar[Mapping[str, int]] = {"label": 0}
    fixed: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, int, int], size: int, kernels: int = 16) -> None:
        super().__init__()
        channels, *sides = shape
        first = nn.Conv2d(channels + 1, kernels, 5)
        # One plane of labels is not zero, so an image is drawn for as many inputs as it has channels and one.
        self.bound = 1.0 / math.sqrt(first.weight[0].numel())
        self.image = nn.Parameter(first.weight.detach()[:, :channels].clone())
        self.bias = nn.Parameter(first.bias.detach().clone() if first.bias is not None else torch.zeros(kernels))
        self.label = nn.Parameter(torch.zeros(0, kernels, 5, 5))
        self.second = nn.Conv2d(kernels, 2 * kernels, 5, padding=2)
        area = math.prod(-(-side // 4) for side in sides)
        layers = [nn.Linear(2 * kernels * area, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, size)]
        self.rest = nn.Sequential(*layers)

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`fedcl.models.heads.ClassArrays`."""
        shape = self.label.shape[1:]
        rows = [counter.uniform(shape.numel(), seed, "init", "embedding", array, int(c)) for c in class_ids]
        drawn = [torch.from_numpy(row).to(torch.float32).reshape(shape) for row in rows]
        return (2.0 * torch.stack(drawn) - 1.0) * self.bound if drawn else self.label.new_zeros(0, *shape)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, channels, height, width) with labels (B,) -> (B, size)."""
        planes = F.one_hot(y, len(self.label)).to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        kernels = torch.cat([self.image, self.label.transpose(0, 1)], dim=1)
        z = F.conv2d(torch.cat([x, planes], dim=1), kernels, self.bias, padding=2)
        z = F.max_pool2d(z.relu(), 2, ceil_mode=True)
        z = F.max_pool2d(self.second(z).relu(), 2, ceil_mode=True)
        out: Tensor = self.rest(z.flatten(1))
        return out
