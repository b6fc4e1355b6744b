"""SI against a literal loop and Avalanche's plugin, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.continual.si import consolidated, work


class Literal:
    """Synaptic intelligence written out; what the clients do is weighed by their images."""

    def __init__(self, oracle: Any, weight: float, damping: float, task: str) -> None:
        self.oracle, self.weight, self.damping, self.task = oracle, weight, damping, task
        self.share = 0.0
        self.path: Any = {}
        self.start: Any = None
        self.last: Any = None
        self.method = oracle.Method(self.loss, self.after_step, self.end_task)

    def value(self, w: Any, x: Any, y: Any, local: Any) -> Any:
        value = self.oracle.cross_entropy(self.oracle.logits(w, x), y, local.new if self.task == "new" else local.known)
        for n, f in local.memory.get("importance", {}).items():
            before = self.start[n][: len(f)]
            value = value + self.weight * (f * (w[n][: len(f)] - before) ** 2).sum()  # new rows are free
        return value

    def loss(self, w: Any, x: Any, y: Any, local: Any) -> Any:
        if self.start is None:
            self.start, self.path = local.received, {n: torch.zeros_like(a) for n, a in local.received.items()}
        slopes = self.oracle.gradient(self.value(w, x, y, local), w)
        self.last = {n: (slopes[n], a.detach().clone()) for n, a in w.items()}
        return self.value(w, x, y, local)

    def after_step(self, w: Any) -> Any:
        for n, (slope, before) in self.last.items():
            self.path[n] += self.share * -slope * (w[n] - before)
        return w

    def end_task(self, w: Any, local: Any) -> Any:
        found = {}
        for n, path in self.path.items():
            moved = w[n] - self.start[n]
            found[n] = torch.maximum(path, torch.zeros_like(path)) / (moved**2 + self.damping)
            if n in local.memory.get("importance", {}):
                old = local.memory["importance"][n]
                found[n][: len(old)] += old
        local.memory["importance"] = found
        self.start = None
        return w


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"scenario.tasks": 3}, {}),
        ({"scenario.tasks": 3, "federation.clients": 1}, {"weight": 0.05, "damping": 0.05, "task": "known"}),
    ],
    ids=["three clients", "one client, as published"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, monkeypatch: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {"strategy": ["si"], "seed": 5, **settings, **{f"options.si.{n}": v for n, v in options.items()}}
    literal = Literal(oracle, **{"weight": 0.1, "damping": 0.1, "task": "new", **options})
    train = oracle.train

    def noted(client: int, round_: int, local: Any, method: Any) -> Any:
        held = local.world.held[local.task]
        literal.share = len(held[client]) / sum(map(len, held))
        return train(client, round_, local, method)

    monkeypatch.setattr(oracle, "train", noted)
    expected = oracle.federated(tiny_config(settings), literal.method)
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_importance_is_avalanches() -> None:
    plugins = pytest.importorskip("avalanche.training.plugins")
    theirs = plugins.SynapticIntelligencePlugin
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 2
    kept: Any = {"old_theta": {}, "new_theta": {}, "grad": {}, "trajectory": {}, "cum_trajectory": {}}
    anchor: Any = ({}, {})
    theirs.create_syn_data(model, anchor, kept, set())
    theirs.init_batch(model, anchor, kept, set())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    path = {n: torch.zeros_like(p) for n, p in start.items()}
    for _ in range(7):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), y))
        theirs.pre_update(model, kept, set())
        for p in model.parameters():
            assert p.grad is not None
            # Not in place: on a CPU Avalanche keeps views of the parameters, not copies.
            p.data = p.data - 0.3 * p.grad
        theirs.post_update(model, kept, set())
        for n, p in model.named_parameters():
            assert p.grad is not None
            path[n] = path[n] + work(p.grad, before[n], p.detach())
    theirs.update_ewc_data(model, anchor, kept, float("inf"), set(), 1.0, eps=0.1)
    positive = 0
    for n, p in model.named_parameters():
        found = consolidated(path[n], p.detach() - start[n], 0.1).flatten()
        # Avalanche keeps what is below zero.
        assert torch.allclose(found, anchor[1][n].data.to(found.dtype).clamp(min=0), rtol=1e-5, atol=1e-7)
        positive += int((found > 0).sum())
    assert positive


def test_images_seen_once_and_clients_sampled(tiny: Any, oracle: Any) -> None:
    settings = {"federation.passes": "once", "federation.participation": 0.34, "federation.rounds": 3}
    result = tiny({"strategy": ["si"], **settings})
    checkpoint = load_newest(result.folder / "checkpoints", lambda text: None)
    assert checkpoint is not None
    found = {n: a for n, a in checkpoint.arrays.items() if n.startswith("strategy/si/importance/")}
    assert all(bool((a >= 0).all()) and bool(a.isfinite().all()) for a in found.values())
    assert any(bool((a > 0).any()) for a in found.values())


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["si"], "federation.rounds": 1, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(("name", "value"), [("weight", -1), ("damping", 0.0), ("task", "old"), ("xi", 1)])
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.si") as caught:
        build(tiny_config({"strategy": ["si"], f"options.si.{name}": value}))
    assert "\n" not in str(caught.value)
