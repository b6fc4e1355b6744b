"""COCONUT: its contrast against loops over rehearsal images, whole runs against the literal loop, and the edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import rehearsal_contrast
from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.run import RunResult
from fedcl.strategies.contrastive.coconut import COCONUT

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]
Features = Callable[[Any, Tensor], Tensor]

ALONE = {
    "strategy": ["coconut"], "model.projector": "linear", "model.projector_dim": 4, "federation.clients": 1,
    "partition.name": "iid", "federation.batch_size": 1000, "data.limit": 3, "options.coconut.views": 1,
    "options.coconut.budget": 10**6,
}  # fmt: skip
"""One client whose steps see all its images and all its memory, once."""


def unit(rows: Tensor) -> list[Tensor]:
    return [row / row.square().sum().sqrt() for row in rows]


def nspt(student: Tensor, teacher: Tensor, labels: list[int], memory: list[int], tau: float, variant: str) -> Tensor:
    """The sum over rehearsal images k, term by term."""
    zs, zt = unit(student), unit(teacher.detach())
    positives, negatives = {"nspt": (zt, zs), "ntpt": (zt, zt), "scl": (zs, zs)}[variant]
    total = torch.zeros((), dtype=student.dtype)
    for k in memory:
        own = [p for p in memory if labels[p] == labels[k] and (variant != "scl" or p != k)]
        if not own:
            continue
        near = {p: torch.exp(zs[k] @ positives[p] / tau) for p in own}
        far = [torch.exp(zs[k] @ negatives[i] / tau) for i in range(len(labels)) if labels[i] != labels[k]]
        below = torch.stack([*near.values(), *far]).sum()
        for p in own:
            total = total - torch.log(near[p] / below) / len(own)
    return total


def supcon(embeddings: Tensor, labels: list[int], tau: float) -> Tensor:
    """Mean over anchors with a positive."""
    z, found = unit(embeddings), []
    for i in range(len(z)):
        own = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        below = [torch.exp(z[i] @ z[a] / tau) for a in range(len(z)) if a != i]
        if own:
            logs = [torch.log(torch.exp(z[i] @ z[p] / tau) / torch.stack(below).sum()) for p in own]
            found.append(-torch.stack(logs).mean())
    return torch.stack(found).mean() if found else torch.zeros((), dtype=embeddings.dtype)


def made(oracle: ModuleType, labels: list[int], memory: list[int], task: int = 1) -> tuple[Any, Tensor, Tensor]:
    """A step whose student and teacher are linear maps, and their weights."""
    make = torch.Generator().manual_seed(3)
    x, student, teacher = (
        torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_()
        for shape in ((len(labels), 3), (4, 3), (4, 3))
    )
    w = oracle.model(3, 3, 6, seed=0)
    step = oracle.step(w, x.detach(), labels, known=[0, 1, 2, 3, 4, 5], new=[4, 5], task=task)

    def models(x: Tensor, which: Any, mode: str, taps: Any = (), seed: Any = None) -> Any:
        output = oracle.step(w, x, [0] * len(x), known=[0], new=[0]).output
        return output._replace(embeddings=x @ (teacher if which == "stage:previous" else student).T)

    names = {"coconut": torch.tensor(memory, dtype=torch.int64)}
    names["stream"] = torch.tensor([i for i in range(len(labels)) if i not in memory], dtype=torch.int64)
    batch = type("Rows", (), {"rows": staticmethod(names.__getitem__), "hidden": ()})()
    return replace(step, batch=batch, models=models), student, teacher


CASES = {
    "mixed": ([4, 5, 4, 0, 1, 0, 2], [3, 4, 5, 6]),
    "one class": ([1, 1, 1, 1], [2, 3]),
    "one rehearsal image": ([4, 5, 0], [2]),
    "old class in the stream": ([0, 4, 0, 1], [2, 3]),
}


@pytest.mark.parametrize("variant", ["nspt", "ntpt", "scl"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_contrast_is_the_loop_over_rehearsal_images(
    oracle: ModuleType, case: tuple[list[int], list[int]], variant: Any
) -> None:
    labels, memory = case
    step, student, teacher = made(oracle, labels, memory)

    def term(weight: float) -> Tensor:
        return COCONUT(COCONUT.Options(weight=weight, variant=variant, temperature=0.5)).loss(step)["rehearsal"]

    expected = nspt(step.x @ student.T, step.x @ teacher.T, labels, memory, 0.5, variant)
    assert term(0.0).item() == 0
    slope = (term(1e-2) - term(0.0)) / 1e-2
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-12)
    (one,) = torch.autograd.grad(slope, student, retain_graph=True)
    other = torch.autograd.grad(expected, student)[0] if expected.requires_grad else torch.zeros_like(one)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert torch.autograd.grad(slope, teacher, allow_unused=True)[0] is None, "the teacher is not trained"
    assert bool(one.any()) or variant == "scl"


def test_the_stream_alone_is_aligned(oracle: ModuleType) -> None:
    labels, memory = CASES["mixed"]
    step, student, _ = made(oracle, labels, memory)

    def term(weight: float) -> Tensor:
        return COCONUT(COCONUT.Options(alignment=weight)).loss(step)["alignment"]

    expected = supcon((step.x @ student.T)[:3], labels[:3], 0.1)
    torch.testing.assert_close((term(0.5) - term(0.0)) / 0.5, expected, rtol=1e-10, atol=0)
    assert expected.item() > 0


def test_old_share(oracle: ModuleType) -> None:
    step, _, _ = made(oracle, *CASES["mixed"])  # four of six classes are old
    constant, shared = (
        COCONUT(COCONUT.Options(schedule=name)).loss(step)["rehearsal"].item() for name in ("constant", "old_share")
    )
    assert shared == pytest.approx(constant * 4 / 6, rel=1e-12)
    assert constant > 0


@pytest.mark.parametrize(("memory", "task"), [([], 1), ([0, 1], 0)], ids=["no memory", "first task"])
def test_without_memory_or_teacher_there_is_no_rehearsal(oracle: ModuleType, memory: list[int], task: int) -> None:
    assert set(COCONUT().loss(made(oracle, [0, 0, 1], memory, task)[0])) == {"alignment"}


def test_stacked_clients_are_the_same_as_one_by_one() -> None:
    make = torch.Generator().manual_seed(5)
    z, u, v = (torch.randn(3, n, 4, generator=make, dtype=torch.float64) for n in (4, 4, 6))
    own, all_ = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1, 2, 3]] * 3)

    def one(z: Tensor, u: Tensor, v: Tensor, own: Tensor, other: Tensor) -> Tensor:
        return rehearsal_contrast(z, u, v, own[:, None] == own, own[:, None] != other)

    alone = torch.stack([one(*lane) for lane in zip(z, u, v, own, all_, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(z, u, v, own, all_), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "variant"),
    [({}, "nspt"), ({"scenario.tasks": 5}, "ntpt")],
    ids=["two tasks", "five tasks, ntpt"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Run, tiny_config: Configure, oracle: ModuleType, settings: dict[str, Any], variant: str
) -> None:
    settings = {**ALONE, **settings, "federation.epochs": 2, "options.coconut.variant": variant}

    def embed(w: Any, x: Tensor) -> Tensor:
        hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
        return hidden * (hidden > 0) @ w["projector.weight"].T + w["projector.bias"]

    def loss(w: Any, x: Tensor, y: list[int], local: Any) -> Tensor:
        rows = [i for task in local.world.held[: local.task] for i in task[0]]
        images, labels = torch.cat([x, local.world.x[rows]]), [*y, *(local.world.y[i] for i in rows)]
        value: Tensor = oracle.cross_entropy(oracle.logits(w, images), labels, local.known)
        value = value + supcon(embed(w, x), y, 0.1)
        if not rows:
            return value
        memory = list(range(len(y), len(labels)))
        return value + 0.1 * nspt(embed(w, images), embed(local.previous, images), labels, memory, 0.1, variant)

    expected = oracle.federated(tiny_config(settings), oracle.Method(loss))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-9


def test_without_its_terms_it_is_replay_on_the_same_views(tiny: Run, oracle: ModuleType) -> None:
    common = {"model.projector": "linear", "model.projector_dim": 4}
    none = {f"options.coconut.{n}": v for n, v in {"weight": 0.0, "alignment": 0.0, "views": 1}.items()}
    replay = oracle.final(tiny({"strategy": ["replay"], **common}))
    assert oracle.distance(oracle.final(tiny({"strategy": ["coconut"], **none, **common})), replay) < 1e-12
    assert oracle.distance(oracle.final(tiny({"strategy": ["coconut"], **common})), replay) > 1e-3


def test_hard_settings(tiny: Run, oracle: ModuleType, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["coconut"], "model.projector_dim": 8, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1.0), ("alignment", math.inf), ("temperature", 0.0), ("views", 0), ("variant", "psnt"), ("tau", 1)],
)
def test_wrong_options(tiny_config: Configure, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.coconut") as caught:
        build(tiny_config({"strategy": ["coconut"], f"options.coconut.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_projector_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match="projector"):
        tiny({"strategy": ["coconut"], "model.projector": "none"})
