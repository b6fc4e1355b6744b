"""FedEWC against a literal loop, against finetune_masked at weight 0, and at the edges."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.continual.fedewc import FedEWC


def _information(oracle: Any, w: Any, client: int, local: Any, fisher: str, cap: float) -> Any:
    """Mean squared gradient over a client's images (or its batches), capped."""
    world, rows = local.world, local.world.held[local.task][client]
    size = 1 if fisher == "sample" else world.config.federation.batch_size
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    total = {n: torch.zeros_like(a) for n, a in w.items()}
    for part in parts:
        leaves = oracle.leaves(w)
        loss = oracle.cross_entropy(oracle.logits(leaves, world.x[part]), [world.y[i] for i in part], local.known)
        for n, g in oracle.gradient(loss, leaves).items():
            total[n] += g**2 / len(parts)
    return {n: torch.minimum(a, torch.full_like(a, cap)) for n, a in total.items()}


def _method(oracle: Any, weight: float = 1000.0, cap: float = 1e-4, fisher: str = "sample", task: str = "new") -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        value = oracle.cross_entropy(oracle.logits(w, x), y, local.new if task == "new" else local.known)
        for n, f in local.memory.get("fisher", {}).items():
            before = local.memory["anchor"][n]
            # New rows of the head are not penalised.
            value = value + weight / 2 * (f * (w[n][: len(before)] - before) ** 2).sum()
        return value

    def end_task(w: Any, local: Any) -> Any:
        held = local.world.held[local.task]
        images = sum(len(rows) for rows in held)
        found = {n: torch.zeros_like(a) for n, a in w.items()}
        for client, rows in enumerate(held):
            if rows:
                for n, f in _information(oracle, w, client, local, fisher, cap).items():
                    found[n] += len(rows) / images * f
        share = len(local.old) / len(local.known)
        for n, f in local.memory.get("fisher", {}).items():
            # Rows of new classes have no old value to be averaged with.
            for row in local.old if n.startswith("head.") else range(len(f)):
                found[n][row] = share * f[row] + (1 - share) * found[n][row]
        local.memory.update(fisher=found, anchor=w)
        return w

    return oracle.Method(loss, end_task=end_task)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"scenario.tasks": 3}, {"weight": 20.0, "cap": 0.05}),
        (
            {"scenario.tasks": 3, "model.head_bias": False},
            {"weight": 5.0, "cap": 1.0, "fisher": "batch", "task": "known"},
        ),
        (
            {"federation.weighting": "uniform", "federation.participation": 0.67},
            {"cap": 1e-3, "weight": 500.0},
        ),
        ({"model.head_allocate": "all", "scenario.tasks": 3}, {"weight": 20.0, "cap": 0.05}),
    ],
    ids=["default", "three tasks", "batch", "uniform", "whole head"],
)  # fmt: skip
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {
        "strategy": ["fedewc"],
        "seed": 5,
        **settings,
        **{f"options.fedewc.{n}": v for n, v in options.items()},
    }
    expected = oracle.federated(tiny_config(settings), _method(oracle, **options))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_weight_zero_is_finetune_masked_bit_for_bit(tiny: Any, oracle: Any) -> None:
    zero = oracle.final(tiny({"strategy": ["fedewc"], "options.fedewc.weight": 0.0}))
    masked = oracle.final(tiny({"strategy": ["finetune_masked"]}))
    assert oracle.identical(zero, masked)
    assert oracle.distance(oracle.final(tiny({"strategy": ["fedewc"]})), masked) > 1e-4


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_evaluation_batches_do_not_change_the_training(tiny: Any, oracle: Any, fisher: str) -> None:
    settings = {"strategy": ["fedewc"], "options.fedewc.fisher": fisher, "options.fedewc.cap": 1.0}
    settings["options.fedewc.weight"] = 5.0
    one, other = (tiny({**settings, "evaluate.batch_size": size}) for size in (3, 1024))
    assert oracle.identical(oracle.final(one), oracle.final(other))


def test_term_and_its_gradient(oracle: Any) -> None:
    w, anchor = oracle.leaves(oracle.model(3, 2, 3, seed=0)), oracle.model(3, 2, 3, seed=1)
    fisher = {n: a.square() for n, a in oracle.model(3, 2, 3, seed=2).items()}
    down = {f"fisher/{n}": a for n, a in fisher.items()} | {f"anchor/{n}": a for n, a in anchor.items()}
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [2], known=[0, 1, 2], new=[2], down=down)

    def term(weight: float) -> Any:
        return FedEWC(FedEWC.Options(weight=weight)).loss(step)["penalty"]

    literal = sum((fisher[n] * (w[n] - anchor[n]) ** 2).sum() for n in w) / 2
    slope = (term(1e-3) - term(0.0)) / 1e-3
    assert slope.item() == pytest.approx(literal.item(), rel=1e-12)
    found = oracle.gradient(slope, w)
    assert all(torch.allclose(found[n], fisher[n] * (w[n] - anchor[n]), atol=1e-10) for n in w)


def test_no_term_before_the_first_end_of_task(oracle: Any) -> None:
    w = oracle.model(3, 2, 2, seed=0)
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [0], known=[0, 1], new=[0, 1], task=0)
    assert FedEWC().loss(step) == {}


def test_a_task_without_new_classes_counts_like_any_other(tiny_config: Any) -> None:
    model = build(tiny_config({})).node.model
    known, none = torch.tensor([True, True]), torch.tensor([False, False])
    server = SimpleNamespace(
        state={"fisher/head.bias": torch.tensor([3.0, 0.0])}, known=known, new=none, task=2, model=model
    )
    found: Any = FedEWC().running_mean(server, "fisher/head.bias", torch.tensor([0.0, 3.0]))  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([2.0, 1.0])


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {"strategy": ["fedewc"], **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, oracle.federated(tiny_config(settings), _method(oracle))) < 1e-10


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("simple_cnn", {}),
        ("mlp", {"model.norm": "batch", "federation.batch_min": 2}),
        ("mlp", {"model.head_allocate": "all", "model.head": "cosine"}),
    ],
)
def test_other_models(tiny: Any, oracle: Any, name: str, settings: dict[str, Any]) -> None:
    width = {"model.width": None, "model.depth": None} if name == "simple_cnn" else {}
    settings = {"model.name": name, **width, **settings, "data.limit": 4, "engine.dtype": "float32"}
    result = tiny({"strategy": ["fedewc"], "federation.rounds": 1, **settings})
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", -1),
        ("weight", "x"),
        ("cap", 0),
        ("cap", -2.0),
        ("fisher", "true"),
        ("task", "old"),
        ("lambda", 1),
    ],
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fedewc") as caught:
        build(tiny_config({"strategy": ["fedewc"], f"options.fedewc.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
