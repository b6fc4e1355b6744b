"""Losses of pytorch-metric-learning inside runs, against loops over triplets and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.run import RunResult, run

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]
LOSSES = "pytorch_metric_learning.losses"
W = "extra.metric_loss.loss.loss.W"


def unit(z: Tensor) -> Tensor:
    return z / z.square().sum(dim=1, keepdim=True).sqrt()


def triplets(z: Tensor, labels: list[int], margin: float = 0.05) -> Tensor:
    """All triplets of unit vectors by Euclidean distance, mean over those above 0."""
    z = unit(z)
    kept = []
    for a in range(len(z)):
        for p in range(len(z)):
            for n in range(len(z)):
                if p == a or labels[p] != labels[a] or labels[n] == labels[a]:
                    continue
                excess = (z[a] - z[p]).square().sum().sqrt() - (z[a] - z[n]).square().sum().sqrt() + margin
                if float(excess.detach()) > 0:
                    kept.append(excess)
    return torch.stack(kept).mean()


def softmax(z: Tensor, w: Tensor, labels: list[int], temperature: float) -> Tensor:
    """Cross entropy of cosines to a weight a class, w (d, classes)."""
    cosines, total = unit(z) @ unit(w.T).T / temperature, torch.zeros((), dtype=z.dtype)
    for row, label in zip(cosines, labels, strict=True):
        total = total + torch.log(torch.exp(row - row[label]).sum())
    return total / len(z)


@pytest.fixture
def labels(oracle: ModuleType, tiny_config: Configure) -> Callable[[dict[str, Any]], list[int]]:
    """The labels of the images of a first step, in their order."""

    def found(settings: dict[str, Any]) -> list[int]:
        world = oracle.World.of(tiny_config({**settings, "strategy": ["finetune"]}))
        rows = world.held[0][0]
        order = counter.permutation(len(rows), world.config.seed, "client", 0, 0, 0, "order", 0)
        return [world.y[rows[i]] for i in order.tolist()]

    return found


def test_a_step_moves_by_the_gradient_of_all_triplets(
    one_step: dict[str, Any], labels: Callable[..., list[int]], moves_by: Callable[..., None]
) -> None:
    few = {"data.limit": 2, "options.metric_loss.views": 2}
    y = labels({**one_step, "data.limit": 2}) * 2
    moves_by("metric_loss", lambda z, w: triplets(z, y), 1.0, few)


def test_the_weights_of_a_loss_are_trained_with_the_model(
    one_step: dict[str, Any], labels: Callable[..., list[int]], moves_by: Callable[..., None]
) -> None:
    own = {
        "options.metric_loss.loss": f"{LOSSES}.NormalizedSoftmaxLoss", "options.metric_loss.views": 2,
        "options.metric_loss.arguments": {"num_classes": 10, "embedding_size": 4, "temperature": 0.2},
    }  # fmt: skip
    y = labels(one_step) * 2
    moves_by("metric_loss", lambda z, w: softmax(z, w[W], y, 0.2), 1.0, own)


def test_weights_of_a_loss_are_drawn_from_the_seed_and_averaged(
    tiny: Run, oracle: ModuleType, moved: Callable[[RunResult], set[str]]
) -> None:
    own = {
        "strategy": ["metric_loss"], "options.metric_loss.loss": f"{LOSSES}.NormalizedSoftmaxLoss",
        "model.projector_dim": 4, "federation.rounds": 1,
        "options.metric_loss.arguments": {"num_classes": 10, "embedding_size": 4},
    }  # fmt: skip
    torch.manual_seed(1)
    first = tiny(own)
    torch.manual_seed(2)
    assert oracle.identical(oracle.final(first), oracle.final(tiny(own)))
    assert W in moved(first)


def test_a_miner_and_objects_change_the_step(
    tiny_config: Configure, one_step: dict[str, Any], oracle: ModuleType
) -> None:
    near = {"class": "pytorch_metric_learning.distances.LpDistance", "p": 1}
    own: list[dict[str, Any]] = [
        {},
        {"options.metric_loss.miner": "pytorch_metric_learning.miners.BatchHardMiner"},
        {"options.metric_loss.arguments": {"distance": near}},
    ]
    models = [oracle.final(run(tiny_config({**one_step, "strategy": ["metric_loss"], **o}))) for o in own]
    for other in models[1:]:
        assert oracle.distance(models[0], other) > 1e-6


def test_weight_zero_is_finetune_with_a_projector(tiny: Run, oracle: ModuleType) -> None:
    common = {"model.projector": "linear", "federation.rounds": 1}
    neutral = tiny({"strategy": ["metric_loss"], "options.metric_loss.weight": 0.0, **common})
    assert oracle.distance(oracle.final(neutral), oracle.final(tiny({"strategy": ["finetune"], **common}))) < 1e-12


def test_clients_are_trained_one_by_one_where_they_must(tiny: Run) -> None:
    result = tiny({"strategy": ["metric_loss"], "federation.rounds": 1, "engine.path": "stacked"})
    events = (result.folder / "events.jsonl").read_text()
    assert "metric_loss" in next(line for line in events.splitlines() if '"engine"' in line and '"why"' in line)


def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": ["metric_loss"], "labels.rate": 0.5, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize("views", [1, 2])
def test_one_image_a_step_is_refused_where_it_teaches_nothing(tiny: Run, views: int) -> None:
    one = {"strategy": ["metric_loss"], "federation.batch_size": 1, "federation.rounds": 1, "data.limit": 4}
    with pytest.raises(UsageError, match=r"federation\.batch_size=1.*compares images: at least 2"):
        tiny({**one, "options.metric_loss.views": views})
    tiny({**one, "options.metric_loss.weight": 0.0})


def test_one_image_a_step_is_enough_for_a_loss_with_class_weights(tiny: Run) -> None:
    settings = {
        "loss": f"{LOSSES}.NormalizedSoftmaxLoss", "arguments": {"num_classes": 10, "embedding_size": 128}
    }  # fmt: skip
    tiny({
        "strategy": ["metric_loss"], "federation.batch_size": 1, "federation.rounds": 1, "data.limit": 4,
        **{f"options.metric_loss.{n}": v for n, v in settings.items()},
    })  # fmt: skip


def test_a_miner_that_does_not_fit_is_blamed_itself(tiny_config: Configure) -> None:
    blamed = r"^options\.metric_loss\.miner='torch\.nn\.CrossEntropyLoss': cannot be called"
    with pytest.raises(UsageError, match=blamed):
        run(tiny_config({"strategy": ["metric_loss"], "options.metric_loss.miner": "torch.nn.CrossEntropyLoss"}))


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"loss": f"{LOSSES}.TripletLoss"}, "Did you mean"),
        ({"loss": f"{LOSSES}.VICRegLoss"}, "view_loss"),
        ({"loss": f"{LOSSES}.SelfSupervisedLoss"}, "cannot be made of these arguments"),
        ({"arguments": {"margins": 1}}, "cannot be made of these arguments"),
        ({"loss": f"{LOSSES}.ArcFaceLoss", "arguments": {"num_classes": 3, "embedding_size": 128}}, "cannot be called"),
        ({"loss": f"{LOSSES}.ArcFaceLoss", "arguments": {"num_classes": 10, "embedding_size": 5}}, "cannot be called"),
        ({"miner": "pytorch_metric_learning.miners.NoMiner"}, "has no 'NoMiner'"),
        ({"miner": "pytorch_metric_learning.miners.DistanceWeightedMiner"}, "draws from torch's global generator"),
        ({"weight": -1.0}, "weight"),
        ({"views": 0}, "views"),
        ({"arguments": 3}, "must be a mapping"),
    ],
)
def test_wrong_options(tiny_config: Configure, own: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        run(tiny_config({"strategy": ["metric_loss"], **{f"options.metric_loss.{k}": v for k, v in own.items()}}))
    assert "\n" not in str(caught.value)
    assert "options.metric_loss" in str(caught.value)
