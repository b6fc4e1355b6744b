"""What a client's batches are made of: its own stream, its unlabelled images, and what strategies mix in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
        source = Source(client.unlabelled, config.labels.batch_size or config.federation.batch_size)
        found.append((source, cycle(source, *client.key, "source", 0)))
    for strategy in stack:
        if type(strategy).sources is Strategy.sources:
            continue
        with blame(strategy, "sources"):
            for source in strategy.sources(client.context(strategy)):
                if len(source.ids):
                    found.append((source, cycle(source, *client.key, "source", len(found))))
    return found


def hidden_sources(client: Client, extra: Sequence[Source]) -> tuple[int, ...]:
    """Which sources, 0 being the client's stream, are of images without labels.

    Raises:
        RunFailed: a strategy mixes both in one source, so that nobody could tell them apart in a step.
    """
    node = client.node
    if not node.hides:
        return ()
    found = []
    for number, ids in enumerate([client.primary, *(s.ids for s in extra)]):
        without = node.store.label_tensor[ids] < 0
        if bool(without.any()):
            found.append(number)
            if not bool(without.all()):
                raise RunFailed("a strategy's source mixes labelled and unlabelled images: give two sources")
    return tuple(found)


def prepared(stack: Stack, batch: Batch, hidden: tuple[int, ...]) -> Batch:
    """A batch as all strategies of the stack want it."""
    batch = replace(batch, hidden=hidden)
    for strategy in stack:
        with blame(strategy, "prepare"):
            batch = strategy.prepare(batch)
    return replace(batch, hidden=hidden)


def gather(client: Client, picked: Tensor, extra: list[Tensor]) -> Batch:
    """The stream's batch followed by one of each extra source."""
    store = client.node.store
    parts = [client.primary[picked], *extra]
    ids = torch.cat(parts)
    source = torch.cat([torch.full_like(p, i) for i, p in enumerate(parts)])
    return Batch(store.gather(ids), store.label_tensor[ids], ids, source)
