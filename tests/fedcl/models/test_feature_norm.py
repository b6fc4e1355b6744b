"""Normalised features before the head (FN, and LN of the last layer): values, gradients, heads, growth and runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.config import Model
from fedcl.errors import UsageError
from fedcl.models.heads import build_head, normalised

KINDS = ["l2", "l2_sqrt", "layer"]


def literal(row: list[float], kind: str) -> list[float]:
    mean = sum(row) / len(row) if kind == "layer" else 0.0
    centred = [v - mean for v in row]
    length = math.sqrt(sum(v * v for v in centred))
    scale = 1.0 if kind == "l2" else math.sqrt(len(row))
    return [scale * v / length for v in centred]


def features() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str) -> None:
    x = features()
    expected = torch.tensor([literal(row, kind) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(normalised(x, kind), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(normalised(7.0 * x, kind), expected, rtol=0, atol=1e-12)


def test_layer_is_layer_normalisation_without_scales() -> None:
    expected = torch.nn.functional.layer_norm(features(), (6,), eps=0.0)
    torch.testing.assert_close(normalised(features(), "layer"), expected, rtol=0, atol=1e-12)


def test_none_is_the_very_tensor() -> None:
    x = features()
    assert normalised(x, "none") is x


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_zeros_stay_zeros(kind: str) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    out = normalised(torch.relu(x), kind)
    assert not out.any()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["linear", "cosine", "nearest_mean", "simplex"])
def test_every_head_sees_normalised_features(kind: str, head: str) -> None:
    plain, ours = (build_head(Model(head=head, head_allocate="all", feature_norm=norm), 6) for norm in ("none", kind))
    for one in (plain, ours):
        one.weight.data = one.initial_rows("weight", [0, 1, 2], 0).double()
        if head == "linear":
            one.bias.data = torch.ones(3, dtype=torch.float64)
    found = ours(features())
    torch.testing.assert_close(found, plain(normalised(features(), kind)))
    assert torch.allclose(found, plain(features())) is (head == "cosine" and kind != "layer")


def test_a_run_trains_on_normalised_features(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    """The whole loop with features of length one, task after task."""

    def scores(w: Any, x: Tensor) -> Any:
        hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
        hidden = hidden * (hidden > 0)
        return (hidden / hidden.square().sum(dim=1, keepdim=True).sqrt()) @ w["head.weight"].T

    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        return oracle.cross_entropy(scores(w, x), y, local.known)

    settings = {"model.feature_norm": "l2", "model.head_bias": False, "seed": 4}
    expected = oracle.federated(tiny_config(settings), oracle.Method(loss))
    found = oracle.final(tiny(settings))
    assert oracle.distance(found, expected) < 1e-10
    assert oracle.distance(found, oracle.final(tiny({**settings, "model.feature_norm": "none"}))) > 1e-4


@pytest.mark.parametrize("path", ["stacked", "sequential"])
def test_layer_normalisation_of_all_layers(tiny: Any, oracle: Any, path: str) -> None:
    """LN: model.norm=layer in the network and model.feature_norm=layer before the head; one class a client."""
    settings = {
        "model.norm": "layer", "model.feature_norm": "layer", "partition.name": "classes_per_client",
        "partition.classes": 1, "federation.clients": 5, "engine.path": path,
    }  # fmt: skip
    assert all(bool(a.isfinite().all()) for a in oracle.final(tiny(settings)).values())


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"model.feature_norm": "l2", **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


def test_unknown_normalisation(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match=r"model\.feature_norm") as caught:
        build(tiny_config({"model.feature_norm": "l1"}))
    assert "l2_sqrt" in str(caught.value)
    assert "\n" not in str(caught.value)
