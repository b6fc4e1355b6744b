"""VICReg inside runs with and without labels; its loss is tested with the others between views."""

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


def bardes(z: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
    """The three terms as sums over single numbers."""
    n, width = len(z) // 2, z.shape[1]
    total = invariance * torch.stack([(z[k, i] - z[k + n, i]) ** 2 for k in range(n) for i in range(width)]).mean()
    for view in (z[:n], z[n:]):
        centred = [view[:, i] - sum(view[:, i]) / n for i in range(width)]
        for i in range(width):
            for j in range(width):
                entry = (centred[i] * centred[j]).sum() / (n - 1)
                if i != j:
                    total = total + covariance * entry**2 / width
                elif float(entry.detach()) + 1e-4 < 1:
                    total = total + variance / 2 * (1 - torch.sqrt(entry + 1e-4)) / width
    return total


def test_a_step_moves_by_the_gradient_of_the_loss(moves_by: Callable[..., None]) -> None:
    moves_by("vicreg", lambda z, w: bardes(z), 0.0)


def test_the_weights_of_the_terms_are_the_options(moves_by: Callable[..., None]) -> None:
    own = {"invariance": 3.0, "variance": 5.0, "covariance": 2.0}
    moves_by("vicreg", lambda z, w: bardes(z, **own), 1.0, {f"options.vicreg.{k}": v for k, v in own.items()})


def test_weight_zero_is_finetune_on_the_same_two_views(equals_two_views: Callable[[str], None]) -> None:
    equals_two_views("vicreg")


def test_without_labels_the_head_stays_as_it_was(tiny: Run, moved: Callable[[RunResult], set[str]]) -> None:
    found = moved(tiny({"strategy": ["vicreg"], "labels.rate": 0.0, "federation.rounds": 1, "optimiser.clip": 1.0}))
    assert not any(name.startswith("head.") for name in found)
    assert any(name.startswith("encoder.") for name in found)
    assert any(name.startswith("projector.") for name in found)


def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": ["vicreg"], "labels.rate": 0.5, "optimiser.clip": 1.0, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", -1.0), ("weight", math.inf), ("views", 0), ("views", 1), ("tau", 1.0), ("variance", -1.0)],
)
def test_wrong_options(tiny_config: Configure, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_config({"strategy": ["vicreg"], f"options.vicreg.{key}": value}))
    assert "\n" not in str(caught.value)
    assert "options.vicreg" in str(caught.value)


def test_one_image_a_step_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match=r"federation\.batch_size.*compares the images"):
        tiny({"strategy": ["vicreg"], "federation.batch_size": 1})
