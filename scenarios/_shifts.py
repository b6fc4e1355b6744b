"""Images seen through a fixed change of pixels, one a task: only the plain images are kept in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.data.store import Dataset, TensorStore

_BITS = 8  # of a source coordinate below the pixel: whole-number arithmetic gives the same bytes everywhere


@dataclass(frozen=True)
class PixelMap:
    """Every new pixel as a weighted sum of old ones, the same in every channel.

    Attributes:
        source: (S, H * W) int64 places of the old pixels.
        weight: (S, H * W) int32 in units of 2^-16; all at 2^16 where S is 1.
    """

    source: Tensor
    weight: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (..., H, W) in and out."""
        flat = images.flatten(-2)
        if len(self.source) == 1:
            return flat[..., self.source[0]].view(images.shape)
        total = torch.full(flat.shape, 1 << (2 * _BITS - 1), dtype=torch.int32, device=flat.device)
        for source, weight in zip(self.source, self.weight, strict=True):
            total += flat[..., source].to(torch.int32) * weight
        return (total >> (2 * _BITS)).to(torch.uint8).view(images.shape)

    def to(self, device: torch.device) -> PixelMap:
        """The same map for images on another device."""
        return PixelMap(self.source.to(device), self.weight.to(device))


def permutation_map(height: int, width: int, *stream: object) -> PixelMap:
    """Pixels in a random order; ``stream`` names the draw."""
    source = torch.from_numpy(counter.permutation(height * width, *stream))[None]
    return PixelMap(source, torch.full(source.shape, 1 << (2 * _BITS), dtype=torch.int32))


def rotation_map(height: int, width: int, degrees: float) -> PixelMap:
    """A counter-clockwise turn around the centre, bilinear; what comes from outside is black."""
    turn = math.radians(degrees % 360)
    y, x = np.divmod(np.arange(height * width), width)
    down, right = y - (height - 1) / 2, x - (width - 1) / 2
    one = 1 << _BITS
    from_x = np.rint(((width - 1) / 2 + math.cos(turn) * right - math.sin(turn) * down) * one).astype(np.int64)
    from_y = np.rint(((height - 1) / 2 + math.sin(turn) * right + math.cos(turn) * down) * one).astype(np.int64)
    sources, weights = [], []
    for next_y in (0, 1):
        for next_x in (0, 1):
            row, column = (from_y >> _BITS) + next_y, (from_x >> _BITS) + next_x
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            share_y, share_x = from_y & (one - 1), from_x & (one - 1)
            weight = (share_y if next_y else one - share_y) * (share_x if next_x else one - share_x)
            sources.append(np.where(inside, row * width + column, 0))
            weights.append(np.where(inside, weight, 0))
    return PixelMap(torch.from_numpy(np.stack(sources)), torch.from_numpy(np.stack(weights).astype(np.int32)))


class ShiftedStore(TensorStore):
    """A store once a task, each task's images through its own map: row ``task * N + i`` is image i of the plain store.

    Args:
        plain: N images; normalisation stays that of these.
        maps: for each task its map, or None for the images as they are.
    """

    def __init__(self, plain: TensorStore, maps: Sequence[PixelMap | None]) -> None:
        vars(self).update(vars(plain))  # not the constructor of a store, which copies the images
        self.plain = plain
        self.maps = [None if shift is None else shift.to(plain.device) for shift in maps]
        self.labels = np.tile(plain.labels, len(maps))
        self.label_tensor = torch.from_numpy(self.labels).to(plain.device)

    def to(self, device: str | torch.device) -> ShiftedStore:
        """The same store with its batches on another device."""
        moved = ShiftedStore(self.plain.to(device), self.maps)
        moved.labels, moved.label_tensor = self.labels, self.label_tensor.to(moved.device)
        return moved

    def gather(self, ids: Tensor) -> Tensor:
        """See :meth:`fedcl.data.store.TensorStore.gather`."""
        flat = ids.reshape(-1)
        task = flat.div(len(self.plain), rounding_mode="floor")
        images = self.plain.gather(flat - task * len(self.plain))
        for number in torch.unique(task).tolist():
            if not 0 <= number < len(self.maps):
                raise IndexError(f"a sample id is outside 0 to {len(self) - 1}")
            shift = self.maps[number]
            if shift is not None:
                mine = task == number
                images[mine] = shift(images[mine])
        return images.reshape(*ids.shape, *self.shape)


def shifted(dataset: Dataset, maps: Sequence[PixelMap | None], names: tuple[str, ...]) -> Dataset:
    """The dataset once a task through each of ``maps``; the domain of an image is its task."""
    domains = [np.repeat(np.arange(len(maps)), len(store)) for store in (dataset.train, dataset.test)]
    columns = {key: (np.tile(a, len(maps)), np.tile(b, len(maps))) for key, (a, b) in dataset.columns.items()}
    return Dataset(
        name=dataset.name,
        train=ShiftedStore(dataset.train, maps),
        test=ShiftedStore(dataset.test, maps),
        class_names=dataset.class_names,
        domain_names=names,
        train_domains=domains[0],
        test_domains=domains[1],
        columns=columns,
        source=dataset.source,
    )
