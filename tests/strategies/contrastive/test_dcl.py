"""DCL inside runs with and without labels; its loss is tested with the others between views."""

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


def yeh(z: Tensor, temperature: float = 0.1) -> Tensor:
    """Row by row: the other rows of other images repel, the other view attracts."""
    unit, half = [row / row.square().sum().sqrt() for row in z], len(z) // 2
    total = torch.zeros((), dtype=z.dtype)
    for i, row in enumerate(unit):
        others = torch.stack([unit[k] for k in range(len(z)) if k % half != i % half])
        total = total - row @ unit[(i + half) % len(z)] / temperature
        total = total + torch.log(torch.exp(others @ row / temperature).sum())
    return total / len(z)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_step_moves_by_the_gradient_of_the_loss(rate: float, moves_by: Callable[..., None]) -> None:
    moves_by("dcl", lambda z, w: yeh(z), rate)


def test_weight_zero_is_finetune_on_the_same_two_views(equals_two_views: Callable[[str], None]) -> None:
    equals_two_views("dcl")


def test_the_weights_of_positives_change_the_step(tiny_config: Configure, oracle: ModuleType) -> None:
    common = {"strategy": ["dcl"], "federation.rounds": 1, "scenario.tasks": 1, "data.augment": ["crop(1)"]}
    models = [
        oracle.final(run(tiny_config({**common, **{f"options.dcl.{k}": v for k, v in options.items()}})))
        for options in ({}, {"weighting": "mises_fisher"}, {"weighting": "mises_fisher", "sigma": 0.1}, {"sigma": 0.1})
    ]
    assert oracle.distance(models[0], models[1]) > 1e-6
    assert oracle.distance(models[1], models[2]) > 1e-6
    assert oracle.identical(models[0], models[3])


def test_without_labels_the_head_stays_as_it_was(tiny: Run, moved: Callable[[RunResult], set[str]]) -> None:
    found = moved(tiny({"strategy": ["dcl"], "labels.rate": 0.0, "federation.rounds": 1}))
    assert not any(name.startswith("head.") for name in found)
    assert any(name.startswith("encoder.") for name in found)
    assert any(name.startswith("projector.") for name in found)


def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": ["dcl"], "labels.rate": 0.5, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -1.0), ("weight", math.inf), ("temperature", 0.0), ("sigma", 0.0), ("views", 0), ("views", 1),
        ("weighting", "fisher"), ("tau", 1.0),
    ],
)  # fmt: skip
def test_wrong_options(tiny_config: Configure, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_config({"strategy": ["dcl"], f"options.dcl.{key}": value}))
    assert "\n" not in str(caught.value)
    assert "options.dcl" in str(caught.value)


def test_one_image_a_step_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match=r"federation\.batch_size.*compares the images"):
        tiny({"strategy": ["dcl"], "federation.batch_size": 1})
    tiny({"strategy": ["dcl"], "federation.batch_size": 1, "options.dcl.weight": 0.0, "federation.rounds": 1})


def test_a_model_without_projector_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match="projector"):
        tiny({"strategy": ["dcl"], "model.projector": "none"})
