"""The server's own images: a public or proxy set, taken out of the stream before clients get theirs.

A client never holds one, and nothing of them is sent: they cost no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import random as counter
from ..errors import UsageError
from ..settings import schema as settings
from ..stream import Ids, Split, Stream
from .labels import HIDDEN, distinct

if TYPE_CHECKING:
    from ..data.store import TensorStore


@dataclass(frozen=True)
class Public:
    """Images that the server holds.

    Attributes:
        ids: (n,) int64 rows of ``store``, ascending.
        labels: (n,) int64 class positions; -1 where they have no label (``labels.public=false``).
        new: (n,) bool, those that the present task brought.
        store: the training images; its labels are those that nodes see.
        batch_size: of :meth:`batches`.
        dtype: of the model.
    """

    ids: Tensor
    labels: Tensor
    new: Tensor
    store: TensorStore
    batch_size: int
    dtype: torch.dtype

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (B, C, H, W) normalised, labels (B,)) in order, unaugmented."""
        for ids, labels in zip(
            torch.split(self.ids, self.batch_size), torch.split(self.labels, self.batch_size), strict=True
        ):
            yield self.store.batch(ids, self.dtype), labels


def set_aside(stream: Stream, amount: float, seed: int) -> tuple[Stream, tuple[Ids, ...] | None]:
    """The stream without the server's images, and for each task their rows, ascending; None without any.

    Args:
        amount: ``partition.public``: below 1 the share of each class's training images of a task (rounded down), else
            how many of each class.

    Raises:
        UsageError: a class would be left without an image for clients, or the share is no image of any class.
    """
    if not amount:
        return stream, None
    share = Fraction(str(amount))  # the decimal text is taken exactly: 0.29 of 100 images are 29
    public, stages = [], []
    taken = np.zeros(len(stream.train_labels), dtype=bool)
    for stage in stream.stages:
        mine = [np.empty(0, dtype=np.int64)]
        # An image that stands in several tasks is the server's in all of them.
        left = stage.train_ids[~taken[stage.train_ids]]
        for label in np.unique(stream.train_labels[left]).tolist():
            rows = left[stream.train_labels[left] == label]
            count = math.floor(share * len(rows)) if amount < 1 else int(amount)
            if count >= len(rows):
                name = stream.class_order[label]
                allowed = f"below {len(rows)}: class {name} has {len(rows)} training images in task {stage.index + 1}"
                raise UsageError("partition.public", amount, allowed)
            order = counter.permutation(len(rows), seed, "public", stage.index, stream.class_order[label])
            mine.append(rows[order[:count]])
        own = np.sort(np.concatenate(mine))
        taken[own] = True
        public.append(own)
    if not taken.any():
        raise UsageError("partition.public", amount, "is less than one image of every class and task: take more")
    for stage in stream.stages:
        stages.append(replace(stage, train_ids=stage.train_ids[~taken[stage.train_ids]]))
    return replace(stream, stages=tuple(stages)), tuple(public)


def public_of(
    split: Split, stream: Stream, task: int, store: TensorStore, config: settings.Config, dtype: torch.dtype
) -> Public | None:
    """The server's images of the tasks so far; None without any."""
    if split.public is None:
        return None
    ids = distinct(split.public[: task + 1])
    labels = stream.train_labels[ids].copy()
    labels[np.isin(ids, stream.unlabelled)] = HIDDEN
    if not config.labels.public:
        labels[:] = HIDDEN
    new = np.isin(ids, split.public[task])
    on = store.device
    found = [torch.from_numpy(array).to(on) for array in (ids, labels, new)]
    return Public(found[0], found[1], found[2], store, config.evaluate.batch_size, dtype)
