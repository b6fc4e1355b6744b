"""Trains the clients of a call one by one or in stacked chunks, and gives way where machine or strategy demands it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RunFailed
from ..sharedstate import CannotStack
from ..stackable import disagreement
from ..stacked import Cohort, train_cohort
from ..training import out_of_memory, train_client

if TYPE_CHECKING:
    from .call import Call
    from .node import Node

SMALLER = "lower federation.batch_size or model.width, or use another device"


def train_chunks(node: Node, call: Call, numbers: list[int], changes: list[dict[str, Any]]) -> Iterator[Cohort]:
    """Local training of clients in the order of ``numbers``.

    Args:
        numbers: clients with images.
        changes: gets an entry for each change of the engine that is to stay: ``path`` or ``chunk``, and ``why``.

    Raises:
        RunFailed: one client does not fit into memory, or a strategy that declares itself stackable is not.
    """
    path, size = call.header.path, call.header.chunk or len(numbers)
    if path == "stacked" and call.header.round == 0:
        reason = cannot_stack(node, call, numbers)
        if reason is not None:
            changes.append({"path": "sequential", "why": reason})
            path = "sequential"
    if path != "stacked":
        for number in numbers:
            yield one_alone(node, call, number)
        return
    at = 0
    while at < len(numbers):
        try:
            done = try_chunk(node, call, numbers[at : at + size])
        except CannotStack as reason:
            changes.append({"path": "sequential", "why": str(reason)})
            for number in numbers[at:]:
                yield one_alone(node, call, number)
            return
        if done is None:
            if size == 1:
                raise RunFailed(f"client {numbers[at]} does not fit into memory alone: {SMALLER}")
            size = max(1, min(size, len(numbers) - at) // 2)
            changes.append({"chunk": size, "why": "out of memory"})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        at += len(done.clients)
        yield done
        del done  # its memory is for the next chunk


def try_chunk(node: Node, call: Call, numbers: list[int]) -> Cohort | None:
    """A chunk's training, or None if it does not fit into memory; nothing is kept of an attempt that failed."""
    try:
        return train_cohort([node.client(call, number) for number in numbers])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    return None


def one_alone(node: Node, call: Call, number: int) -> Cohort:
    """One client's training by itself."""
    client = node.client(call, number)
    try:
        return Cohort([(client, train_client(client))], [], {})
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RunFailed(f"client {number} does not fit into memory: {SMALLER}") from error


def cannot_stack(node: Node, call: Call, numbers: list[int]) -> str | None:
    """Why this node's clients have to be trained one by one; tried out on two of them.

    Raises:
        RunFailed: every strategy of the stack declares that it can be stacked, so that this is a defect.
    """
    # Those with most images: whoever has no whole batch takes no step that could be compared.
    tried = sorted(numbers, key=lambda number: -len(call.ids[number]))[:2]
    declared = all(s.stackable for s in node.stack)
    try:
        reason = disagreement([node.client(call, number) for number in tried])
    except CannotStack as difference:
        return str(difference)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = None if declared else "there is not enough memory to try it out"
    if reason is None:
        return None
    names = ", ".join(s.name for s in node.stack)
    if declared:
        raise RunFailed(
            f"{names}: declared as stackable, but training stacked is not training one by one: {reason}; "
            f"engine.path=sequential goes on without"
        )
    return reason
