"""What a client sends after its round: the model's arrays, its strategies' own, and the weight it counts for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RunFailed
from ..local.client import Client, Trained
from ..local.training import blame
from ..measure.evaluation import head_correct
from ..strategy import Arrays, Strategy
from .call import Call, prefixed

if TYPE_CHECKING:
    from .node import Node


def weight_of(node: Node, client: Client, result: Trained) -> float:
    """What a client counts for in a weighted mean.

    Raises:
        RunFailed: a strategy says what is not a number above 0.
    """
    owner = node.stack.owners["weight"]
    if owner is None:
        return float(result.samples) if node.config.federation.weighting == "samples" else 1.0
    with blame(owner, "weight"):
        weight = float(owner.weight(client.context(owner, result), result.samples, result.steps))
    if not 0.0 < weight < float("inf"):
        raise RunFailed(f"strategy {owner.name!r}: the weight of client {client.id} is {weight}, not above 0")
    return weight


def leaving(node: Node, client: Client, result: Trained) -> Arrays:
    """The arrays of the trained model that leave a client, as its strategies send them.

    Raises:
        RunFailed: a strategy changes names or shapes; training has failed where NaN would mean "not sent".
    """
    shared = {n: a for n, a in result.arrays.items() if node.leaves(n)}
    owner = node.stack.owners["aggregate"]
    if owner is not None and owner.model_reduction == "masked_mean":
        bad = [n for n, a in shared.items() if a.is_floating_point() and not bool(a.isfinite().all())]
        if bad:
            raise RunFailed(
                f"task {client.header.task + 1}, round {client.header.round + 1}, client {client.id}: {bad[0]!r} is "
                "not finite after training; a lower optimiser.lr or optimiser.clip=1 may help"
            )
    for strategy in node.stack.having("upload"):
        with blame(strategy, "upload"):
            sent = strategy.upload(client.context(strategy, result), shared)
        if {n: a.shape for n, a in sent.items()} != {n: a.shape for n, a in shared.items()}:
            raise RunFailed(f"strategy {strategy.name!r}: upload must return the names and shapes it was given")
        shared = {n: sent[n].to(a.dtype) for n, a in shared.items()}
    return shared


def end_round(node: Node, client: Client, result: Trained) -> tuple[Arrays, dict[str, Arrays]]:
    """All strategies' uploads and new client states."""
    uploads: Arrays = {}
    state: dict[str, Arrays] = {}
    for strategy in node.stack:
        if type(strategy).end_round is Strategy.end_round:
            state[strategy.name] = client.state[strategy.name]
            continue
        with blame(strategy, "end_round"):
            arrays, state[strategy.name] = strategy.end_round(
                client.context(strategy, result), result.arrays, result.steps
            )
        uploads |= prefixed(arrays, f"{strategy.name}/")
    return uploads, state


def probed(node: Node, call: Call, client: Client, arrays: Arrays) -> dict[str, list[int]]:
    """[correct, total] of a trained model on the client's own test rows in the call, by client; {} without any."""
    rows = call.own.get(client.id)
    if node.own_test is None or rows is None or not len(rows):
        return {}
    found = head_correct(node, arrays, client.known, node.own_test, rows.cpu().numpy(), client.heads)
    return {str(client.id): [found, len(rows)]}
