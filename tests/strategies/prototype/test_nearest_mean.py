"""Nearest mean: federated sums give the centralised means and scikit-learn's predictions on any split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from fedcl.build import Experiment, build
from fedcl.config import Config, load_config
from fedcl.errors import UsageError
from fedcl.federation.call import Call, Header
from fedcl.federation.reduction import Reducer
from fedcl.local.training import NamedModels
from fedcl.models.arrays import grow_head
from fedcl.run import RunResult
from fedcl.strategies.prototype.nearest_mean import NearestMean, nearest_mean_scores
from fedcl.strategy import Predictor

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]
FROZEN = {"optimiser.lr": 1e-300, "strategy": ["nearest_mean"]}
"""Steps too small to change a double: the encoder stays as it was drawn."""


@functools.cache
def prepared(normalise: bool = True, score: str = "means", scale: float = 10.0) -> tuple[Experiment, dict[str, Tensor]]:
    """Ten digits of each class, one task, and a model whose head knows all classes."""
    config = load_config(
        {"strategy": ["nearest_mean"]},
        {
            "data.limit": 10, "data.validation": 0.0, "scenario.tasks": 1, "model.width": 8, "model.depth": 1,
            "engine.dtype": "float64", "engine.threads": 1, "engine.device": "cpu",
            "options.nearest_mean": {"normalise": normalise, "score": score, "scale": scale},
        },
    )  # fmt: skip
    experiment = build(config)
    arrays = grow_head(experiment.initial, experiment.node.model, experiment.stream.class_order, 0)
    return experiment, arrays


def asked(experiment: Experiment, arrays: dict[str, Tensor], rows: list[list[int]], nodes: int) -> dict[str, Tensor]:
    """What the server has after each client counted its rows, hosted by several nodes."""
    reducer = Reducer(NearestMean.reductions)
    for node in range(nodes):
        hosted = [k for k in range(len(rows)) if k % nodes == node]
        everything = list(range(10))
        header = Header("nearest_mean:count", hosted, 0, 1, 1, 1, 1, 10, everything, everything)
        ids = {k: torch.tensor(rows[k], dtype=torch.int64) for k in hosted}
        reply = experiment.node.handle(Call(header, arrays, {}, {}, ids))
        reducer.merge(reply.arrays, reply.facts)
    return reducer.result()


def features(experiment: Experiment, arrays: dict[str, Tensor], x: Tensor, normalise: bool = True) -> Tensor:
    """Features image by image, divided by their norms."""
    rows = []
    for image in x:
        feature = experiment.node.forward(arrays, image[None], "eval").features[0]
        rows.append(feature / feature.square().sum().sqrt() if normalise else feature)
    return torch.stack(rows)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 8), st.integers(1, 3), st.floats(0.0, 1.0), st.integers(0, 10**6))
def test_any_partition_gives_the_centralised_means(clients: int, nodes: int, skew: float, seed: int) -> None:
    experiment, arrays = prepared()
    generator = np.random.default_rng(seed)
    labels = experiment.node.store.label_tensor.tolist()
    # Some images go to the client of their class: clients without a class, and clients without any image.
    owner = [
        label % max(1, clients - 1) if generator.random() < skew else int(generator.integers(clients))
        for label in labels
    ]
    rows = [[i for i, k in enumerate(owner) if k == client] for client in range(clients)]
    found = asked(experiment, arrays, rows, min(nodes, clients))
    x = experiment.node.store.batch(torch.arange(len(labels)), torch.float64)
    z = features(experiment, arrays, x)
    for c in range(10):
        members = [z[i] for i, label in enumerate(labels) if label == c]
        assert found["counts"][c] == len(members)
        mean = sum(members) / len(members)
        torch.testing.assert_close(found["sums"][c] / found["counts"][c], mean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("normalise", [True, False])
def test_predictions_are_scikit_learns(normalise: bool) -> None:
    experiment, arrays = prepared(normalise=normalise)
    store, node = experiment.node.store, experiment.node
    rows = [list(range(k, len(store), 3)) for k in range(3)]
    state = asked(experiment, arrays, rows, 1)
    predictor = Predictor(arrays, state, torch.ones(10, dtype=torch.bool), NamedModels(node, {}))
    (strategy,) = node.stack
    x = experiment.test.batch(torch.arange(len(experiment.test)), torch.float64)
    ours = strategy.predict(predictor, x).argmax(dim=1)
    train = store.batch(torch.arange(len(store)), torch.float64)
    oracle = NearestCentroid().fit(
        features(experiment, arrays, train, normalise).detach().numpy(), store.label_tensor.numpy()
    )
    theirs = oracle.predict(features(experiment, arrays, x, normalise).detach().numpy())
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours.tolist())) > 3


def test_a_whole_run_over_three_tasks_with_a_frozen_encoder(tiny_config: Configure, oracle: ModuleType) -> None:
    from fedcl.run import run

    config = tiny_config({**FROZEN, "scenario.tasks": 3, "federation.clients": 5, "partition.min_size": 0})
    result, experiment = run(config), build(config)
    arrays, stages = oracle.final(result), experiment.stream.stages
    labels, test_labels = experiment.stream.train_labels, experiment.stream.test_labels
    for t in range(3):
        train = np.concatenate([s.train_ids for s in stages[: t + 1]])
        z = features(experiment, arrays, experiment.node.store.batch(torch.from_numpy(train), torch.float64))
        oracle_t = NearestCentroid().fit(z.detach().numpy(), labels[train])
        for j in range(t + 1):
            ids = stages[j].test_ids
            z = features(experiment, arrays, experiment.test.batch(torch.from_numpy(ids), torch.float64))
            right = float((oracle_t.predict(z.detach().numpy()) == test_labels[ids]).mean())
            assert result.matrix[t][j] == pytest.approx(right, abs=1e-12)


def test_means_of_a_task_are_taken_with_its_last_global_model(tiny_config: Configure, oracle: ModuleType) -> None:
    from fedcl.records.checkpoint import load_newest
    from fedcl.run import run

    config = tiny_config({"strategy": ["nearest_mean"], "scenario.tasks": 1})
    result, experiment = run(config), build(config)
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    sums, counts = (found.arrays[f"strategy/nearest_mean/{n}"] for n in ("sums", "counts"))
    store = experiment.node.store
    z = features(experiment, oracle.final(result), store.batch(torch.arange(len(store)), torch.float64))
    for c in range(10):
        torch.testing.assert_close(sums[c] / counts[c], z[store.label_tensor == c].mean(0), rtol=0, atol=1e-10)


def test_training_is_finetunes_and_only_sums_and_counts_are_sent(tiny: Run, oracle: ModuleType) -> None:
    ours, plain = tiny({"strategy": ["nearest_mean"]}), tiny({"strategy": ["finetune"]})
    assert oracle.identical(oracle.final(ours), oracle.final(plain))
    # Two tasks of 5 and 10 known classes, three clients, width 8: float64 sums and int64 counts.
    assert ours.summary["bytes_up"] - plain.summary["bytes_up"] == 3 * (5 + 10) * (8 + 1) * 8


@pytest.mark.parametrize("adapt", ["none", "all"])
def test_a_frozen_encoder_is_never_trained(tiny: Run, tiny_config: Configure, oracle: ModuleType, adapt: str) -> None:
    settings = {
        "strategy": ["nmc"], "options.nearest_mean.adapt": adapt, "model.norm": "batch", "optimiser.weight_decay": 0.1,
    }  # fmt: skip
    final, start = oracle.final(tiny(settings)), build(tiny_config(settings)).initial
    encoder = [n for n in start if n.startswith("encoder.") and not n.endswith("num_batches_tracked")]
    assert [torch.equal(final[n], start[n]) for n in encoder] == [adapt == "none"] * len(encoder)
    grown = build(tiny_config(settings)).node.grown("head.weight", start["head.weight"], 10, "initial")
    assert not torch.equal(final["head.weight"], grown)


def test_scores_are_distances_also_very_near_a_mean() -> None:
    means = torch.tensor([[1e3, 0.0], [1e3, 1e-3]])
    scores = nearest_mean_scores(means.clone(), means, torch.tensor([1, 1]))
    assert scores.argmax(dim=1).tolist() == [0, 1]
    torch.testing.assert_close(scores, torch.tensor([[0.0, -1e-3], [-1e-3, 0.0]]))


def test_both_adds_the_log_probabilities_of_means_and_head() -> None:
    experiment, arrays = prepared(score="both", scale=3.0)
    (strategy,) = experiment.node.stack
    state = asked(experiment, arrays, [list(range(len(experiment.node.store)))], 1)
    known = torch.tensor([True] * 7 + [False] * 3)
    x = experiment.test.batch(torch.arange(6), torch.float64)
    predictor = Predictor(arrays, state, known, NamedModels(experiment.node, {}))
    scores = strategy.predict(predictor, x)
    logits = experiment.node.forward(arrays, x, "eval").logits
    z = features(experiment, arrays, x)
    for i in range(6):
        squares = [float((z[i] - state["sums"][c] / state["counts"][c]).square().sum()) for c in range(10)]
        below = sum(np.exp(-3.0 * s) for s in squares)
        head = sum(np.exp(float(logits[i, c])) for c in range(7))
        for c in range(7):
            expected = float(logits[i, c]) - np.log(head) - 3.0 * squares[c] - np.log(below)
            assert float(scores[i, c]) == pytest.approx(expected, abs=1e-10)


def test_a_class_without_a_sample_is_never_predicted_and_the_head_serves_before_any_mean() -> None:
    experiment, arrays = prepared()
    (strategy,) = experiment.node.stack
    rows = [i for i, label in enumerate(experiment.node.store.label_tensor.tolist()) if label != 4]
    known = torch.ones(10, dtype=torch.bool)
    x = experiment.test.batch(torch.arange(len(experiment.test)), torch.float64)
    models = NamedModels(experiment.node, {})
    scores = strategy.predict(Predictor(arrays, asked(experiment, arrays, [rows], 1), known, models), x)
    assert bool((scores[:, 4] == -torch.inf).all())
    assert not bool(torch.isnan(scores).any())
    before = strategy.predict(Predictor(arrays, {}, known, models), x)
    assert torch.equal(before, experiment.node.forward(arrays, x, "eval").logits)


def test_a_feature_of_zeros_is_no_nan() -> None:
    assert NearestMean().features(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    "odd",
    [
        {"federation.batch_size": 1},
        {"federation.clients": 12, "partition.min_size": 0, "partition.alpha": 0.05, "data.limit": 4},
        {"data.limit": 1, "federation.clients": 2, "partition.min_size": 0},
        {"scenario.tasks": 10, "partition.min_size": 0},
    ],
    ids=["batch of one", "empty clients", "one sample a class", "one class a task"],
)
@pytest.mark.parametrize("score", ["means", "both"])
def test_odd_input(tiny: Run, odd: dict[str, Any], score: str) -> None:
    overrides = {"federation.rounds": 2, "evaluate.every": 1, "options.nearest_mean.score": score, **odd}
    matrix = tiny({"strategy": ["nearest_mean"], **overrides}).matrix
    assert all(value is not None and 0 <= value <= 1 for t, row in enumerate(matrix) for value in row[: t + 1])


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", 0.0), ("scale", float("inf")), ("score", "head"), ("normalise", "maybe"), ("adapt", "first"), ("k", 1)],
)
def test_wrong_options(tiny: Run, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["nearest_mean"], f"options.nearest_mean.{key}": value})
    assert "\n" not in str(caught.value)
    assert "options.nearest_mean" in str(caught.value)
