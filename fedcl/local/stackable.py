"""Whether a strategy can be trained stacked: one step of two clients, both ways, in float64.

It cannot be seen in a strategy's code. Boolean masks fail loudly under ``torch.func.vmap``; a tensor kept on ``self``
or a teacher left in training mode is silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import Optimiser
from ..errors import Interrupted
from ..strategy import Arrays, Strategy
from .optim import make_optimiser
from .sharedstate import CannotStack
from .stacked import train_cohort
from .training import Client, NamedModels, Trained, out_of_memory, train_client

if TYPE_CHECKING:
    from ..federation.node import Node

TOLERANCE = 1e-10
"""Largest difference of an array after one step, relative to its norm."""


FLOOR = 1e-4
"""Below it there may be nothing but rounding, as in the gradient of a bias before BatchNorm."""


def disagreement(clients: Sequence[Client]) -> str | None:
    """Why these clients cannot be trained as one stack, or None if one step agrees with training them one by one.

    Args:
        clients: one or two of a cohort, with images.

    Raises:
        CannotStack: their states differ.
        RunFailed: the step fails one by one as well.
    """
    if not clients:
        return None
    pair = widened(clients)
    with unchanged(pair[0].node):
        alone = [train_client(client, limit=1) for client in pair]
    try:
        with unchanged(pair[0].node):
            together = [trained for _, trained in train_cohort(pair, limit=1).clients]
            kept = next((leak for s in pair[0].node.stack for leak in leaks(s)), None)
    except (CannotStack, Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        return " ".join(str(error).split())[:300]
    if kept is not None:
        return kept
    for one, other in zip(alone, together, strict=True):
        for name, array in one.arrays.items():
            if array.is_floating_point() and not close(other.arrays[name], array):
                off = distance(other.arrays[name], array)
                return f"after one step {name} differs from training one by one by {off:.0e}"
        for name, array in beside(one).items():
            if array.is_floating_point() and not close(beside(other)[name], array):
                off = distance(beside(other)[name], array)
                return f"after one step {name} differs from training one by one by {off:.0e}"
        for name, value in one.losses.items():
            if math.isfinite(value) and abs(other.losses[name] - value) > TOLERANCE * max(1.0, abs(value)):
                return f"the loss {name} is {other.losses[name]:g}, one by one it is {value:g}"
    return None


@contextmanager
def unchanged(node: Node) -> Iterator[None]:
    """Forgets what strategies note on themselves meanwhile: a trial leaves no trace in the run."""
    before = [(strategy, dict(vars(strategy))) for strategy in node.stack]
    try:
        yield
    finally:
        for strategy, noted in before:
            vars(strategy).clear()
            vars(strategy).update(noted)


def leaks(strategy: Strategy) -> Iterator[str]:
    """Tensors of a step that a strategy keeps; outside of their ``vmap`` they are nobody's."""
    for name, value in vars(strategy).items():
        if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors(value)):
            yield f"strategy {strategy.name!r} keeps a tensor of a step in self.{name}"


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a value, also those in lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


def beside(trained: Trained) -> Arrays:
    """What came of training beside the model: arrays that were carried, and those after phases with a name."""
    carried = {f"{s}'s carried {n}": a for s, arrays in trained.carried.items() for n, a in arrays.items()}
    return carried | {f"{n} after phase {p}": a for p, arrays in trained.outcomes.items() for n, a in arrays.items()}


def distance(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|; an array whose norm is below :data:`FLOOR` is compared as if it had that one."""
    norm = float(torch.linalg.vector_norm(other))
    return float(torch.linalg.vector_norm(one - other)) / max(norm, FLOOR)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two arrays agree within :data:`TOLERANCE`; what is not finite fails in its own way, later."""
    return not math.isfinite(float(torch.linalg.vector_norm(other))) or distance(one, other) <= TOLERANCE


def widened(clients: Sequence[Client]) -> list[Client]:
    """The same clients with all their numbers, and those of their node, in float64 and with plain SGD.

    Adam makes a whole step of a gradient that is nothing but rounding errors, as that of a bias before BatchNorm: there
    two right computations differ. The gradients are what a strategy decides.
    """
    first = clients[0].node
    plain = Optimiser(lr=first.config.optimiser.lr, momentum=0.0, clip=first.config.optimiser.clip)
    config = replace(first.config, engine=replace(first.config.engine, dtype="float64"), optimiser=plain)
    node = replace(first, config=config, dtype=torch.float64, optimiser=make_optimiser(plain, first.optimiser.groups))
    seen: dict[int, Tensor] = {}

    def wide(arrays: Mapping[str, Tensor]) -> Arrays:
        # One tensor stays one: what clients share is told by identity.
        return {n: seen.setdefault(id(a), a.double() if a.is_floating_point() else a) for n, a in arrays.items()}

    return [
        replace(
            client, received=wide(client.received), down={s: wide(a) for s, a in client.down.items()},
            state={s: wide(a) for s, a in client.state.items()}, node=node,
            models=NamedModels(node, {n: wide(a) for n, a in client.models.named.items()}),
        )
        for client in clients
    ]  # fmt: skip
