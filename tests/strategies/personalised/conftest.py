"""Literal loops of the personalised family: a model a client, plain Python over clients, rounds and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedcl.run import RunResult

Arrays = dict[str, Tensor]


@pytest.fixture
def kept() -> Callable[[RunResult, str], dict[int, Arrays]]:
    """``kept(result, prefix)``: arrays of each client's last state whose names start with ``prefix``, without it."""
    from fedcl.federation.call import below
    from fedcl.federation.store import ClientStore

    def read(result: RunResult, prefix: str) -> dict[int, Arrays]:
        store = ClientStore(result.folder / "clients", 0)
        return {client: below(store.get(client, 10**9), prefix) for client in store.clients()}

    return read


@pytest.fixture
def averaged() -> Callable[[Arrays, list[tuple[float, Arrays]]], Arrays]:
    """``averaged(old, [(weight, model), ...])``: the weighted mean of the models."""

    def mean(old: Arrays, models: list[tuple[float, Arrays]]) -> Arrays:
        total = sum(weight for weight, _ in models)
        return {n: torch.stack([weight / total * m[n] for weight, m in models]).sum(0) for n in old}

    return mean


@pytest.fixture
def passes(oracle: Any) -> Callable[..., Arrays]:
    """``passes(world, client, task, start, loss)``: epochs of SGD with momentum, by hand."""
    from fedcl import random as counter

    def run(
        world: Any,
        client: int,
        task: int,
        start: Arrays,
        loss: Callable[[Arrays, Tensor, list[int]], Tensor],
        *,
        round_: int = 0,
        epochs: int = 1,
        place: int = 0,
        only: Callable[[str], bool] = lambda name: True,
        decay: Callable[[str], float] = lambda name: 0.0,
    ) -> Arrays:
        settings, rows = world.config, world.held[task][client]
        key = (settings.seed, "client", client, task, round_, *(("phase", place) if place else ()))
        w = {n: a.clone() for n, a in start.items()}
        velocity = {n: torch.zeros_like(a) for n, a in w.items()}
        size = settings.federation.batch_size
        for epoch in range(epochs):
            order = counter.permutation(len(rows), *key, "order", epoch).tolist()
            for at in range(0, len(rows), size):
                batch = [rows[i] for i in order[at : at + size]]
                w = oracle.leaves(w)
                grads = oracle.gradient(loss(w, world.x[batch], [world.y[i] for i in batch]), w)
                with torch.no_grad():
                    for n in w:
                        if only(n):
                            velocity[n] = settings.optimiser.momentum * velocity[n] + grads[n] + decay(n) * w[n]
                            w[n] = w[n] - settings.optimiser.lr * velocity[n]
        return {n: a.detach() for n, a in w.items()}

    return run


@pytest.fixture
def private_heads(oracle: Any, passes: Any, averaged: Any) -> Callable[..., tuple[Arrays, dict[int, Arrays]]]:
    """``private_heads(world, train)``: (global model, head of each client) after a run in which heads stay at clients.

    ``train(client, task, start, loss, round_)`` gives a client's model after its round.
    """

    def is_head(name: str) -> bool:
        return name.startswith("head.")

    def run(world: Any, train: Callable[..., Arrays]) -> tuple[Arrays, dict[int, Arrays]]:
        w, heads = world.start, {}
        for task, known in enumerate(world.known):
            w = oracle.grown(w, world, len(known))
            for round_ in range(world.config.federation.rounds):
                models = []
                for client, rows in enumerate(world.held[task]):
                    own = oracle.grown({**world.start, **heads.get(client, {})}, world, len(known))
                    start = {n: own[n] if is_head(n) else a for n, a in w.items()}

                    def loss(model: Any, x: Any, y: Any, known: Any = known) -> Any:
                        return oracle.cross_entropy(oracle.logits(model, x), y, known)

                    trained = train(client, task, start, loss, round_) if rows else start
                    heads[client] = {n: a for n, a in trained.items() if is_head(n)}
                    if rows:
                        models.append((float(len(rows)), trained))
                w = {n: w[n] if is_head(n) else a for n, a in averaged(w, models).items()}
        return w, heads

    return run
