"""Losses of lightly and pytorch-metric-learning between views inside runs, against loops over rows."""

from __future__ import annotations

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


def unit(z: Tensor) -> Tensor:
    return z / z.square().sum(dim=1, keepdim=True).sqrt()


def contrasted(z: Tensor, temperature: float, decoupled: bool) -> Tensor:
    """Row by row, the other view against all other rows; ``decoupled`` leaves it out of the denominator."""
    scores, half, total = unit(z) @ unit(z).T / temperature, len(z) // 2, torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        other = (i + half) % len(z)
        below = [torch.exp(scores[i, k]) for k in range(len(z)) if k != i and not (decoupled and k == other)]
        total = total - scores[i, other] + torch.log(torch.stack(below).sum())
    return total / len(z)


@pytest.mark.parametrize(
    ("loss", "temperature", "decoupled"),
    [
        ("pytorch_metric_learning.losses.NTXentLoss", 0.3, False),
        ("lightly.loss.NTXentLoss", 0.3, False),
        ("lightly.loss.DCLLoss", 0.2, True),
    ],
)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_step_moves_by_the_gradient_of_the_loss(
    loss: str, temperature: float, decoupled: bool, rate: float, moves_by: Callable[..., None]
) -> None:
    pytest.importorskip(loss.partition(".")[0], reason=f"{loss.partition('.')[0]} is not installed")
    own = {"options.view_loss.loss": loss, "options.view_loss.arguments": {"temperature": temperature}}
    moves_by("view_loss", lambda z, w: contrasted(z, temperature, decoupled), rate, own)


@pytest.mark.parametrize(("loss", "own"), [("BarlowTwinsLoss", "barlow_twins"), ("VICRegLoss", "vicreg")])
def test_lightlys_losses_train_as_ours(loss: str, own: str, tiny: Run, oracle: ModuleType) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    common = {
        "labels.rate": 0.0, "data.augment": ["crop(1)"], "federation.rounds": 1, "optimiser.clip": 1.0,
        "model.projector_dim": 6,
    }  # fmt: skip
    theirs = tiny({"strategy": ["view_loss"], "options.view_loss.loss": f"lightly.loss.{loss}", **common})
    assert oracle.distance(oracle.final(theirs), oracle.final(tiny({"strategy": [own], **common}))) < 1e-9


def test_weight_zero_is_finetune_on_the_same_two_views(equals_two_views: Callable[[str], None]) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    equals_two_views("view_loss")


def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    result = tiny({"strategy": ["view_loss"], "labels.rate": 0.5, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"loss": "lightly.loss.NTXentLos"}, "Did you mean"),
        ({"loss": "lightly.loss.SwaVLoss"}, "needs other inputs"),
        ({"loss": "lightly.loss.NTXentLoss", "arguments": {"memory_bank_size": [8, 128]}}, "keeps a memory"),
        ({"loss": "pytorch_metric_learning.losses.CrossBatchMemory"}, "cannot be made of these arguments"),
        ({"views": 1}, "views"),
        ({"weight": -1.0}, "weight"),
    ],
)
def test_wrong_options(tiny_config: Configure, own: dict[str, Any], says: str) -> None:
    package = str(own.get("loss", "")).partition(".")[0]
    if package:
        pytest.importorskip(package, reason=f"{package} is not installed")
    with pytest.raises(UsageError, match=says) as caught:
        run(tiny_config({"strategy": ["view_loss"], **{f"options.view_loss.{k}": v for k, v in own.items()}}))
    assert "\n" not in str(caught.value)
    assert "options.view_loss" in str(caught.value)


def test_one_image_a_step_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match=r"federation\.batch_size.*compares the images"):
        tiny({"strategy": ["view_loss"], "federation.batch_size": 1})
