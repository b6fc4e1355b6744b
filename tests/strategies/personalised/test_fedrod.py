"""FedRoD: balanced softmax against sums by hand, and a whole run with both heads against a literal loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedcl.blocks.class_counts import balanced_softmax


def by_hand(logits: Any, labels: list[int], counts: list[int], classes: list[int]) -> Any:
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits, labels, strict=True):
        below = sum(max(counts[c], 1) * torch.exp(row[c]) for c in classes)
        total = total - torch.log(max(counts[label], 1) * torch.exp(row[label]) / below)
    return total / len(labels)


def test_balanced_softmax_is_its_formula(oracle: Any) -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    labels, counts, classes = [0, 1, 1, 0, 3], [7, 2, 0, 0], [0, 1, 3]
    mask = torch.tensor([True, True, False, True])
    found = balanced_softmax(logits, torch.tensor(labels), torch.tensor(counts), mask)
    wanted = by_hand(logits, labels, counts, classes)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    one, other = (torch.autograd.grad(v, logits)[0] for v in (found, wanted))
    assert torch.allclose(one, other, atol=1e-12)
    even = balanced_softmax(logits, torch.tensor(labels), torch.full((4,), 9), mask)
    assert even.item() == pytest.approx(oracle.cross_entropy(logits, labels, classes).item(), rel=1e-12)


def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, passes: Any, averaged: Any, kept: Any
) -> None:
    settings = {"strategy": ["fedrod"], "seed": 2}
    world = oracle.World.of(tiny_config(settings))
    names = {"extra.fedrod.personal.weight": "weight", "extra.fedrod.personal.bias": "bias"}
    w = {n: a for n, a in world.start.items() if n not in names}
    heads: dict[int, Any] = {}
    for task, known in enumerate(world.known):
        w = oracle.grown(w, world, len(known))
        for round_ in range(2):
            models = []
            for client, rows in enumerate(world.held[task]):
                empty = {"weight": torch.zeros(0, 8), "bias": torch.zeros(0)}
                old = heads.get(client, {n: a.double() for n, a in empty.items()})
                more = len(known) - len(old["bias"])
                own = {n: torch.cat([a, a.new_zeros(more, *a.shape[1:])]) for n, a in old.items()}
                if not rows:
                    continue
                counts = [sum(world.y[i] == c for i in rows) for c in range(len(known))]

                def loss(m: Any, x: Any, y: Any, known: Any = known, counts: Any = counts) -> Any:
                    scores = oracle.logits(m, x)
                    hidden = x @ m["encoder.1.weight"].T + m["encoder.1.bias"]
                    z = (hidden * (hidden > 0)).detach()
                    both = scores.detach() + z @ m["weight"].T + m["bias"]
                    return by_hand(scores, y, counts, known) + oracle.cross_entropy(both, y, known)

                trained = passes(world, client, task, {**w, **own}, loss, round_=round_)
                heads[client] = {n: trained[n] for n in own}
                models.append((float(len(rows)), trained))
            w = averaged(w, models)
    result = tiny(settings)
    found = {n: a for n, a in oracle.final(result).items() if n in w}
    assert oracle.distance(found, w) < 1e-10
    for client, arrays in kept(result, "private/").items():
        for name, short in names.items():
            assert torch.allclose(arrays[name], heads[client][short][: len(arrays[name])], atol=1e-10)
            assert arrays[name].any()


def test_the_global_model_predicts_with_the_generic_head(tiny: Any) -> None:
    settings = {"partition.test": "same_mix", "data.limit": 60, "partition.alpha": 0.1, "federation.epochs": 4}
    summary = tiny({"strategy": ["fedrod"], **settings}).summary
    assert summary["personal"]["average_accuracy"]["weighted_mean"] > summary["average_accuracy"]
    assert math.isfinite(summary["average_accuracy"])
