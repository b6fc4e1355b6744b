"""What tests of stages after a task's training share: a run's end, and a head fitted in plain loops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.records.checkpoint import load_newest

Arrays = dict[str, Tensor]
Rows = list[list[float]]


@dataclass
class Ended:
    """The server at the end of a run: the global model, the one that is evaluated, the state of one strategy."""

    model: Arrays
    evaluated: Arrays
    state: Arrays


def ended(result: Any, name: str) -> Ended:
    """The end of a run with the strategy ``name``."""
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None

    def below(prefix: str) -> Arrays:
        return {n.removeprefix(prefix): a for n, a in found.arrays.items() if n.startswith(prefix)}

    return Ended(below("model/"), below("evaluated/"), below(f"strategy/{name}/"))


def hidden(w: Arrays, x: Tensor) -> Tensor:
    """Features (B, d) of the oracle's perceptron."""
    return (x @ w["encoder.1.weight"].T + w["encoder.1.bias"]).clamp(min=0).detach()


def by_class(w: Arrays, world: Any, task: int) -> dict[int, np.ndarray]:
    """Features of all images that any client holds in a task, by class."""
    rows = [row for client in world.held[task] for row in client]
    z = hidden(w, world.x[rows]).numpy()
    labels = np.array([world.y[row] for row in rows])
    return {c: z[labels == c] for c in sorted(set(labels.tolist()))}


def server_key(world: Any) -> tuple[object, ...]:
    """The documented name of the server's draws at the end of the last task."""
    return (world.config.seed, "server", len(world.known) - 1, world.config.federation.rounds)


def gaussian_draws(means: dict[int, np.ndarray], spreads: dict[int, np.ndarray], each: int, *name: object) -> Any:
    """Features and labels drawn from Gaussians by class, with the documented names of the draws."""
    features, labels = [], []
    for place, c in enumerate(sorted(means)):
        generator = torch.Generator().manual_seed(counter.key(*name, place) & (2**63 - 1))
        noise = torch.randn(each, len(means[c]), generator=generator, dtype=torch.float64).numpy()
        factor = np.linalg.cholesky(spreads[c])
        features += [means[c] + factor @ row for row in noise]
        labels += [c] * each
    return torch.from_numpy(np.array(features)), labels


def fitted(
    w: Arrays,
    x: Tensor,
    y: list[int],
    loss: Callable[[Tensor, list[int]], Tensor],
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    batch: int,
    name: tuple[object, ...],
    cosine: bool = False,
) -> Arrays:
    """The head after mini-batch descent on features: velocity and steps written out."""
    w = {n: w[n].detach().clone() for n in ("head.weight", "head.bias")}
    speed = {n: torch.zeros_like(a) for n, a in w.items()}
    for epoch in range(epochs):
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 if cosine else lr
        order = counter.permutation(len(y), *name, epoch).tolist()
        for at in range(0, len(y), batch):
            rows = order[at : at + batch]
            leaf = {n: a.clone().requires_grad_() for n, a in w.items()}
            value = loss(x[rows] @ leaf["head.weight"].T + leaf["head.bias"], [y[i] for i in rows])
            grads = dict(zip(leaf, torch.autograd.grad(value, list(leaf.values())), strict=True))
            for n in w:
                speed[n] = momentum * speed[n] + grads[n] + weight_decay * w[n]
                w[n] = w[n] - rate * speed[n]
    return w


def retrained(
    world: Any,
    w: Any,
    task: int,
    rounds: int,
    name: str,
    start: Any,
    logits: Any,
    epochs: int,
    decay: float,
) -> Any:
    """What clients fit, epoch by epoch: every one from the mean, over its repeated images, then the weighted mean."""
    fitted = {n: a.clone() for n, a in start.items()}
    counts = Counter(world.y[row] for client in world.held[task] for row in client)
    present = sorted(counts)
    for epoch in range(epochs):
        rate = 0.1 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        total, samples = {n: torch.zeros_like(a) for n, a in fitted.items()}, 0
        for client, held in enumerate(world.held[task]):
            key = (world.config.seed, "client", client, task, rounds, name, epoch)
            luck = counter.uniform(len(held), *key, "times")
            rows = [
                row for row, u in zip(held, luck, strict=True)
                for _ in range(math.floor(max(counts.values()) / counts[world.y[row]] + u))
            ]  # fmt: skip
            z = hidden(w, world.x[rows])
            local = {n: a.clone() for n, a in fitted.items()}
            speed = {n: torch.zeros_like(a) for n, a in local.items()}
            order = counter.permutation(len(rows), *key, "order", 0).tolist()
            for at in range(0, len(rows), 8):
                batch = order[at : at + 8]
                leaf = {n: a.clone().requires_grad_() for n, a in local.items()}
                loss = torch.zeros((), dtype=torch.float64)
                for i in batch:
                    row = logits(leaf, z[i])
                    loss = loss + torch.logsumexp(row[present], 0) - row[world.y[rows[i]]]
                grads = torch.autograd.grad(loss / len(batch), list(leaf.values()))
                for n, g in zip(leaf, grads, strict=True):
                    speed[n] = 0.9 * speed[n] + g + decay * local[n]
                    local[n] = local[n] - rate * speed[n]
            total = {n: total[n] + len(rows) * local[n] for n in local}
            samples += len(rows)
        fitted = {n: a / samples for n, a in total.items()}
    return fitted


def trained(tiny_config: Any, oracle: Any, run: dict[str, Any]) -> tuple[Any, Any]:
    world = oracle.World.of(tiny_config(run))
    method = oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known))
    return world, oracle.federated(tiny_config(run), method, world)


@pytest.fixture(scope="session")
def after() -> SimpleNamespace:
    """The functions of this file."""
    return SimpleNamespace(
        ended=ended, hidden=hidden, by_class=by_class, draws=gaussian_draws, key=server_key, fitted=fitted,
        retrained=retrained, trained=trained,
    )  # fmt: skip
