"""Every loss against its equation written out as loops, values and gradients, and at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.losses import (
    cross_entropy,
    distillation,
    proximal,
    quadratic,
    supervised_contrastive,
    tempered_kl,
)


def _scores(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * drawn).to(dtype).requires_grad_()


def _agree(found: Tensor, literal: Tensor, leaf: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == ()
    assert found.item() == pytest.approx(literal.item(), rel=tolerance, abs=tolerance)
    (one,), (other,) = torch.autograd.grad(found, leaf), torch.autograd.grad(literal, leaf)
    assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def _mask(classes: list[int], width: int) -> Tensor:
    return torch.tensor([c in classes for c in range(width)])


@pytest.mark.parametrize("classes", [[0, 1, 2, 3, 4], [1, 3], [2]])
def test_cross_entropy(oracle: Any, classes: list[int]) -> None:
    logits = _scores(6, 5, seed=0)
    labels = [classes[i % len(classes)] for i in range(6)]
    found = cross_entropy(logits, torch.tensor(labels), _mask(classes, 5))
    _agree(found, oracle.cross_entropy(logits, labels, classes), logits)


def test_cross_entropy_with_a_mask_a_sample(oracle: Any) -> None:
    logits = _scores(2, 4, seed=1)
    masks = torch.stack([_mask([0, 2], 4), _mask([1, 2, 3], 4)])
    parts = [oracle.cross_entropy(logits[:1], [2], [0, 2]), oracle.cross_entropy(logits[1:], [3], [1, 2, 3])]
    _agree(cross_entropy(logits, torch.tensor([2, 3]), masks), (parts[0] + parts[1]) / 2, logits)


def test_cross_entropy_of_one_class_is_zero() -> None:
    logits = _scores(3, 4, seed=2)
    loss = cross_entropy(logits, torch.tensor([1, 1, 1]), _mask([1], 4))
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("classes", [[0, 1, 2], [1, 2], [0]])
def test_distillation(oracle: Any, classes: list[int], temperature: float) -> None:
    student, teacher = _scores(4, 5, seed=3), _scores(4, 3, seed=4)
    found = distillation(student, teacher, _mask(classes, 5), temperature)
    _agree(found, oracle.soft_cross_entropy(student, teacher, classes, temperature), student)
    assert torch.autograd.grad(found, teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
def test_tempered_kl(oracle: Any, temperature: float) -> None:
    student, teacher = _scores(4, 5, seed=5), _scores(4, 3, seed=6)
    soft = oracle.soft_cross_entropy(student, teacher, [0, 2], temperature)
    literal = temperature**2 * (soft - oracle.entropy(teacher, [0, 2], temperature))
    found = tempered_kl(student, teacher, _mask([0, 2], 5), temperature)
    _agree(found, literal, student, 1e-11)
    assert found.item() > 0
    wide = torch.zeros(4, 3, dtype=torch.float64)
    same = tempered_kl(torch.cat([teacher, wide], dim=1), teacher, _mask([0, 1, 2], 6), temperature)
    assert same.item() == pytest.approx(0.0, abs=1e-15)


def test_a_teacher_may_be_as_wide_as_the_student(oracle: Any) -> None:
    student, teacher = _scores(4, 5, seed=7), _scores(4, 5, seed=8)
    found = distillation(student, teacher, _mask([0, 1], 5), 2.0)
    _agree(found, oracle.soft_cross_entropy(student, teacher, [0, 1], 2.0), student)


def test_proximal() -> None:
    w, anchor = (
        {"a": _scores(2, 3, seed=9), "b": _scores(1, 4, seed=10)},
        {"a": _scores(2, 3, seed=11), "b": _scores(1, 4, seed=12)},
    )
    literal = (
        sum(((x - y) ** 2) for n in w for x, y in zip(w[n].flatten(), anchor[n].detach().flatten(), strict=True)) / 2
    )
    assert isinstance(literal, Tensor)
    _agree(proximal(w, {n: a.detach() for n, a in anchor.items()}), literal, w["a"])


def test_quadratic_leaves_parameters_without_importance_free() -> None:
    w = {"a": _scores(2, 3, seed=13), "b": _scores(1, 4, seed=14)}
    anchor, importance = (
        torch.ones(2, 3, dtype=torch.float64),
        torch.arange(6, dtype=torch.float64).reshape(2, 3),
    )
    literal = sum(importance[i, j] * (w["a"][i, j] - 1.0) ** 2 for i in range(2) for j in range(3)) / 2
    assert isinstance(literal, Tensor)
    found = quadratic(w, {"a": anchor}, {"a": importance})
    _agree(found, literal, w["a"])
    assert torch.autograd.grad(quadratic(w, {"a": anchor}, {"a": importance}), w["b"], allow_unused=True) == (None,)


def _supcon(embeddings: Tensor, labels: list[int], temperature: float) -> Tensor:
    unit = [row / torch.sqrt((row * row).sum()) for row in embeddings]
    total, anchors = torch.zeros((), dtype=embeddings.dtype), 0
    for i in range(len(labels)):
        positives = [p for p in range(len(labels)) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        anchors += 1
        below = sum(torch.exp(unit[i] @ unit[a] / temperature) for a in range(len(labels)) if a != i)
        for p in positives:
            total = total - torch.log(torch.exp(unit[i] @ unit[p] / temperature) / below) / len(positives)
    return total / anchors


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2], [0, 0, 0], [0, 1, 2, 0], [3, 3]])
def test_supervised_contrastive(labels: list[int], temperature: float) -> None:
    embeddings = _scores(len(labels), 4, seed=15)
    found = supervised_contrastive(embeddings, torch.tensor(labels), temperature)
    _agree(found, _supcon(embeddings, labels, temperature), embeddings, 1e-10)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_supervised_contrastive_without_a_positive_is_zero(labels: list[int]) -> None:
    embeddings = _scores(len(labels), 4, seed=16)
    loss = supervised_contrastive(embeddings, torch.tensor(labels))
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, embeddings)[0].any()


def test_supervised_contrastive_survives_zero_and_equal_embeddings() -> None:
    embeddings = torch.zeros(4, 3, requires_grad=True)
    loss = supervised_contrastive(embeddings, torch.tensor([0, 0, 1, 1]), 0.07)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
    assert torch.autograd.grad(loss, embeddings)[0].isfinite().all()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(scale: float) -> None:
    student = torch.tensor([[scale, -scale, 0.0], [0.0, scale, scale]], requires_grad=True)
    teacher = torch.tensor([[-scale, scale], [scale, 0.0]])
    mask = torch.tensor([True, True, False])
    for loss in (
        cross_entropy(student, torch.tensor([1, 0]), mask),
        distillation(student, teacher, mask, 0.5),
        tempered_kl(student, teacher, mask, 2.0),
    ):
        assert loss.isfinite()
        assert loss.item() >= 0
        assert torch.autograd.grad(loss, student)[0].isfinite().all()
