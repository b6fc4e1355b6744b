"""Images on their way into a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images on their way into a step.

    Attributes:
        pixels: (B, C, H, W) uint8; augmented and normalised after all ``prepare`` hooks have run.
        labels: (B,) int64 class positions; -1 where the label is hidden.
        ids: (B,) int64 rows of the client's store.
        source: (B,) int64, 0 for the client's stream, i for the i-th extra source.
        views: how often each image stands in the batch; views follow each other as blocks of B / views rows.
        hidden: the sources whose images have no label.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    source: Tensor
    views: int = 1
    hidden: tuple[int, ...] = ()

    def repeat(self, times: int) -> Batch:
        """The same images ``times`` times as blocks; each row is augmented on its own."""
        return Batch(
            self.pixels.repeat(times, 1, 1, 1),
            self.labels.repeat(times),
            self.ids.repeat(times),
            self.source.repeat(times),
            self.views * times,
            self.hidden,
        )

    def labelled(self) -> Tensor:
        """(n,) int64 places of the images with a label."""
        without = torch.tensor(self.hidden, dtype=torch.int64, device=self.source.device)
        return torch.nonzero(~torch.isin(self.source, without)).flatten()

    def at(self, places: Tensor) -> Batch:
        """The images at some places, of every view alike."""
        return Batch(
            self.pixels[places], self.labels[places], self.ids[places], self.source[places], self.views, self.hidden
        )


@dataclass(frozen=True)
class Source:
    """More images a client mixes into each step, beside its stream.

    Attributes:
        ids: (M,) int64 rows of the client's store.
        batch_size: images a step; fewer when M is smaller.
    """

    ids: Tensor
    batch_size: int
