"""Barlow Twins inside runs with and without labels; its loss is tested with the others between views."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.run import RunResult, run

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]


def zbontar(z: Tensor, redundancy: float) -> Tensor:
    """The correlation matrix entry by entry."""
    n, width = len(z) // 2, z.shape[1]

    def standardised(column: Tensor) -> Tensor:
        mean = sum(column) / n
        return (column - mean) / torch.sqrt(sum((v - mean) ** 2 for v in column) / n + 1e-5)

    total = torch.zeros((), dtype=z.dtype)
    for i in range(width):
        for j in range(width):
            c = (standardised(z[:n, i]) * standardised(z[n:, j])).sum() / n
            total = total + ((c - 1) ** 2 if i == j else redundancy * c**2)
    return total


@pytest.mark.parametrize(("rate", "own"), [(0.0, {}), (1.0, {"options.barlow_twins.redundancy": 0.5})])
def test_a_step_moves_by_the_gradient_of_the_loss(
    rate: float, own: dict[str, float], moves_by: Callable[..., None]
) -> None:
    redundancy = own.get("options.barlow_twins.redundancy", 5e-3)
    moves_by("barlow_twins", lambda z, w: zbontar(z, redundancy), rate, own)


def test_weight_zero_is_finetune_on_the_same_two_views(equals_two_views: Callable[[str], None]) -> None:
    equals_two_views("barlow_twins")


def test_without_labels_the_head_stays_as_it_was(tiny: Run, moved: Callable[[RunResult], set[str]]) -> None:
    found = moved(
        tiny({"strategy": ["barlow_twins"], "labels.rate": 0.0, "federation.rounds": 1, "optimiser.clip": 1.0})
    )
    assert not any(name.startswith("head.") for name in found)
    assert any(name.startswith("encoder.") for name in found)
    assert any(name.startswith("projector.") for name in found)


def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": ["barlow_twins"], "labels.rate": 0.5, "optimiser.clip": 1.0, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", -1.0), ("weight", math.inf), ("views", 0), ("views", 1), ("tau", 1.0), ("redundancy", -1.0)],
)
def test_wrong_options(tiny_config: Configure, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_config({"strategy": ["barlow_twins"], f"options.barlow_twins.{key}": value}))
    assert "\n" not in str(caught.value)
    assert "options.barlow_twins" in str(caught.value)


def test_one_image_a_step_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match=r"federation\.batch_size.*compares the images"):
        tiny({"strategy": ["barlow_twins"], "federation.batch_size": 1})
