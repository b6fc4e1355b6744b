"""Named arrays of the clients of a stack, and the images of one stacked call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategy import Source
from .batching import Group, Plan
from .sources import labels_of

if TYPE_CHECKING:
    from ..data.store import TensorStore

Stacked = dict[str, Tensor]
"""Arrays with a leading axis of clients."""


class Bank:
    """Named arrays of the clients of a stack; one that is the same tensor for all of them stays a single one.

    Args:
        columns: each client's arrays, with the same names.
        names: which of them.
    """

    def __init__(self, columns: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        self.size = len(columns)
        self.arrays: dict[str, Tensor] = {}
        self.common: set[str] = set()
        for name in names:
            column = [c[name] for c in columns]
            if all(a is column[0] for a in column):
                self.common.add(name)
                self.arrays[name] = column[0]
            else:
                self.arrays[name] = torch.stack(column)

    def pick(self, group: Group) -> Stacked:
        """The rows of a group; single arrays as they are."""
        whole = group.count == self.size
        return {n: a if whole or n in self.common else a[group.rows] for n, a in self.arrays.items()}

    def spread(self, group: Group) -> Stacked:
        """As :meth:`pick`, with single arrays expanded to the group's size."""
        count = group.count
        return {n: a.expand(count, *a.shape) if n in self.common else a for n, a in self.pick(group).items()}

    def axes(self) -> dict[str, int | None]:
        """The axis of clients of each array, for ``vmap``; None: one array for all."""
        return {n: None if n in self.common else 0 for n in self.arrays}

    def put(self, group: Group, values: Stacked) -> None:
        """Writes rows back."""
        for name, value in values.items():
            if group.count == self.size:
                self.arrays[name] = value
                continue
            if name in self.common:
                self.arrays[name] = self.arrays[name].expand(self.size, *self.arrays[name].shape).clone()
            target = self.arrays[name]
            if value.data_ptr() != target.data_ptr():  # the first rows may have been updated where they are
                target[group.rows] = value
        self.common -= values.keys()

    def stacked(self, count: int) -> Stacked:
        """The first ``count`` rows of every array."""
        return {n: a.expand(count, *a.shape) if n in self.common else a[:count] for n, a in self.arrays.items()}


def gathered(plans: Sequence[Plan], group: Group, store: TensorStore) -> dict[str, Any]:
    """The images of a group's step with what belongs to them, stacked over its clients.

    Returns:
        ``pixels`` (K, B, C, H, W), ``labels`` and ``ids`` (K, B), ``payload`` by name (K, b, ...).
    """
    mine = [plans[place] for place in group.members]
    if not any(s.own for s in mine[0].sources):
        labels = store.label_tensor[group.ids]
        return {"pixels": store.gather(group.ids), "labels": labels, "ids": group.ids, "payload": {}}
    stream, *columns = torch.split(group.ids, list(group.sizes), dim=1)
    parts = [(store.gather(stream), store.label_tensor[stream], stream)]
    payload: Stacked = {}
    for number, places in enumerate(columns):
        sources = [one.sources[number] for one in mine]
        if not sources[0].own:
            parts.append((store.gather(places), store.label_tensor[places], places))
            continue
        ids = torch.stack([s.ids[row] for s, row in zip(sources, places, strict=True)])
        known = [labels_of(one.client, s)[row] for one, s, row in zip(mine, sources, places, strict=True)]
        parts.append((own_images(sources, places, ids, store), torch.stack(known), ids))
        for key in sources[0].payload:
            rows = [s.payload[key][row] for s, row in zip(sources, places, strict=True)]
            payload[f"{sources[0].name}/{key}"] = torch.stack(rows)
    pixels, labelled, ids = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return {"pixels": pixels, "labels": labelled, "ids": ids, "payload": payload}


def own_images(sources: Sequence[Source], places: Tensor, ids: Tensor, store: TensorStore) -> Tensor:
    """(K, b, C, H, W) images of one source of each client, at (K, b) places in it."""
    first = sources[0].images
    if first is None:
        return store.gather(ids)
    if all(s.images is first for s in sources):
        return first[places]
    found = [s.images[row] for s, row in zip(sources, places, strict=True) if s.images is not None]
    return torch.stack(found)
