"""MAS against a literal loop and Avalanche's plugin, and at the edges."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.continual.mas import squared_norm


def _importance(oracle: Any, w: Any, rows: list[int], local: Any, size: int) -> Any:
    """Mean absolute gradient of the squared output norm, over single images or batches."""
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    total = {n: torch.zeros_like(a) for n, a in w.items()}
    for part in parts:
        leaves = oracle.leaves(w)
        value = torch.zeros((), dtype=torch.float64)
        for row in oracle.logits(leaves, local.world.x[part]):
            value = value + sum(row[c] ** 2 for c in local.known) / len(part)
        for n, g in oracle.gradient(value, leaves).items():
            total[n] += g.abs()
    return total, len(parts)


def _method(oracle: Any, weight: float = 1.0, tasks: str = "mean", alpha: float = 0.5, measure: str = "sample",
            task: str = "new") -> Any:  # fmt: skip
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        value = oracle.cross_entropy(oracle.logits(w, x), y, local.new if task == "new" else local.known)
        for n, f in local.memory.get("importance", {}).items():
            before = local.memory["anchor"][n]
            value = value + weight * (f * (w[n][: len(before)] - before) ** 2).sum()  # new rows are free
        return value

    def end_task(w: Any, local: Any) -> Any:
        size = 1 if measure == "sample" else local.world.config.federation.batch_size
        parts = [_importance(oracle, w, rows, local, size) for rows in local.world.held[local.task] if rows]
        terms = sum(count for _, count in parts)
        found = {n: sum(total[n] for total, _ in parts) / terms for n in w}
        for n, f in local.memory.get("importance", {}).items():
            old = torch.zeros_like(found[n])
            old[: len(f)] = f
            found[n] = old + found[n] if tasks == "sum" else alpha * old + (1 - alpha) * found[n]
        local.memory.update(importance=found, anchor=w)
        return w

    return oracle.Method(loss, end_task=end_task)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"scenario.tasks": 3}, {}),
        ({"scenario.tasks": 3, "federation.weighting": "uniform"}, {"tasks": "sum", "weight": 0.3, "task": "known"}),
        ({"model.head_allocate": "all"}, {"measure": "batch", "alpha": 0.2}),
    ],
    ids=["default", "sum", "batch"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {"strategy": ["mas"], "seed": 5, **settings, **{f"options.mas.{n}": v for n, v in options.items()}}
    expected = oracle.federated(tiny_config(settings), _method(oracle, **options))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_importance_is_avalanches(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    plugins = pytest.importorskip("avalanche.training.plugins")
    settings = {
        "strategy": ["mas"], "options.mas.measure": "batch", "scenario.tasks": 1, "federation.clients": 1,
        "federation.rounds": 1,
    }  # fmt: skip
    checkpoint = load_newest(tiny(settings).folder / "checkpoints", lambda text: None)
    assert checkpoint is not None
    world = oracle.World.of(tiny_config(settings))
    w = {n.removeprefix("model/"): a for n, a in checkpoint.arrays.items() if n.startswith("model/")}
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)).double()
    names = {
        "0.weight": "encoder.1.weight",
        "0.bias": "encoder.1.bias",
        "2.weight": "head.weight",
        "2.bias": "head.bias",
    }
    model.load_state_dict({n: w[ours] for n, ours in names.items()})
    rows = world.held[0][0]
    images = [(world.x[i], world.y[i], 0) for i in rows]
    strategy = SimpleNamespace(
        model=model, experience=SimpleNamespace(dataset=images), device="cpu",
        train_mb_size=world.config.federation.batch_size, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    theirs = plugins.MASPlugin()._get_importance(strategy)
    for name, ours in names.items():
        found = checkpoint.arrays[f"strategy/mas/importance/{ours}"]
        assert torch.allclose(found, theirs[name].data.to(found.dtype), rtol=1e-6, atol=1e-9)
        assert bool((found > 0).any())


def test_the_norm_is_over_an_images_own_outputs() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 5.0]])
    own = torch.tensor([[True, True, False], [False, False, True]])
    assert squared_norm(logits, own).item() == pytest.approx((1 + 4 + 25) / 2)


def test_images_without_labels_count(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    common = {"strategy": ["mas"], "scenario.tasks": 1, "optimiser.lr": 1e-12, "federation.rounds": 1}
    full, few = (
        load_newest(tiny({**common, **more}).folder / "checkpoints", lambda text: None)
        for more in ({}, {"labels.rate": 0.5})
    )
    assert full is not None
    assert few is not None
    names = [n for n in full.arrays if n.startswith("strategy/mas/importance/")]
    assert names
    assert all(torch.allclose(full.arrays[n], few.arrays[n], rtol=1e-6) for n in names)


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["mas"], "federation.rounds": 1, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("name", "value"), [("weight", -1), ("alpha", 1.0), ("tasks", "max"), ("measure", "true"), ("cap", 1)]
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.mas") as caught:
        build(tiny_config({"strategy": ["mas"], f"options.mas.{name}": value}))
    assert "\n" not in str(caught.value)
