"""GDumb against literal loops: its rates, its boxes, the training on the memories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.models.model import Output
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.continual.gdumb import MEMORY, GDumb, box, restarts

IMAGE = 64
"""Bytes of a digit."""


def _evaluated(result: Any) -> dict[str, torch.Tensor]:
    checkpoint = load_newest(result.folder / "checkpoints", lambda text: None)
    assert checkpoint is not None
    return {n.removeprefix("evaluated/"): a for n, a in checkpoint.arrays.items() if n.startswith("evaluated/")}


def test_rates_are_those_of_warm_restarts() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimiser, T_0=1, T_mult=2, eta_min=0.0005)
    for turn in range(20):
        assert 0.05 * restarts(turn) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimiser.step()
        scheduler.step()


def _literal_box(height: int, width: int, share: float, y: float, x: float) -> list[list[bool]]:
    tall, wide = int(height * share**0.5), int(width * share**0.5)
    top, left = int(height * y), int(width * x)
    return [
        [top - tall // 2 <= r < top + tall // 2 and left - wide // 2 <= c < left + wide // 2 for c in range(width)]
        for r in range(height)
    ]


def test_boxes_are_those_of_plain_loops() -> None:
    areas = set()
    for at in range(30):
        share, y, x = counter.uniform(3, 0, "boxes", at).tolist()
        found = box((8, 6), torch.tensor(share), torch.tensor([y, x]))
        assert found.tolist() == _literal_box(8, 6, share, y, x)
        areas.add(int(found.sum()))
    assert len(areas) > 5
    assert not box((8, 6), torch.tensor(0.0), torch.tensor([0.5, 0.5])).any()


@pytest.mark.parametrize("probability", [0.0, 0.6])
def test_loss_of_a_mixed_batch_equals_plain_loops(oracle: Any, probability: float) -> None:
    w = oracle.model(3, 24, 4, seed=0)
    images = torch.randn(5, 1, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = [0, 2, 3, 1, 2]
    plain = oracle.step(w, images.flatten(1), labels, known=[0, 1, 2, 3], new=[2, 3])

    def models(x: Any, which: Any, mode: str, taps: Any = (), seed: Any = None) -> Output:
        return Output(x.flatten(1), None, oracle.logits(w, x.flatten(1)), {})

    strategy = GDumb(GDumb.Options(cutmix=probability))
    mixed = 0
    for turn in range(12):
        step = replace(
            plain, x=images, models=models, phase=MEMORY, down={"turn": torch.tensor(turn)}, cache={},
        )  # fmt: skip
        u = counter.counter_uniform(torch.tensor(turn), counter.fold("cutmix"), (9,), torch.float64).tolist()
        order = sorted(range(5), key=lambda i: u[4 + i])
        inside = _literal_box(4, 6, u[0], u[1], u[2]) if u[3] < probability else [[False] * 6] * 4
        x, part = images.clone(), sum(map(sum, inside)) / 24
        for i in range(5):
            for r in range(4):
                for c in range(6):
                    if inside[r][c]:
                        x[i, 0, r, c] = images[order[i], 0, r, c]
        scores, everything = oracle.logits(w, x.flatten(1)), [0, 1, 2, 3]
        expected = (1 - part) * oracle.cross_entropy(scores, labels, everything)
        expected = expected + part * oracle.cross_entropy(scores, [labels[i] for i in order], everything)
        assert strategy.task_loss(step).item() == pytest.approx(expected.item(), rel=1e-10)
        mixed += part > 0
    assert (mixed > 0) == (probability > 0)


def _literal(oracle: Any, config: Any, memories: list[list[int]], rounds: int, epochs: int) -> Any:
    """Federated training from scratch on the memories, weighed by their images."""
    world = oracle.World.of(config)
    task = len(world.known) - 1
    w = oracle.grown(world.start, world, len(world.known[task]))
    for turn in range(rounds):
        sums = {n: torch.zeros_like(a) for n, a in w.items()}
        for k, kept in enumerate(memories):
            name = (config.seed, "client", k, task, config.federation.rounds)
            rows = [kept[i] for i in counter.permutation(len(kept), *name, MEMORY, turn).tolist()]
            own, velocity = dict(w), {n: torch.zeros_like(a) for n, a in w.items()}
            for epoch in range(epochs):
                order = counter.permutation(len(rows), *name, "order", epoch).tolist()
                for at in range(0, len(rows), config.federation.batch_size):
                    batch = [rows[i] for i in order[at : at + config.federation.batch_size]]
                    leaves = oracle.leaves(own)
                    scores = oracle.logits(leaves, world.x[batch])
                    loss = oracle.cross_entropy(scores, [world.y[r] for r in batch], world.known[task])
                    for n, g in oracle.gradient(loss, leaves).items():
                        velocity[n] = config.optimiser.momentum * velocity[n] + g
                        own[n] = own[n] - config.optimiser.lr * restarts(turn) * velocity[n]
            for n in sums:
                sums[n] += len(rows) / sum(map(len, memories)) * own[n]
        w = sums
    return w


def test_training_on_the_memories_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {
        "strategy": ["gdumb"], "options.gdumb.budget": 13 * IMAGE, "options.gdumb.rounds": 3,
        "options.gdumb.epochs": 2, "options.gdumb.cutmix": 0.0,
    }  # fmt: skip
    result, config = tiny(settings), tiny_config(settings)
    store, world = ClientStore(result.folder / "clients", 0), oracle.World.of(config)
    memories = [store.get(k, 10**6)["gdumb/ids"].tolist() for k in range(3)]
    for k, rows in enumerate(memories):
        seen = [r for task in world.held for r in task[k]]
        held = {c: sum(world.y[r] == c for r in rows) for c in {world.y[r] for r in seen}}
        there = {c: sum(world.y[r] == c for r in seen) for c in held}
        assert len(rows) == min(13, len(seen))
        # A class has fewer only where the client has no more of it.
        assert all(n >= max(held.values()) - 1 or n == there[c] for c, n in held.items())
    found = _evaluated(result)
    assert oracle.distance(found, _literal(oracle, config, memories, 3, 2)) < 1e-10
    # The model of the rounds stays the initial one, so that each task starts afresh.
    assert oracle.identical(oracle.final(result), oracle.grown(world.start, world, 10))


def test_mixing_changes_what_is_learned(tiny: Any, oracle: Any) -> None:
    short = {"strategy": ["gdumb"], "options.gdumb.rounds": 1, "options.gdumb.epochs": 1}
    mixed, plain = (_evaluated(tiny({**short, "options.gdumb.cutmix": p})) for p in (1.0, 0.0))
    assert oracle.distance(mixed, plain) > 1e-4


def test_images_seen_once_are_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="train on them at the end of the task") as caught:
        tiny({"strategy": ["gdumb"], "federation.passes": "once"})
    assert "\n" not in str(caught.value)


def test_no_room_for_an_image_is_said(tiny: Any) -> None:
    with pytest.raises(UsageError, match="at least the 64 bytes that one image takes") as caught:
        tiny({"strategy": ["gdumb"], "options.gdumb.budget": IMAGE - 1})
    assert "\n" not in str(caught.value)


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    short = {"strategy": ["gdumb"], "federation.rounds": 1, "options.gdumb.rounds": 1, "options.gdumb.epochs": 1}
    found = _evaluated(tiny({**short, **hard}))
    assert found
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("name", "value"), [("budget", 0), ("rounds", 0), ("epochs", 0), ("cutmix", 1.1), ("policy", "herding")]
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.gdumb") as caught:
        build(tiny_config({"strategy": ["gdumb"], f"options.gdumb.{name}": value}))
    assert "\n" not in str(caught.value)


def test_a_schedule_of_the_run_is_refused(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match=r"optimiser\.schedule.*constant"):
        build(tiny_config({"strategy": ["gdumb"], "optimiser.schedule": "cosine"}))
