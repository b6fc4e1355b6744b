"""The tensor store: all images of a dataset as one uint8 array, gathered by sample id."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Images) -> Statistics:
        """Of images (N, C, H, W) uint8, in exact integer sums, read once in chunks.

        Raises:
            ValueError: a channel has only one value, so that its deviation is zero.

        >>> Statistics.of(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
        Statistics(mean=(0.5,), std=(0.5,))
        """
        count, channels = images.shape[:2]
        step = max(1, _CHUNK_BYTES // max(1, images[0].size))
        histogram = np.zeros((channels, 256), np.int64)
        for start in range(0, count, step):
            chunk = images[start : start + step]
            for channel in range(channels):
                histogram[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
        values = np.arange(256, dtype=np.float64) / 255.0
        shares = histogram / histogram.sum(axis=1, keepdims=True)
        mean = shares @ values
        std = np.sqrt((shares * (values[None] - mean[:, None]) ** 2).sum(axis=1))
        if not (std > 0).all():
            raise ValueError(f"channel {int(np.argmin(std))} has the same value in every pixel")
        return cls(tuple(mean.tolist()), tuple(std.tolist()))


class TensorStore:
    """Images and labels by sample id.

    Args:
        images: (N, C, H, W) uint8; an array, a memory map or a view of one.
        labels: (N,) int64, contiguous class ids.
        statistics: of the training images; None: those of ``images``.
        device: where batches (and, when resident, all images) live.
        resident: True copies all images to the device. False leaves them where they are (a memory map of a
            set larger than memory) and copies only the rows of each batch.

    Raises:
        ValueError: wrong shape, dtype or number of labels, or no images.
    """

    def __init__(
        self,
        images: Images,
        labels: Labels,
        statistics: Statistics | None = None,
        device: str | torch.device = "cpu",
        resident: bool = True,
    ) -> None:
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images are (N, C, H, W) uint8, not {images.shape} {images.dtype}")
        if labels.shape != images.shape[:1] or labels.dtype != np.int64:
            raise ValueError(f"labels are ({len(images)},) int64, not {labels.shape} {labels.dtype}")
        if images.size == 0:
            raise ValueError(f"no images: shape {images.shape}")
        self.device = torch.device(device)
        self.labels = labels
        self.label_tensor = torch.from_numpy(labels).to(self.device)
        self.statistics = statistics if statistics is not None else Statistics.of(images)
        self.mean = torch.tensor(self.statistics.mean, dtype=torch.float64, device=self.device)[:, None, None]
        self.std = torch.tensor(self.statistics.std, dtype=torch.float64, device=self.device)[:, None, None]
        self.resident = resident
        self._host = images
        self._images: Tensor | None = None
        if resident:
            # np.array copies: the store owns its memory, and torch refuses read-only arrays with a warning
            self._images = torch.from_numpy(np.array(images, order="C")).to(self.device)
            self._host = self._images.numpy() if self.device.type == "cpu" else images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self._host.shape[1:]
        return channels, height, width

    @property
    def image_bytes(self) -> int:
        """Bytes of one stored image, C * H * W: what an exemplar costs."""
        channels, height, width = self.shape
        return channels * height * width

    def to(self, device: str | torch.device) -> TensorStore:
        """The same store with its batches on another device."""
        return TensorStore(self._host, self.labels, self.statistics, device, self.resident)

    def relabelled(self, labels: Labels) -> TensorStore:
        """The same images, shared, with other labels (N,) int64."""
        if labels.shape != self.labels.shape or labels.dtype != np.int64:
            raise ValueError(f"labels are {self.labels.shape} int64, not {labels.shape} {labels.dtype}")
        other = copy(self)
        other.labels = labels
        other.label_tensor = torch.from_numpy(labels).to(self.device)
        return other

    def gather(self, ids: Tensor) -> Tensor:
        """Images uint8 (..., C, H, W) of sample ids int64 of any shape (...).

        Raises:
            IndexError: an id outside ``range(len(self))`` (on a GPU, torch's device assertion).
        """
        if self._images is not None:
            # Whole rows at once; indexing with a tensor copies number by number.
            return self._images.index_select(0, ids.reshape(-1)).reshape(*ids.shape, *self.shape)
        rows = np.ascontiguousarray(self._host[ids.cpu().numpy()])
        return torch.from_numpy(rows).to(self.device)

    def pixels(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images as numbers in [0, 1]: what augmentation works on. Any shape."""
        return images.to(dtype).div_(255.0)

    def standardise(self, pixels: Tensor) -> Tensor:
        """Pixels (..., C, H, W) in [0, 1], less the mean, over the deviation of each channel; same dtype."""
        return (pixels - self.mean.to(pixels.dtype)).div_(self.std.to(pixels.dtype))

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images (..., C, H, W) as the model sees them; never computed below float32."""
        exact = dtype if dtype == torch.float64 else torch.float32
        return self.standardise(self.pixels(images, exact)).to(dtype)

    def batch(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalised images (..., C, H, W) of sample ids (...)."""
        return self.normalise(self.gather(ids), dtype)


@dataclass(frozen=True)
class Dataset:
    """A dataset ready for a run.

    Attributes:
        train, test: the stores; the test store is normalised by the training images.
        class_names: by class id.
        domain_names: by domain id; empty where the set has no domains.
        train_domains, test_domains: (N,) int64 domain ids, or None.
        columns: further per-sample integers by name (``drawer``), each as (train, test) arrays (N,) int64.
        source: where the images come from and the licence stated there.
    """

    name: str
    train: TensorStore
    test: TensorStore
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...] = ()
    train_domains: Labels | None = None
    test_domains: Labels | None = None
    columns: Mapping[str, tuple[Labels, Labels]] = field(default_factory=dict[str, Any])
    source: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)
