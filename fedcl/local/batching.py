"""Which images which clients of a stack train on at each step: decided on the host before the first step.

Nothing is padded. The clients with most steps come first; at each step the active ones are grouped by the sizes of
their batch, and every group is one stacked call. All sample ids go to the device in one transfer, so that nothing
waits for it between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..strategy import Source
from .client import Client
from .order import plan
from .phases import epoch_length
from .sources import extra_sources, hidden_sources

if TYPE_CHECKING:
    from ..config import Config

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What one client will do in a round.

    Attributes:
        batches: for each step the sample ids (host) of each source, the client's own stream first.
        sizes: for each step how many these are.
        dropped: images that an epoch leaves out.
        hidden: the sources whose images have no label.
        sources: the extra sources; of those with images or a payload of their own ``batches`` has places.
        epoch: steps of one local epoch.
    """

    client: Client
    batches: list[list[Ids]]
    sizes: list[tuple[int, ...]]
    dropped: int
    hidden: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    epoch: int = 1


@dataclass(frozen=True)
class Group:
    """The clients of one stacked call: those whose batches at this step have the same sizes, and labels alike.

    Attributes:
        rows: their places in the stack; a slice where they are the first ones.
        count: how many they are.
        ids: (count, B) int64 sample ids, on the device; places in a source that has images or a payload of its own.
        source: (B,) int64: which source each image of a batch is from.
        hidden: the sources whose images have no label.
        sizes: images of each source in a batch.
        members: ``rows`` as numbers.
    """

    rows: slice | Tensor
    count: int
    ids: Tensor
    source: Tensor
    hidden: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    members: tuple[int, ...] = ()


def make_plan(client: Client, limit: int | None = None) -> Plan:
    """The batches of a client's round, or of its first ``limit`` steps."""
    picked, dropped = plan(len(client.primary), client.node.config, client.key, client.phase)
    own = client.primary.cpu().numpy()
    drawn = extra_sources(client.node.stack, client)
    sources = tuple(source for source, _ in drawn)
    hidden = hidden_sources(client, sources)
    steps = [
        [own[batch], *((places if s.own else s.ids[places]).cpu().numpy() for s, b in drawn for places in [next(b)])]
        for batch in picked[: client.most_steps(limit)]
    ]
    sizes = [tuple(map(len, step)) for step in steps]
    return Plan(client, steps, sizes, dropped, hidden, sources, epoch_length(client, picked))


def sharing(sizes: Sequence[int], config: Config) -> float:
    """Clients' steps that one stacked call does on average in a round; 1.0 where none is shared.

    Args:
        sizes: training images of each client of a cohort.
        config: the ``federation`` section decides the batches.
    """
    batches = [[len(b) for b in plan(size, config, ("sharing",))[0]] for size in sizes]
    calls = sum(len(set(step) - {0}) for step in zip_longest(*batches, fillvalue=0))
    return sum(map(len, batches)) / calls if calls else 1.0


def schedule_groups(plans: Sequence[Plan], device: torch.device) -> list[list[Group]]:
    """The groups of each step, for plans in order of descending length."""
    found: list[list[tuple[list[int], tuple[int, ...], list[Ids]]]] = []
    alike: list[list[tuple[int, ...]]] = []
    for index in range(len(plans[0].batches) if plans else 0):
        groups: dict[tuple[Any, ...], tuple[list[int], tuple[int, ...], list[Ids]]] = {}
        for place, one in enumerate(plans):
            if len(one.batches) <= index:
                break
            sizes = one.sizes[index]
            # A strategy tells its sources by name: those of one call are the same ones for all clients.
            names = tuple((s.name, s.own) for s in one.sources)
            rows, _, drawn = groups.setdefault((sizes, one.hidden, names), ([], sizes, []))
            rows.append(place)
            drawn += one.batches[index]
        found.append(list(groups.values()))
        alike.append([hidden for _, hidden, _ in groups])
    parts = [part for step in found for rows, _, ids in step for part in (*ids, np.asarray(rows))]
    flat = np.concatenate(parts) if parts else np.zeros(0)
    moved = torch.from_numpy(flat.astype(np.int64)).to(device)
    sources: dict[tuple[int, ...], Tensor] = {}
    at, out = 0, []
    for step, without in zip(found, alike, strict=True):
        groups_here = []
        for (rows, sizes, _), hidden in zip(step, without, strict=True):
            count, width = len(rows), sum(sizes)
            ids = moved[at : at + count * width].view(count, width)
            at += count * width
            places: slice | Tensor = moved[at : at + count]
            at += count
            if rows[-1] == count - 1:
                places = slice(0, count)
            if sizes not in sources:
                sources[sizes] = torch.repeat_interleave(torch.tensor(sizes)).to(device)
            groups_here.append(Group(places, count, ids, sources[sizes], hidden, sizes, tuple(rows)))
        out.append(groups_here)
    return out
