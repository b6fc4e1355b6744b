"""CL2R: the distillation against a loop, whole runs against the literal federated loop, the memory, and the edges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import feature_distillation
from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.run import RunResult
from fedcl.strategies.contrastive.cl2r import CL2R, most_of_each

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]

SIMPLEX = {"strategy": ["cl2r"], "model.head": "simplex", "model.head_allocate": "all", "model.width": 12}
ALONE = {**SIMPLEX, "federation.clients": 1, "partition.name": "iid", "federation.batch_size": 1000, "data.limit": 3}
"""One client whose steps see all its images and all its memory."""


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos, pair by pair."""
    total = torch.zeros((), dtype=student.dtype)
    for f, t in zip(student, teacher.detach(), strict=True):
        total = total + 1 - (f @ t) / (f.square().sum().sqrt() * t.square().sum().sqrt())
    return total / len(student)


def drawn(count: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=make, dtype=torch.float64, requires_grad=True)


def test_distillation_and_its_gradient() -> None:
    student, teacher = drawn(5, 0), drawn(5, 1)
    ours, theirs = feature_distillation(student, teacher), apart(student, teacher)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (one,) = torch.autograd.grad(ours, student, retain_graph=True)
    torch.testing.assert_close(one, torch.autograd.grad(theirs, student)[0], rtol=0, atol=1e-12)
    assert torch.autograd.grad(ours, teacher, allow_unused=True)[0] is None, "the teacher is not trained"
    assert bool(one.any())


def test_most_of_each_class() -> None:
    priority, labels = torch.tensor([5, 4, 3, 2, 1, 0]), torch.tensor([1, 0, 1, 0, 1, 2])
    for most in (1, 2, 9):
        expected: list[int] = []
        for label in range(3):
            own = sorted((int(p), i) for i, p in enumerate(priority) if labels[i] == label)
            expected += [i for _, i in own[:most]]
        assert most_of_each(priority, labels, most).tolist() == sorted(expected)
    assert most_of_each(priority[:0], labels[:0], 3).tolist() == []


def with_memory(oracle: ModuleType, memory: list[int], task: int = 1) -> Any:
    """A step of six images of five classes, the last two new, of which ``memory`` are the memory's."""
    w, previous = oracle.leaves(oracle.model(3, 2, 5, seed=0)), oracle.leaves(oracle.model(3, 2, 5, seed=1))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = oracle.step(
        w, x, [0, 1, 2, 3, 4, 3], known=[0, 1, 2, 3, 4], new=[3, 4], previous=previous, task=task
    )  # fmt: skip
    student, teacher = torch.nn.Linear(2, 3, dtype=torch.float64), torch.nn.Linear(2, 3, dtype=torch.float64)

    def models(x: Tensor, which: Any, mode: str, taps: Any = (), seed: Any = None) -> Any:
        found = oracle.step(w, x, [0] * len(x), known=[0], new=[0]).output
        return found._replace(features=(teacher if which == "stage:previous" else student)(x))

    names = {"cl2r": torch.tensor(memory, dtype=torch.int64)}
    batch = type("Rows", (), {"rows": staticmethod(names.__getitem__), "hidden": ()})()
    return replace(step, batch=batch, models=models), student, teacher


@pytest.mark.parametrize(("schedule", "share"), [("classes", math.sqrt(2 / 3)), ("constant", 1.0)])
def test_the_memory_alone_is_distilled(oracle: ModuleType, schedule: Any, share: float) -> None:
    step, student, teacher = with_memory(oracle, [0, 2])

    def term(weight: float) -> Tensor:
        return CL2R(CL2R.Options(weight=weight, schedule=schedule)).loss(step)["feature_distillation"]

    literal = share * apart(student(step.x[[0, 2]]), teacher(step.x[[0, 2]]))
    assert term(0.0).item() == 0
    slope = (term(1e-3) - term(0.0)) / 1e-3
    assert slope.item() == pytest.approx(literal.item(), rel=1e-10)
    expected = torch.autograd.grad(literal, student.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(slope, student.weight)[0], expected, rtol=0, atol=1e-10)
    assert torch.autograd.grad(term(1.0), teacher.weight, allow_unused=True)[0] is None


