"""FSA: the LDA head of pooled sums is the centralised one, and the first session alone adapts what it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.models.norms import scale_and_shift


def literal(train: Tensor, labels: list[int], test: Tensor, cov: str, shrink: float) -> Tensor:
    """Scores by explicit covariances and inverses in NumPy."""
    f, y = train.numpy(), np.array(labels)
    means = {c: f[y == c].mean(axis=0) for c in sorted(set(labels))}
    if cov == "total":
        spread = np.cov(f, rowvar=False)
    else:
        centred = np.stack([row - means[c] for row, c in zip(f, labels, strict=True)])
        spread = np.array([np.outer(row, row) for row in centred]).sum(axis=0) / (len(f) - len(means))
    inverse = np.linalg.inv(spread + shrink * np.eye(f.shape[1]))
    scores = np.full((len(test), 10), -np.inf)
    for i, x in enumerate(test.numpy()):
        for c, mean in means.items():
            scores[i, c] = x @ inverse @ mean - 0.5 * mean @ inverse @ mean
    return torch.from_numpy(scores)


HEADS = [("total", 1.0), ("within", 1e-3)]


@pytest.mark.parametrize(("cov", "shrink"), HEADS)
def test_any_partition_gives_the_centralised_head(
    pooled: Any, partition: tuple[int, int, float, int], cov: str, shrink: float
) -> None:
    lab = pooled("fsa", cov=cov, shrink=shrink)
    clients, nodes, skew, seed = partition
    scores = lab.scores(lab.asked(lab.rows(clients, skew, seed), min(nodes, clients)))
    if seed < 2:  # the slow oracle for two of them, one learner with all images for the others
        expected = literal(lab.features("train"), lab.labels, lab.features("test"), cov, shrink)
    else:
        expected = lab.scores(lab.asked([list(range(len(lab.labels)))]))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-8)


def test_predictions_are_scikit_learns(pooled: Any) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    lab = pooled("fsa", cov="within", shrink=1e-9)
    # Equally many images a class: the textbook's covariance is ours but for a factor, which changes no prediction.
    assert len({lab.labels.count(c) for c in range(10)}) == 1
    oracle = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.1] * 10)
    oracle.fit(lab.features("train").numpy(), np.array(lab.labels))
    ours = lab.scores(lab.asked([list(range(len(lab.labels)))])).argmax(1)
    assert ours.tolist() == oracle.predict(lab.features("test").numpy()).tolist()
    assert len(set(ours.tolist())) > 3


@pytest.mark.parametrize(("cov", "shrink"), HEADS)
def test_a_class_without_a_sample_is_never_predicted(pooled: Any, cov: str, shrink: float) -> None:
    lab = pooled("fsa", cov=cov, shrink=shrink)
    rows = [i for i, label in enumerate(lab.labels) if label != 4]
    scores = lab.scores(lab.asked([rows]))
    assert bool((scores[:, 4] == -torch.inf).all())
    labels = [lab.labels[i] for i in rows]
    expected = literal(lab.features("train")[rows], labels, lab.features("test"), cov, shrink)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("cov", ["total", "within"])
def test_one_image_has_no_spread_and_no_nan(pooled: Any, cov: str) -> None:
    lab = pooled("fsa", cov=cov)
    scores = lab.scores(lab.asked([[0]]))
    assert bool(scores[:, lab.labels[0]].isfinite().all())
    assert not bool(scores.isnan().any())


def test_a_run_is_the_head_of_everything_seen_on_the_encoder_of_the_first_task(
    tiny: Any, tiny_config: Any, oracle: Any
) -> None:
    settings = {"strategy": ["fsa"], "scenario.tasks": 3, "federation.clients": 5, "partition.min_size": 0}
    result, experiment = tiny(settings), build(tiny_config(settings))
    arrays, stages, node = oracle.final(result), experiment.stream.stages, experiment.node
    first = oracle.final(tiny({**settings, "scenario.first": 1}))
    encoder = [n for n in first if n.startswith("encoder.")]
    assert all(torch.equal(first[n], arrays[n]) for n in encoder)
    assert not any(torch.equal(first[n], experiment.initial[n]) for n in encoder)

    def features(store: Any, ids: Any) -> Tensor:
        return node.forward(arrays, store.batch(torch.from_numpy(ids), torch.float64), "eval").features.detach()

    for t in range(3):
        ids = np.concatenate([s.train_ids for s in stages[: t + 1]])
        train, labels = features(node.store, ids), experiment.stream.train_labels[ids].tolist()
        for j in range(t + 1):
            test = stages[j].test_ids
            scores = literal(train, labels, features(experiment.test, test), "total", 1.0)
            right = float((scores.argmax(1).numpy() == experiment.stream.test_labels[test]).mean())
            assert result.matrix[t][j] == pytest.approx(right, abs=1e-12)


def test_film_trains_scales_and_shifts_alone_and_keeps_running_statistics(
    tiny: Any, tiny_config: Any, oracle: Any, moved: Any
) -> None:
    settings = {"strategy": ["fsa"], "options.fsa.tune": "film", "model.norm": "batch", "optimiser.weight_decay": 0.1}
    result, experiment = tiny(settings), build(tiny_config(settings))
    tuned = {f"encoder.{n}" for n in scale_and_shift(experiment.node.model.encoder)}
    assert moved(result) == tuned | {"head.weight", "head.bias"}
    final, start = oracle.final(result), experiment.initial
    buffers = [n for n in start if "running" in n or "tracked" in n]
    assert len(buffers) == 3
    assert all(torch.equal(final[n], start[n]) for n in buffers)
    body = tiny({**settings, "options.fsa.tune": "body"})
    assert tuned < moved(body)
    assert result.summary["bytes_up"] < body.summary["bytes_up"]


def test_film_learns_from_features_of_running_statistics(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {
        "strategy": ["fsa"], "options.fsa.tune": "film", "model.norm": "batch", "scenario.tasks": 1,
        "federation.clients": 1, "federation.rounds": 1, "federation.batch_size": 120,
    }  # fmt: skip
    experiment, final = build(tiny_config(settings)), oracle.final(tiny(settings))
    node = experiment.node
    start = {n: node.grown(n, a, 10, "initial") for n, a in experiment.initial.items()}
    for name in scale_and_shift(node.model.encoder):
        leaf = start[f"encoder.{name}"].clone().requires_grad_()
        x = node.store.batch(torch.arange(120), torch.float64)
        logits = node.forward({**start, f"encoder.{name}": leaf}, x, "eval").logits
        loss = oracle.cross_entropy(logits, node.store.label_tensor.tolist(), list(range(10)))
        moved = leaf - 0.1 * torch.autograd.grad(loss, leaf)[0]
        torch.testing.assert_close(final[f"encoder.{name}"], moved.detach(), rtol=0, atol=1e-10)


def test_film_needs_a_normalisation_layer(tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fsa\.tune='film'") as caught:
        tiny({"strategy": ["fsa"], "options.fsa.tune": "film"})
    assert "model.norm" in str(caught.value)


@pytest.mark.parametrize("cov", ["total", "within"])
def test_hard_settings(tiny: Any, hard: dict[str, Any], cov: str) -> None:
    matrix = tiny({"strategy": ["fsa"], "options.fsa.cov": cov, "optimiser.lr": 0.01, **hard}).matrix
    assert all(v is not None and 0 <= v <= 1 for t, row in enumerate(matrix) for v in row[: t + 1])


@pytest.mark.parametrize(
    ("key", "value"), [("shrink", 0.0), ("shrink", float("inf")), ("cov", "full"), ("tune", "norm"), ("adapt", "last")]
)
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fsa") as caught:
        build(tiny_config({"strategy": ["fsa"], f"options.fsa.{key}": value}))
    assert "\n" not in str(caught.value)
