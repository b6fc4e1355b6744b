"""Images on their way into a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

STREAM = "stream"
"""Name of the source that is a client's own stream."""


@dataclass(frozen=True)
class Batch:
    """Images on their way into a step.

    Attributes:
        pixels: (B, C, H, W) uint8; augmented and normalised after all ``prepare`` hooks have run.
        labels: (B,) int64 class positions; -1 where the label is hidden.
        ids: (B,) int64 rows of the client's store, or of the images of a source that has its own.
        source: (B,) int64, 0 for the client's stream, i for the i-th extra source.
        views: how often each image stands in the batch; views follow each other as blocks of B / views rows.
        hidden: the sources whose images have no label.
        names: the name of each source.
        payload: arrays (b, ...) that came with the images of a source, as ``NAME/key``; one row an image, whatever the
            number of views.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    source: Tensor
    views: int = 1
    hidden: tuple[int, ...] = ()
    names: tuple[str, ...] = (STREAM,)
    payload: Mapping[str, Tensor] = field(default_factory=dict)

    def repeat(self, times: int) -> Batch:
        """The same images ``times`` times as blocks; each row is augmented on its own."""
        return replace(
            self,
            pixels=self.pixels.repeat(times, 1, 1, 1),
            labels=self.labels.repeat(times),
            ids=self.ids.repeat(times),
            source=self.source.repeat(times),
            views=self.views * times,
        )

    def labelled(self) -> Tensor:
        """(n,) int64 places of the images with a label."""
        return torch.nonzero(~self._from(self.hidden)).flatten()

    def rows(self, name: str) -> Tensor:
        """(n,) int64 places of the images of the sources of a name, in all views; ``stream`` is the client's own."""
        return torch.nonzero(self._from([i for i, n in enumerate(self.names) if n == name])).flatten()

    def _from(self, sources: tuple[int, ...] | list[int]) -> Tensor:
        return torch.isin(self.source, torch.tensor(sources, dtype=torch.int64, device=self.source.device))

    def at(self, places: Tensor) -> Batch:
        """The images at some places, of every view alike."""
        return replace(
            self,
            pixels=self.pixels[places],
            labels=self.labels[places],
            ids=self.ids[places],
            source=self.source[places],
        )


@dataclass(frozen=True)
class Source:
    """More images a client mixes into each step, beside its stream.

    Attributes:
        ids: (M,) int64 rows of the client's store; with images of its own, numbers of these, 0 to M - 1.
        batch_size: images a step; fewer when M is smaller.
        images: (M, C, H, W) uint8 in place of rows of the store, for example synthetic ones.
        labels: (M,) int64 class positions of ``images``; None: they have no label.
        payload: arrays (M, ...) that go with the images, read as ``step.batch.payload["NAME/key"]``.
        name: of the source; by default that of its strategy.
    """

    ids: Tensor
    batch_size: int
    images: Tensor | None = None
    labels: Tensor | None = None
    payload: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = ""

    @property
    def own(self) -> bool:
        """Whether a batch of it needs places in the source, not only rows of the store."""
        return self.images is not None or bool(self.payload)
