"""Federated averaging against a literal loop, a central torch loop, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.federated.finetune import FinetuneMasked, new_or_known


def _method(oracle: Any, name: str) -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        return oracle.cross_entropy(oracle.logits(w, x), y, local.known if name == "finetune" else local.new)

    return oracle.Method(loss)


@pytest.mark.parametrize("name", ["finetune", "finetune_masked"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"federation.weighting": "uniform", "model.head_bias": False},
        {"federation.participation": 0.67, "federation.epochs": 2, "optimiser.weight_decay": 0.05},
    ],
    ids=["plain", "uniform", "sampled"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, name: str, settings: dict[str, Any]
) -> None:
    settings = {"strategy": [name], "seed": 3, **settings}
    expected = oracle.federated(tiny_config(settings), _method(oracle, name))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_the_runs_compared_have_unequal_clients(tiny_config: Any, oracle: Any) -> None:
    world = oracle.World.of(tiny_config({"seed": 3}))
    assert all(len({len(rows) for rows in task}) > 1 for task in world.held)
    assert len(world.held) == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 0.0)])
def test_one_client_is_the_same_training_done_centrally(
    tiny: Any, tiny_config: Any, oracle: Any, dtype: str, tolerance: float
) -> None:
    settings = {"federation.clients": 1, "scenario.tasks": 1, "federation.rounds": 1, "engine.dtype": dtype}
    world = oracle.World.of(tiny_config(settings))
    kind = getattr(torch, dtype)
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).to(kind)
    start = oracle.grown(world.start, world, 10)
    with torch.no_grad():
        for parameter, name in zip(net.parameters(), start, strict=True):
            parameter.copy_(start[name])
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rows = torch.tensor(world.held[0][0])
    order = torch.from_numpy(counter.permutation(len(rows), 0, "client", 0, 0, 0, "order", 0))
    # Single precision is normalised in single precision, or the inputs would differ in their last bit.
    store = build(tiny_config(settings)).node.store
    for part in order.split(8):
        x, y = store.batch(rows[part], kind).flatten(1), torch.tensor(world.y)[rows[part]]
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    trained = {name: p.detach() for name, p in zip(start, net.parameters(), strict=True)}
    assert oracle.distance(oracle.final(tiny(settings)), trained) <= tolerance


def test_one_full_batch_step_does_not_depend_on_the_split(tiny: Any, oracle: Any) -> None:
    once = {"federation.rounds": 1, "federation.batch_size": 999}
    many, one = tiny({**once, "federation.clients": 4}), tiny({**once, "federation.clients": 1})
    assert oracle.distance(oracle.final(many), oracle.final(one)) < 1e-12


def test_both_losses_agree_in_the_first_task_only(tiny: Any, oracle: Any) -> None:
    def models(tasks: int) -> list[Any]:
        runs = (tiny({"strategy": [s], "scenario.tasks": tasks}) for s in ("finetune", "finetune_masked"))
        return [oracle.final(run) for run in runs]

    assert oracle.identical(*models(1))
    assert oracle.distance(*models(2)) > 1e-3


def test_a_sample_of_an_old_class_competes_among_all_known(oracle: Any) -> None:
    w = oracle.model(3, 2, 4, seed=0)
    x, y = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64), [0, 2, 1]
    step = oracle.step(w, x, y, known=[0, 1, 2], new=[2])
    assert new_or_known(step).tolist() == [
        [True, True, True, False], [False, False, True, False], [True, True, True, False],
    ]  # fmt: skip
    scores = oracle.logits(w, x)
    rows = [oracle.cross_entropy(scores[i : i + 1], [y[i]], [2] if y[i] == 2 else [0, 1, 2]) for i in range(3)]
    assert FinetuneMasked().task_loss(step).item() == pytest.approx(float(sum(rows)) / 3, abs=1e-12)


def test_a_stream_without_new_classes_uses_all_known(oracle: Any) -> None:
    w = oracle.model(3, 2, 2, seed=0)
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [1], known=[0, 1], new=[])
    assert new_or_known(step).tolist() == [[True, True]]


@pytest.mark.parametrize("name", ["finetune", "finetune_masked"])
def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any], name: str) -> None:
    settings = {"strategy": [name], **hard}
    expected = oracle.federated(tiny_config(settings), _method(oracle, name))
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, expected) < 1e-10


def test_options_are_refused(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.finetune\.mu=1.*") as caught:
        build(tiny_config({"options.finetune.mu": 1}))
    assert "\n" not in str(caught.value)
