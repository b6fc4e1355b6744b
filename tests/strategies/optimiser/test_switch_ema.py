"""Switch EMA against a literal loop, and its two ends: plain training and a plain average of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError

ONE = {"strategy": ["switch_ema"], "scenario.tasks": 1, "federation.rounds": 1, "federation.epochs": 3, "seed": 6}


def by_hand(oracle: Any, world: Any, momentum: float, interval: int) -> tuple[Any, Any]:
    """(uploaded mean, mean of the trained weights) after one round."""
    settings = world.config
    w0 = oracle.grown(world.start, world, len(world.known[0]))
    sent, plain, total = [], [], 0.0
    for client, rows in enumerate(world.held[0]):
        if not rows:
            continue
        w, ema = dict(w0), dict(w0)
        velocity = {n: torch.zeros_like(a) for n, a in w.items()}
        size = settings.federation.batch_size
        for epoch in range(settings.federation.epochs):
            order = counter.permutation(len(rows), settings.seed, "client", client, 0, 0, "order", epoch).tolist()
            for at in range(0, len(rows), size):
                batch = [rows[i] for i in order[at : at + size]]
                w = oracle.leaves(w)
                labels = [world.y[i] for i in batch]
                value = oracle.cross_entropy(oracle.logits(w, world.x[batch]), labels, world.known[0])
                grads = oracle.gradient(value, w)
                for n in w:
                    velocity[n] = settings.optimiser.momentum * velocity[n] + grads[n]
                    w[n] = (w[n] - settings.optimiser.lr * velocity[n]).detach()
                    ema[n] = (1 - momentum) * ema[n] + momentum * w[n]
            if interval and (epoch + 1) % interval == 0:
                w = dict(ema)
        sent.append((len(rows), ema))
        plain.append((len(rows), w))
        total += len(rows)
    return tuple({n: sum(k / total * a[n] for k, a in models) for n in w0} for models in (sent, plain))


@pytest.mark.parametrize("path", ["sequential", "stacked"])
@pytest.mark.parametrize("interval", [0, 1, 2])
def test_a_round_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, path: str, interval: int) -> None:
    settings = {**ONE, "options.switch_ema.momentum": 0.3, "options.switch_ema.interval": interval, "engine.path": path}
    sent, _ = by_hand(oracle, oracle.World.of(tiny_config(settings)), 0.3, interval)
    assert oracle.distance(oracle.final(tiny(settings)), sent) < 1e-12


def test_momentum_one_is_plain_training(tiny: Any, oracle: Any) -> None:
    plain = oracle.final(tiny({**ONE, "strategy": ["finetune"]}))
    assert oracle.distance(oracle.final(tiny({**ONE, "options.switch_ema.momentum": 1.0})), plain) < 1e-12


def test_a_small_momentum_hardly_leaves_the_received_model(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    world = oracle.World.of(tiny_config(ONE))
    start = oracle.grown(world.start, world, len(world.known[0]))
    assert 0 < oracle.distance(oracle.final(tiny(ONE)), start) < 0.01


@pytest.mark.parametrize(("key", "value"), [("momentum", 0.0), ("momentum", 1.5), ("interval", -1)])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.switch_ema"):
        build(tiny_config({"strategy": ["switch_ema"], f"options.switch_ema.{key}": value}))