@pytest.mark.parametrize(("memory", "task"), [([], 1), ([0, 1], 0)], ids=["no memory", "first task"])
def test_without_memory_or_teacher_nothing_is_distilled(oracle: ModuleType, memory: list[int], task: int) -> None:
    assert CL2R().loss(with_memory(oracle, memory, task)[0]) == {}


def literal(oracle: ModuleType, vertices: Tensor, weight: float, schedule: str) -> Any:
    """All vertices in the softmax, all images of earlier tasks in every step, their features distilled."""

    def features(w: Any, x: Tensor) -> Tensor:
        hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
        return hidden * (hidden > 0)

    def loss(w: Any, x: Tensor, y: list[int], local: Any) -> Tensor:
        rows = [i for task in local.world.held[: local.task] for i in task[0]]
        images, labels = torch.cat([x, local.world.x[rows]]), [*y, *(local.world.y[i] for i in rows)]
        scores = features(w, images) @ vertices.T
        value: Tensor = oracle.cross_entropy(scores, labels, list(range(len(vertices))))
        if not rows:
            return value
        share = math.sqrt(len(local.new) / len(local.old)) if schedule == "classes" else 1.0
        old = local.world.x[rows]
        return value + weight * share * apart(features(w, old), features(local.previous, old))

    return oracle.Method(loss)


@pytest.mark.parametrize(
    ("settings", "weight", "schedule"),
    [({}, 5.0, "classes"), ({"scenario.tasks": 5}, 2.0, "classes"), ({}, 1.0, "constant")],
    ids=["as published", "five tasks", "constant"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Run, tiny_config: Configure, oracle: ModuleType, settings: dict[str, Any], weight: float, schedule: str
) -> None:
    settings = {
        **ALONE, **settings, "federation.epochs": 2,
        "options.cl2r": {"weight": weight, "schedule": schedule, "per_class": 0, "budget": 10**6},
    }  # fmt: skip
    found = oracle.final(tiny(settings))
    vertices = found.pop("head.weight")
    cosines = vertices @ vertices.T
    expected = torch.where(torch.eye(10, dtype=torch.bool), 1.0, -1 / 9)
    torch.testing.assert_close(cosines, expected.to(cosines.dtype), rtol=0, atol=1e-6)
    world = oracle.World.of(tiny_config(settings))
    world.start["head.weight"] = vertices
    model = oracle.federated(tiny_config(settings), literal(oracle, vertices, weight, schedule), world)
    assert torch.equal(model.pop("head.weight"), vertices)
    assert oracle.distance(found, model) < 1e-9


def test_a_memory_holds_few_images_of_each_class(tiny_config: Configure) -> None:
    from fedcl.run import run

    config = tiny_config({**SIMPLEX, "options.cl2r.per_class": 2})
    result, experiment = run(config), build(config)
    labels, store = experiment.node.store.label_tensor, ClientStore(result.folder / "clients", 0)
    for client in range(3):
        seen = Counter(int(labels[i]) for task in experiment.split.train for i in task[client])
        kept = Counter(labels[store.get(client, 10**6)["cl2r/ids"]].tolist())
        assert kept == {c: min(n, 2) for c, n in seen.items()}


def test_another_head_is_refused(tiny: Run, tiny_config: Configure) -> None:
    with pytest.raises(UsageError, match=r"model\.head") as caught:
        build(tiny_config({"strategy": ["cl2r"]}))
    assert "simplex" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"model\.head_allocate"):
        build(tiny_config({**SIMPLEX, "model.head_allocate": "as_seen"}))
    with pytest.raises(UsageError, match="10 classes need 9 features"):
        tiny({**SIMPLEX, "model.width": 8})


def test_hard_settings(tiny: Run, oracle: ModuleType, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({**SIMPLEX, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("name", "value"), [("weight", -1.0), ("weight", math.inf), ("per_class", -1), ("schedule", "step"), ("budget", -1)]
)
def test_wrong_options(tiny_config: Configure, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.cl2r") as caught:
        build(tiny_config({**SIMPLEX, f"options.cl2r.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
