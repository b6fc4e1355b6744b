"""SimSiam inside runs; its loss is tested with the others between views."""

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
OWN = "extra.simsiam.predictor."


def normed(z: Tensor) -> Tensor:
    """BatchNorm over all rows."""
    mean = z.sum(dim=0) / len(z)
    return (z - mean) / torch.sqrt((z - mean).square().sum(dim=0) / len(z) + 1e-5)


def chen(z: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Row by row: each prediction against the other view, which has no gradient."""
    z, half = normed(z), len(z) // 2
    hidden = normed(z @ w[f"{OWN}0.weight"].T) * w[f"{OWN}1.weight"] + w[f"{OWN}1.bias"]
    q = torch.relu(hidden) @ w[f"{OWN}3.weight"].T + w[f"{OWN}3.bias"]
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        other = z[(i + half) % len(z)].detach()
        total = total - (q[i] @ other) / (q[i].square().sum().sqrt() * other.square().sum().sqrt())
    return total / len(z)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_step_moves_by_the_gradient_of_the_loss(rate: float, moves_by: Callable[..., None]) -> None:
    moves_by("simsiam", chen, rate)


def test_weight_zero_is_finetune_on_the_same_two_views(equals_two_views: Callable[[str], None]) -> None:
    equals_two_views("simsiam")


def test_the_predictor_is_trained_and_averaged(tiny: Run, moved: Callable[[RunResult], set[str]]) -> None:
    found = moved(tiny({"strategy": ["simsiam"], "labels.rate": 0.0, "federation.rounds": 1}))
    assert {f"{OWN}0.weight", f"{OWN}3.weight"} <= found
    assert any(name.startswith("encoder.") for name in found)
    assert not any(name.startswith("head.") for name in found)


@pytest.mark.parametrize(("hidden", "width"), [(None, 3), (7, 7)])
def test_the_predictor_is_as_wide_as_asked(tiny: Run, oracle: ModuleType, hidden: int | None, width: int) -> None:
    options = {"options.simsiam.hidden": hidden, "model.projector_dim": 12, "federation.rounds": 1}
    model = oracle.final(tiny({"strategy": ["simsiam"], **options}))
    assert model[f"{OWN}0.weight"].shape == (width, 12)
    assert model[f"{OWN}3.weight"].shape == (12, width)


def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": ["simsiam"], "labels.rate": 0.5, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", -1.0), ("weight", math.inf), ("views", 0), ("views", 1), ("hidden", 0), ("tau", 1.0)],
)
def test_wrong_options(tiny_config: Configure, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_config({"strategy": ["simsiam"], f"options.simsiam.{key}": value}))
    assert "\n" not in str(caught.value)
    assert "options.simsiam" in str(caught.value)


def test_a_model_without_projector_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match="projector"):
        tiny({"strategy": ["simsiam"], "model.projector": "none"})
