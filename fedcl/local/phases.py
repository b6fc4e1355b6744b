"""The phases of a client's round of local training, one after the other, for one client or for a stack of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import RunFailed
from ..strategy import Arrays, Phase
from .blame import blame
from .client import Client, Kind, Trained
from .order import plan

STEP_HOOKS = ("edit_gradients", "rate", "after_step", "carry")
"""What strategies do in a step after the gradient, in this order."""

Train = Callable[[list[Client]], list[Trained]]
"""Trains one phase of some clients."""


def in_phases(clients: Sequence[Client], train: Train, only: int | None = None) -> list[Trained]:
    """The outcome of all phases of the clients' round, each trained by ``train``.

    Args:
        only: the one phase to go through, by its number, from what the clients received; None: all.

    Raises:
        RunFailed: phases that are empty, of one name, or not the same at all clients.
    """
    clients = [begun(client) for client in clients]
    columns = [phases_of(client) for client in clients]
    told = {tuple((p.name, p.epochs, p.steps, p.side, p.batch_norm, p.lr_scale) for p in phases) for phases in columns}
    if len(told) > 1:
        raise RunFailed("the phases of local training differ between clients: only start and ids may")
    if only is not None:
        return train([put_into(client, phases[only], only) for client, phases in zip(clients, columns, strict=True)])
    if all(len(phases) == 1 for phases in columns):
        done = train([put_into(client, phases[0], 0) for client, phases in zip(clients, columns, strict=True)])
        name = columns[0][0].name if columns else ""
        return [replace(one, outcomes={name: one.arrays}) for one in done] if name else done
    found: list[list[Trained]] = [[] for _ in clients]
    for place in range(len(columns[0])):
        now = [
            put_into(client, phases[place], place, phases, so_far)
            for client, phases, so_far in zip(clients, columns, found, strict=True)
        ]
        for so_far, one in zip(found, train(now), strict=True):
            so_far.append(one)
    return [together(phases, so_far) for phases, so_far in zip(columns, found, strict=True)]


def begun(client: Client) -> Client:
    """The client with what its strategies carry through the round."""
    carried: dict[str, Arrays] = {}
    for strategy in client.node.stack.having("begin_round"):
        with blame(strategy, "begin_round"):
            carried[strategy.name] = dict(strategy.begin_round(client.context(strategy)))
    return replace(client, carried=carried) if carried else client


def phases_of(client: Client) -> tuple[Phase, ...]:
    """The phases of a client's round.

    Raises:
        RunFailed: there are none, or two of one name.
    """
    owner = client.node.stack.owners["phases"]
    if owner is None:
        return (Phase(),)
    with blame(owner, "phases"):
        phases = tuple(owner.phases(client.context(owner)))
        names = [p.name for p in phases]
        if not any(not p.side for p in phases) or len(set(names)) < len(names):
            raise RunFailed(f"strategy {owner.name!r}: phases must have different names, and one that is no side phase")
    return phases


def put_into(
    client: Client, phase: Phase, place: int, phases: Sequence[Phase] = (), done: Sequence[Trained] = ()
) -> Client:
    """The client in a phase of its round, which goes on from those that are ``done``."""
    start, before = phase.start, [one for p, one in zip(phases, done, strict=False) if not p.side]
    if start is None:
        start = before[-1].arrays if before else None
    elif start.keys() != client.received.keys():
        raise RunFailed(f"the phase {phase.name!r} must start from all arrays of the model")
    client = replace(
        client, phase=phase, place=place, start=start, spent=sum(one.steps for one in done),
        carried=before[-1].carried if before else client.carried,
    )  # fmt: skip
    if phase.ids is None:
        return client
    ids = phase.ids.to(client.ids.device)
    labels = client.node.store.label_tensor[ids]
    counts = torch.bincount(labels, minlength=len(client.counts))
    return replace(client, ids=ids, labels=labels, counts=counts, unlabelled=client.unlabelled[:0])


def together(phases: Sequence[Phase], done: Sequence[Trained]) -> Trained:
    """The outcome of a round from those of its phases."""
    main = [one for phase, one in zip(phases, done, strict=True) if not phase.side]
    steps: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    shapes: Counter[Kind] = Counter()
    for place, one in enumerate(done):
        for name, value in one.losses.items():
            steps[name] += one.steps
            sums[name] += value * one.steps  # type: ignore[assignment]  # a sum of floats
        shapes.update({shape if place == 0 else (place, shape): count for shape, count in one.shapes.items()})  # type: ignore[misc]
    return Trained(
        main[-1].arrays, sum(one.steps for one in main), main[0].samples, main[0].dropped,
        {n: sums[n] / steps[n] for n in sums}, shapes, main[-1].carried,
        {phase.name: one.arrays for phase, one in zip(phases, done, strict=True) if phase.name},
    )  # fmt: skip


def epoch_length(client: Client, planned: Sequence[object]) -> int:
    """Steps of one local epoch of a client in its phase, at least 1.

    Args:
        planned: all batches of the phase.
    """
    config = client.node.config
    if config.federation.passes == "once":
        return max(len(planned), 1)
    return max(len(plan(len(client.primary), config, client.key, Phase(epochs=1))[0]), 1)


def merged(counts: Mapping[Kind, int], more: Mapping[Kind, int]) -> dict[Kind, int]:
    """The sum of two counts of steps by kind."""
    return dict(Counter(counts) + Counter(more))
