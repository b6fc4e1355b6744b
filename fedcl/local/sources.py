"""What a client's batches are made of: its own stream, its unlabelled images, and what strategies mix in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch import STREAM
from ..errors import RunFailed
from ..strategy import Batch, Source, Strategy
from .blame import blame
from .order import cycle

if TYPE_CHECKING:
    from ..stack import Stack
    from .training import Client


def extra_sources(stack: Stack, client: Client) -> list[tuple[Source, Iterator[Tensor]]]:
    """The non-empty extra sources with their endless batches: a client's unlabelled images where it has labelled ones
    too and the stack learns from both, then those of all strategies.
    """
    found: list[tuple[Source, Iterator[Tensor]]] = []
    if stack.learns and len(client.ids) and len(client.unlabelled):
        config = client.node.config
        size = config.labels.batch_size or config.federation.batch_size
        source = Source(client.unlabelled, size, name="unlabelled")
        found.append((source, cycle(source, *client.key, "source", 0)))
    for strategy in stack:
        if type(strategy).sources is Strategy.sources:
            continue
        with blame(strategy, "sources"):
            for given in strategy.sources(client.context(strategy)):
                source = given if given.name else replace(given, name=strategy.name)
                if len(source.ids):
                    found.append((source, cycle(source, *client.key, "source", len(found))))
    return found


def hidden_sources(client: Client, extra: Sequence[Source]) -> tuple[int, ...]:
    """Which sources, 0 being the client's stream, are of images without labels.

    Raises:
        RunFailed: a strategy mixes both in one source, so that nobody could tell them apart in a step.
    """
    node = client.node
    if not node.hides and all(s.images is None for s in extra):
        return ()
    found = []
    for number, labels in enumerate([node.store.label_tensor[client.primary], *(labels_of(client, s) for s in extra)]):
        without = labels < 0
        if bool(without.any()):
            found.append(number)
            if not bool(without.all()):
                raise RunFailed("a strategy's source mixes labelled and unlabelled images: give two sources")
    return tuple(found)


def prepared(stack: Stack, batch: Batch, hidden: tuple[int, ...]) -> Batch:
    """A batch as all strategies of the stack want it."""
    batch = given = replace(batch, hidden=hidden)
    for strategy in stack:
        with blame(strategy, "prepare"):
            batch = strategy.prepare(batch)
    return replace(batch, hidden=hidden, names=given.names, payload=given.payload)


def labels_of(client: Client, source: Source) -> Tensor:
    """(M,) int64 class positions of a source's images, -1 where there is no label."""
    if source.images is None:
        return client.node.store.label_tensor[source.ids]
    return torch.full_like(source.ids, -1) if source.labels is None else source.labels


def source_names(extra: Iterable[Source]) -> tuple[str, ...]:
    """The names of all sources of a step, the client's stream first."""
    return (STREAM, *(s.name for s in extra))


def gather(client: Client, picked: Tensor, extra: Sequence[tuple[Source, Tensor]]) -> Batch:
    """The stream's batch followed by one of each extra source, given by the places in it."""
    store = client.node.store
    parts = [client.primary[picked], *(s.ids[places] for s, places in extra)]
    ids = torch.cat(parts)
    source = torch.cat([torch.full_like(p, i) for i, p in enumerate(parts)])
    if all(s.images is None for s, _ in extra):
        pixels, labels = store.gather(ids), store.label_tensor[ids]
    else:
        both = [(store.gather(parts[0]), store.label_tensor[parts[0]])]
        both += [
            (store.gather(s.ids[places]) if s.images is None else s.images[places], labels_of(client, s)[places])
            for s, places in extra
        ]
        pixels, labels = torch.cat([p for p, _ in both]), torch.cat([y for _, y in both])
    payload = {f"{s.name}/{n}": a[places] for s, places in extra for n, a in s.payload.items()}
    return Batch(pixels, labels, ids, source, names=source_names(s for s, _ in extra), payload=payload)
