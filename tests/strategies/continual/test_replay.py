"""Replay against a literal loop, and what its memory may and may not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.run import RunResult

IMAGE = 64
"""Bytes of a digit."""

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]


def remembered(seen: list[tuple[int, int, int]], limit: int, policy: str) -> list[int]:
    """Rows kept of all (row, priority, label) ever seen by a client, chosen anew from the full history."""
    if policy == "reservoir":
        kept = sorted(seen, key=lambda item: item[1])[:limit]
    else:
        queues = {label: sorted(i for i in seen if i[2] == label) for _, _, label in seen}
        queues = {c: sorted(q, key=lambda item: item[1]) for c, q in queues.items()}
        kept = []
        while len(kept) < min(limit, len(seen)):
            fronts = sorted((q.pop(0) for q in queues.values() if q), key=lambda item: item[1])
            kept += fronts[: limit - len(kept)]
    order = {item: at for at, item in enumerate(seen)}
    return [row for row, _, _ in sorted(kept, key=lambda item: order[item])]


def replay(oracle: ModuleType, config: Config, limit: int, policy: str, size: int) -> Any:
    """A federated run with one memory a client, written out."""
    world = oracle.World.of(config)
    seed, fed = config.seed, config.federation
    clients, w = range(fed.clients), world.start
    history: list[list[tuple[int, int, int]]] = [[] for _ in clients]
    memory: list[list[int]] = [[] for _ in clients]
    for task, held in enumerate(world.held):
        known = world.known[task]
        w = oracle.grown(w, world, len(known))
        for round_ in range(fed.rounds):
            sums, total = {n: torch.zeros_like(a) for n, a in w.items()}, 0
            for k in clients:
                if not held[k]:
                    continue
                name = (seed, "client", k, task, round_)
                own = {n: a.clone() for n, a in w.items()}
                velocity = {n: torch.zeros_like(a) for n, a in w.items()}
                take, queue, turn = min(size, len(memory[k])), [], 0
                for epoch in range(fed.epochs or 1):
                    order = counter.permutation(len(held[k]), *name, "order", epoch).tolist()
                    for at in range(0, len(order), fed.batch_size):
                        rows = [held[k][i] for i in order[at : at + fed.batch_size]]
                        if take:
                            if len(queue) < take:  # a pass over the memory ends with its last whole batch
                                passing = counter.permutation(len(memory[k]), *name, "source", 0, turn)
                                queue, turn = [memory[k][i] for i in passing.tolist()], turn + 1
                            rows, queue = rows + queue[:take], queue[take:]
                        own = oracle.leaves(own)
                        scores = oracle.logits(own, world.x[rows])
                        loss = oracle.cross_entropy(scores, [world.y[r] for r in rows], known)
                        grads = oracle.gradient(loss, own)
                        with torch.no_grad():
                            for n in own:
                                velocity[n] = config.optimiser.momentum * velocity[n] + grads[n]
                                own[n] = own[n] - config.optimiser.lr * velocity[n]
                for n in sums:
                    sums[n] += len(held[k]) * own[n].detach()
                total += len(held[k])
            w = {n: a / total for n, a in sums.items()}
        for k in clients:
            words = counter.words(len(held[k]), seed, "client", k, task, fed.rounds, "memory")
            history[k] += [(r, int(p) >> 1, world.y[r]) for r, p in zip(held[k], words, strict=True)]
            memory[k] = remembered(history[k], limit, policy)
    return w, memory


def memories(result: RunResult, clients: int) -> list[dict[str, torch.Tensor]]:
    """The last state of record of each client."""
    store = ClientStore(result.folder / "clients", 0)
    return [store.get(k, 10**6) for k in range(clients)]


@pytest.mark.parametrize(
    ("policy", "images", "size"),
    [("reservoir", 7, 0), ("class_balanced", 7, 3), ("reservoir", 1000, 5), ("class_balanced", 1, 0)],
)
def test_equals_a_literal_loop(tiny_config: Configure, oracle: ModuleType, policy: str, images: int, size: int) -> None:
    from fedcl.run import run

    overrides = {
        "strategy": ["replay"], "scenario.tasks": 3,
        "options.replay.budget": IMAGE * images + IMAGE - 1, "options.replay.policy": policy,
        "options.replay.batch_size": size, "partition.min_size": 0, "federation.epochs": 2,
    }  # fmt: skip
    config = tiny_config(overrides)
    result = run(config)
    model, memory = replay(oracle, config, images, policy, size or config.federation.batch_size)
    assert oracle.distance(oracle.final(result), model) < 1e-10
    for state, rows in zip(memories(result, 3), memory, strict=True):
        assert state["replay/ids"].tolist() == rows


def test_the_budget_is_never_exceeded_and_always_used(tiny_config: Configure) -> None:
    from fedcl.run import run

    config = tiny_config({"strategy": ["replay"], "options.replay.budget": 10 * IMAGE - 1})
    split = build(config).split
    for k, state in enumerate(memories(run(config), 3)):
        seen = sum(len(task[k]) for task in split.train)
        kept = state["replay/ids"]
        assert len(kept) == min(9, seen)
        assert len(set(kept.tolist())) == len(kept)
        assert set(kept.tolist()) <= set(np.concatenate([task[k] for task in split.train]).tolist())


def test_the_server_learns_only_how_many_images_are_stored(tiny: Run) -> None:
    result, plain = tiny({"strategy": ["replay"]}), tiny({"strategy": ["finetune"]})
    extra = result.summary["bytes_up"] - plain.summary["bytes_up"]
    assert extra == 2 * 3 * 8  # one int64 of each client after each task


def test_without_budget_it_is_finetune(tiny: Run, oracle: ModuleType) -> None:
    nothing = {"strategy": ["replay"], "options.replay.budget": IMAGE - 1}
    assert oracle.identical(oracle.final(tiny(nothing)), oracle.final(tiny({"strategy": ["finetune"]})))
    assert not oracle.identical(
        oracle.final(tiny({"strategy": ["replay"]})), oracle.final(tiny({"strategy": ["finetune"]}))
    )


def test_an_image_that_is_seen_in_several_tasks_takes_one_place(tiny: Run) -> None:
    overrides = {"strategy": ["cumulative", "replay"], "options.replay.budget": 30 * IMAGE}
    for state in memories(tiny(overrides), 3):
        kept = state["replay/ids"]
        assert len(set(kept.tolist())) == len(kept) == len(state["replay/priority"])


def test_a_client_that_is_not_sampled_remembers_all_the_same(tiny: Run) -> None:
    result = tiny({"strategy": ["replay"], "federation.participation": 0.34, "federation.rounds": 1})
    assert all(len(state["replay/ids"]) > 0 for state in memories(result, 3))


@pytest.mark.parametrize(
    "odd",
    [
        {"federation.batch_size": 1},
        {"federation.clients": 12, "partition.min_size": 0, "partition.alpha": 0.05, "data.limit": 4},
        {"data.limit": 1, "federation.clients": 2, "partition.min_size": 0},
        {"scenario.tasks": 10, "partition.min_size": 0},
    ],
    ids=["batch of one", "empty clients", "one sample a class", "one class a task"],
)
@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any], policy: str) -> None:
    result = tiny({"strategy": ["replay"], "options.replay.policy": policy, "federation.rounds": 1, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("key", "value"),
    [("budget", -1), ("budget", "much"), ("batch_size", -1), ("policy", "herding"), ("size", 3)],
)
def test_wrong_options(tiny: Run, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["replay"], f"options.replay.{key}": value})
    assert "\n" not in str(caught.value)
    assert "options.replay" in str(caught.value)
