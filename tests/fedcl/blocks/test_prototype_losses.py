"""Losses of learned prototypes against plain loops, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedcl.blocks.prototype_losses import attraction, relation_over_samples
from fedcl.models.prototypes import ClassPrototypes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attraction_moves_prototypes_alone() -> None:
    prototypes, features = normal(3, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    labels = torch.tensor([0, 2, 2, 0, 2])
    found = attraction(prototypes, features, labels)
    total = 0.0
    for f, c in zip(features.detach(), labels.tolist(), strict=True):
        p = prototypes[c]
        total = total + (1 - (p @ f) / (p @ p).sqrt() / (f @ f).sqrt()) / 5
    torch.testing.assert_close(found, total, rtol=1e-12, atol=0)
    moved, still = torch.autograd.grad(found, [prototypes, features], allow_unused=True)
    assert still is None
    torch.testing.assert_close(moved, torch.autograd.grad(total, prototypes)[0], rtol=0, atol=1e-12)
    assert not moved[1].any()
    assert moved[0].any()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_relation_over_samples_is_a_sum_of_divergences_of_old_classes(temperature: float) -> None:
    student, teacher = normal(6, 4).requires_grad_(), normal(6, 3, seed=1)
    old = torch.tensor([True, False, True, False])
    found = relation_over_samples(student, teacher, old, temperature)
    total = 0.0
    for c in (0, 2):
        target = [math.exp(float(t) / temperature) for t in teacher[:, c]]
        below = torch.stack([torch.exp(s / temperature) for s in student[:, c]]).sum()
        for i in range(6):
            p = target[i] / sum(target)
            total = total + p * (math.log(p) - torch.log(torch.exp(student[i, c] / temperature) / below))
    torch.testing.assert_close(found, total, rtol=1e-10, atol=0)
    slope, expected = (torch.autograd.grad(value, student)[0] for value in (found, total))
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-10)
    assert not slope[:, [1, 3]].any()


def test_a_relation_that_is_kept_or_of_a_single_sample_or_of_no_class_is_zero() -> None:
    teacher, old = normal(5, 2), torch.tensor([True, True])
    assert relation_over_samples(teacher.clone(), teacher, old).abs() < 1e-12
    assert relation_over_samples(normal(1, 2, seed=3), teacher[:1], old).abs() < 1e-12
    assert relation_over_samples(normal(5, 2, seed=3), teacher, ~old) == 0


def test_prototypes_of_a_class_start_the_same_whenever_it_comes() -> None:
    layer = ClassPrototypes(5)
    rows = layer.initial_rows("weight", [4, 9], 1)
    assert rows.shape == (2, 5)
    assert rows.abs().max() <= 5**-0.5
    assert torch.equal(layer.initial_rows("weight", [9], 1), rows[1:])
    assert layer.initial_rows("weight", [], 1).shape == (0, 5)
    layer.weight = torch.nn.Parameter(3 * rows)
    f = torch.ones(1, 5)
    torch.testing.assert_close(layer(f)[0], torch.stack([(p @ f[0]) / p.norm() for p in rows]))
