"""The feedback of OnPro: which classes are mixed how often, against the softmax it is drawn from, and the edges."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from fedcl.strategies.contrastive._feedback import confusable, mixed_labels, mixture


def test_confusable_pairs() -> None:
    prototypes = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    found = confusable(prototypes, torch.tensor([True, True, True, False]))
    expected = {(0, 1): 1 / 5, (1, 2): 1 / 5, (0, 2): 100.0}  # equal prototypes count as 0.01 apart
    for c in range(4):
        for other in range(4):
            assert found[c, other].item() == pytest.approx(expected.get((c, other), -math.inf))


def feedback(oracle: ModuleType, labels: list[int], present: list[bool], seed: int = 0, **given: float) -> Any:
    w = oracle.model(3, 2, 4, seed=0)
    step = oracle.step(w, torch.zeros(2, 2, dtype=torch.float64), [0, 1], known=[0, 1], new=[1])
    prototypes = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    numbers = {"base": 0.5, "chance": 0.6, "most": 0.6, "alpha": 0.4, **given}
    return mixture(
        replace(step, seed=torch.tensor(seed)), torch.tensor(labels), prototypes, torch.tensor(present), **numbers
    )


def test_confusable_classes_are_mixed_as_often_as_the_softmax_says(oracle: ModuleType) -> None:
    labels, pairs, zeros, shares = [0, 1, 2] * 100, Counter[tuple[int, int]](), 0, []
    for seed in range(20):
        found = feedback(oracle, labels, [True, True, True, False], seed, base=0.0)
        pairs.update((labels[i], labels[j]) for i, j in zip(found.first.tolist(), found.second.tolist(), strict=True))
        zeros += int((found.share == 0).sum())
        shares.append(found.share[found.share > 0])
    total = sum(pairs.values())
    below = sum(math.exp(s) for s in (1, 1 / 2, 1 / 3))
    for pair, score in (((0, 1), 1), ((1, 2), 1 / 2), ((0, 2), 1 / 3)):
        assert pairs.pop(pair) / total == pytest.approx(math.exp(score) / below, abs=0.02)
    assert not pairs
    assert zeros / total == pytest.approx(0.4, abs=0.02)
    share = torch.cat(shares)
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(0.25 / 1.8, abs=0.01)  # of Beta(0.4, 0.4)
    assert float((found.first * 1.0).std()) > 60, "all images of a class are drawn"


def test_the_rest_is_mixed_at_random(oracle: ModuleType) -> None:
    applied, largest = 0, 0.0
    for seed in range(200):
        found = feedback(oracle, [0, 1] * 10, [True, True, False, False], seed)
        assert found.first[:10].tolist() == list(range(10))
        assert sorted(found.second[:10].tolist()) == list(range(10))
        applied += bool(found.share[:10].any())
        largest = max(largest, float(found.share[:10].max()))
    assert applied / 200 == pytest.approx(0.6, abs=0.08)
    assert 0.58 < largest <= 0.6


def test_a_class_without_an_image_is_replaced_by_any(oracle: ModuleType) -> None:
    found = feedback(oracle, [0] * 20, [True, True, False, False], base=0.0, chance=1.0)
    assert len(set(found.second.tolist())) > 5
    assert set(mixed_labels(torch.zeros(20), torch.zeros(20), found.share, 4).tolist()) == {0}


@pytest.mark.parametrize("present", [[False] * 4, [True, False, False, False]], ids=["none", "one"])
def test_without_two_prototypes_no_classes_are_confused(oracle: ModuleType, present: list[bool]) -> None:
    found = feedback(oracle, [0, 1, 2, 0], present, chance=1.0)
    assert found.first.tolist() == [0, 1, 2, 3]
    assert found.share[2:].tolist() == [0, 0]
    assert bool(found.share[:2].any()) is any(present)
