"""Trains the clients of a call one by one or in stacked chunks, and gives way where machine or strategy demands it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RunFailed
from ..local.sharedstate import CannotStack
from ..local.stackable import disagreement
from ..local.stacked import Cohort, train_cohort
from ..local.training import out_of_memory, train_client

if TYPE_CHECKING:
    from .call import Call
    from .node import Node

SMALLER = "lower federation.batch_size or model.width, or use another device"


def train_chunks(node: Node, call: Call, numbers: list[int], changes: list[dict[str, Any]]) -> Iterator[Cohort]:
    """Local training of clients, in the order of ``numbers`` but for their own task indices: a stack has one of them.

    Args:
        numbers: clients with images.
        changes: gets an entry for each change of the engine that is to stay: ``path`` or ``chunk``, and ``why``.

    Raises:
        RunFailed: one client does not fit into memory, or a strategy that declares itself stackable is not.
    """
    path, size = call.header.path, call.header.chunk or len(numbers)
    numbers = call.header.in_turn(numbers)
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
        chunk = of_one_task(call, numbers[at : at + size])
        try:
            done = try_chunk(node, call, chunk)
        except CannotStack as reason:
            changes.append({"path": "sequential", "why": str(reason)})
            for number in numbers[at:]:
                yield one_alone(node, call, number)
            return
        if done is None:
            if len(chunk) == 1:
                raise RunFailed(f"client {numbers[at]} does not fit into memory alone: {SMALLER}")
            size = len(chunk) // 2
            changes.append({"chunk": size, "why": "out of memory"})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        at += len(done.clients)
        yield done
        del done  # its memory is for the next chunk


def of_one_task(call: Call, numbers: list[int]) -> list[int]:
    """Those of ``numbers`` that have the first one's own task index."""
    task = {number: call.header.standing(number)[0] for number in numbers}
    return [number for number in numbers if task[number] == task[numbers[0]]] if numbers else []


def try_chunk(node: Node, call: Call, numbers: list[int]) -> Cohort | None:
    """A chunk's training, or None if it does not fit into memory; nothing is kept of an attempt that failed."""
    begun = perf_counter()
    try:
        return timed(train_cohort([node.client(call, number) for number in numbers]), begun)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    return None


def one_alone(node: Node, call: Call, number: int) -> Cohort:
    """One client's training by itself."""
    begun = perf_counter()
    client = node.client(call, number)
    try:
        return timed(Cohort([(client, train_client(client))], [], {}), begun)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RunFailed(f"client {number} does not fit into memory: {SMALLER}") from error


def timed(cohort: Cohort, begun: float) -> Cohort:
    """A cohort that has just been trained since ``begun``, with the seconds of a step."""
    steps = sum(trained.steps for _, trained in cohort.clients)
    return replace(cohort, seconds=(perf_counter() - begun) / steps) if steps else cohort


def cannot_stack(node: Node, call: Call, numbers: list[int]) -> str | None:
    """Why this node's clients have to be trained one by one; tried out on two of them.

    Raises:
        RunFailed: every strategy of the stack declares that it can be stacked, so that this is a defect.
    """
    # Those with most images: whoever has no whole batch takes no step that could be compared.
    tried = of_one_task(call, sorted(numbers, key=lambda number: -node.steps_size(call, number)))[:2]
    declared = all(s.stackable for s in node.stack)
    # Stragglers too late to take a step could not be compared either.
    call = replace(call, header=replace(call.header, limits=[]))
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
