"""SimpleCIL: the pooled cosine classifier is the centralised one on any partition, and the encoder stays as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError


def literal(train: Any, labels: list[int], test: Any) -> list[list[float]]:
    """Cosines with the mean of each class's features, number by number."""
    means = []
    for c in range(10):
        members = [train[i].tolist() for i, label in enumerate(labels) if label == c]
        means.append([sum(column) / len(members) for column in zip(*members, strict=True)])

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    return [[cosine(row.tolist(), mean) for mean in means] for row in test]


def test_any_partition_gives_the_centralised_head(pooled: Any, partition: tuple[int, int, float, int]) -> None:
    lab = pooled("simplecil")
    clients, nodes, skew, seed = partition
    scores = lab.scores(lab.asked(lab.rows(clients, skew, seed), min(nodes, clients)))
    expected = literal(lab.features("train"), lab.labels, lab.features("test"))
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_class_without_a_sample_is_never_predicted(pooled: Any) -> None:
    lab = pooled("simplecil")
    scores = lab.scores(lab.asked([[i for i, label in enumerate(lab.labels) if label != 4]]))
    assert bool((scores[:, 4] == -torch.inf).all())
    assert bool(scores[:, [c for c in range(10) if c != 4]].isfinite().all())


def test_before_the_first_mean_the_head_predicts(pooled: Any) -> None:
    lab = pooled("simplecil")
    assert torch.equal(lab.scores({}), lab.experiment.node.forward(lab.arrays, lab.images("test"), "eval").logits)


@pytest.mark.parametrize("adapt", ["none", "first", "all"])
def test_the_encoder_learns_in_the_tasks_of_adapt_alone(tiny: Any, tiny_config: Any, oracle: Any, adapt: str) -> None:
    settings = {
        "strategy": ["simplecil"], "options.simplecil.adapt": adapt, "scenario.tasks": 3, "federation.clients": 5,
        "partition.min_size": 2, "model.norm": "batch", "optimiser.weight_decay": 0.1,
    }  # fmt: skip
    tasks = {}
    for first in (1, 3):
        tasks[first] = oracle.final(tiny({**settings, "scenario.first": first}))
    start = build(tiny_config(settings)).initial
    encoder = [n for n in start if n.startswith("encoder.") and not n.endswith("num_batches_tracked")]
    assert any(n.endswith("running_mean") for n in encoder)

    def same(one: Any, other: Any) -> list[bool]:
        return [torch.equal(one[n], other[n]) for n in encoder]

    assert all(same(start, tasks[1])) if adapt == "none" else not any(same(start, tasks[1]))
    assert all(same(tasks[1], tasks[3])) if adapt != "all" else not any(same(tasks[1], tasks[3]))
    assert not torch.equal(tasks[1]["head.weight"], tasks[3]["head.weight"][: len(tasks[1]["head.weight"])])


@pytest.mark.parametrize("adapt", ["none", "first"])
def test_training_is_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, adapt: str) -> None:
    def edit(grads: Any, w: Any, local: Any) -> Any:
        stays = adapt == "none" or local.task > 0
        return {n: torch.zeros_like(g) if stays and n.startswith("encoder.") else g for n, g in grads.items()}

    settings = {"strategy": ["simplecil"], "options.simplecil.adapt": adapt, "federation.participation": 0.67}
    method = oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known), edit=edit)
    expected = oracle.federated(tiny_config(settings), method)
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_the_head_learns_from_features_of_running_statistics(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {
        "strategy": ["simplecil"], "model.norm": "batch", "scenario.tasks": 1, "federation.clients": 1,
        "federation.rounds": 1, "federation.batch_size": 120,
    }  # fmt: skip
    experiment, final = build(tiny_config(settings)), oracle.final(tiny(settings))
    node = experiment.node
    start = {n: node.grown(n, a, 10, "initial") for n, a in experiment.initial.items()}
    f = node.forward(start, node.store.batch(torch.arange(120), torch.float64), "eval").features.detach()
    weight, bias = (start[f"head.{n}"].clone().requires_grad_() for n in ("weight", "bias"))
    loss = oracle.cross_entropy(f @ weight.T + bias, node.store.label_tensor.tolist(), list(range(10)))
    moved = weight - 0.1 * torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(final["head.weight"], moved.detach(), rtol=0, atol=1e-10)


def test_accuracies_of_a_run_are_those_of_the_centralised_head(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {"strategy": ["simplecil"], "scenario.tasks": 3, "federation.clients": 6, "partition.min_size": 0}
    result, experiment = tiny(settings), build(tiny_config(settings))
    arrays, stages, node = oracle.final(result), experiment.stream.stages, experiment.node
    labels, test_labels = experiment.stream.train_labels, experiment.stream.test_labels

    def features(store: Any, ids: Any) -> Any:
        return node.forward(arrays, store.batch(torch.from_numpy(ids), torch.float64), "eval").features.detach()

    for t in range(3):
        means = torch.zeros(10, 8, dtype=torch.float64)
        for stage in stages[: t + 1]:
            for c in stage.classes:
                means[c] = features(node.store, stage.train_ids[labels[stage.train_ids] == c]).mean(0)
        known = max(c for stage in stages[: t + 1] for c in stage.classes) + 1
        for j in range(t + 1):
            f = features(experiment.test, stages[j].test_ids)
            cosine = torch.nn.functional.cosine_similarity(f[:, None], means[None, :known], dim=2)
            right = float((cosine.argmax(1).numpy() == test_labels[stages[j].test_ids]).mean())
            assert result.matrix[t][j] == pytest.approx(right, abs=1e-12)


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    matrix = tiny({"strategy": ["simplecil"], "options.simplecil.adapt": "first", **hard}).matrix
    assert all(v is not None and 0 <= v <= 1 for t, row in enumerate(matrix) for v in row[: t + 1])


def test_images_that_are_seen_once_are_counted_once(tiny: Any) -> None:
    result = tiny({"strategy": ["simplecil"], "federation.passes": "once"})
    from fedcl.records.checkpoint import load_newest

    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    assert int(found.arrays["strategy/simplecil/counts"].sum()) == 120


@pytest.mark.parametrize(("key", "value"), [("adapt", "second"), ("adapt", None), ("scale", 2.0)])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.simplecil") as caught:
        build(tiny_config({"strategy": ["simplecil"], f"options.simplecil.{key}": value}))
    assert "\n" not in str(caught.value)


def test_a_first_task_of_everybody_is_needed_to_adapt_in_it(tiny_config: Any) -> None:
    asynchronous = {"strategy": ["simplecil"], "time.order": "asynchronous"}
    build(tiny_config(asynchronous))
    with pytest.raises(UsageError, match=r"time\.order") as caught:
        build(tiny_config({**asynchronous, "options.simplecil.adapt": "first"}))
    assert "simplecil" in str(caught.value)


@pytest.mark.parametrize("name", ["simplecil", "aper", "fsa"])
def test_a_fixed_head_would_leave_nothing_to_train(tiny_config: Any, name: str) -> None:
    fixed = {"model.head": "simplex", "model.head_allocate": "all", "model.width": 16}
    with pytest.raises(UsageError, match="not a fixed head") as caught:
        build(tiny_config({"strategy": [name], **fixed}))
    assert "\n" not in str(caught.value)
    if name != "aper":
        build(tiny_config({"strategy": [name], **fixed, f"options.{name}.adapt": "all"}))
