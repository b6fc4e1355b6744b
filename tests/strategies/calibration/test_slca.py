"""SLCA against plain loops: the slow encoder, the masked loss, and the head aligned with shrunken Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.errors import UsageError
from fedcl.strategies.calibration.slca import SLCA, normalised_cross_entropy, reverse_cross_entropy, shrunk

FEW = {"options.slca.draws": 5, "options.slca.epochs": 3, "options.slca.batch_size": 20, "options.slca.jitter": 1e-4}
FAST = {**FEW, "options.slca.encoder_lr": 1.0}


def literal_normalised(row: list[float], label: int, classes: list[int], born: list[int], tau: float) -> float:
    """One image: logits over tau times the mean norm of each task's logits."""
    norms = []
    for task in sorted({born[c] for c in classes}):
        norms.append(math.sqrt(sum(row[c] ** 2 for c in classes if born[c] == task)))
    scaled = {c: row[c] / (tau * (sum(norms) / len(norms) + 1e-7)) for c in classes}
    top = max(scaled.values())
    return top + math.log(sum(math.exp(v - top) for v in scaled.values())) - scaled[label]


def test_normalised_cross_entropy_is_the_literal_form() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, born = [0, 1, 3, 4, 3, 0], [0, 0, 1, 1, 2]
    for classes in ([0, 1, 3, 4], [0, 1, 2, 3, 4]):
        mask = torch.tensor([c in classes for c in range(5)])
        found = normalised_cross_entropy(logits, torch.tensor(labels), mask, torch.tensor(born), 0.1)
        rows = zip(logits.tolist(), labels, strict=True)
        expected = sum(literal_normalised(row, y, classes, born, 0.1) for row, y in rows) / 6
        assert float(found) == pytest.approx(expected, abs=1e-10)


def test_classes_that_compete_within_their_task_are_normalised_by_it_alone() -> None:
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    born = torch.tensor([0, 0, 1, 1])
    mask = born[None, :] == torch.tensor([[0], [1]])
    found = normalised_cross_entropy(logits, torch.tensor([1, 2]), mask, born, 0.1)
    rows = logits.tolist()
    own = literal_normalised(rows[0], 1, [0, 1], [0, 0], 0.1) + literal_normalised(
        rows[1], 2, [2, 3], [0, 0, 1, 1], 0.1
    )
    assert float(found) == pytest.approx(own / 2, abs=1e-10)


def test_logits_of_zero_are_no_nan() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = normalised_cross_entropy(logits, torch.tensor([0, 1]), torch.ones(3).bool(), torch.tensor([0, 1, 1]), 0.1)
    (grad,) = torch.autograd.grad(loss, logits)
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(grad).all())


def test_reverse_cross_entropy_is_the_literal_form() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, classes = [0, 2, 2, 0], [0, 2]
    total = 0.0
    for row, y in zip(logits.tolist(), labels, strict=True):
        below = sum(math.exp(row[c]) for c in classes)
        total -= sum(math.exp(row[c]) / below * math.log(max(float(c == y), 1e-4)) for c in classes)
    mask = torch.tensor([True, False, True])
    assert float(reverse_cross_entropy(logits, torch.tensor(labels), mask)) == pytest.approx(total / 4, abs=1e-10)


def test_means_of_older_tasks_shrink() -> None:
    found = shrunk(torch.ones(3, 2, dtype=torch.float64), torch.tensor([0, 1, 2]), 2)
    np.testing.assert_allclose(found[:, 0], [0.9 + 0.1 / 3, 0.9 + 0.2 / 3, 1.0])


@pytest.mark.parametrize(
    ("settings", "reverse", "compete"),
    [({}, 0.0, "new"), ({"scenario.tasks": 3, "partition.alpha": 0.3}, 0.1, "known")],
    ids=["published", "reverse term, three tasks, all classes"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, after: Any, settings: dict[str, Any], reverse: float, compete: str
) -> None:
    named = {"options.slca.reverse": reverse, "options.slca.compete": compete}
    settings = {"strategy": ["slca"], **FAST, **settings, **named}
    world = oracle.World.of(tiny_config(settings))
    gaussians: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def loss(w: Any, x: Any, y: list[int], local: Any) -> Any:
        scores, classes = oracle.logits(w, x), local.new if compete == "new" else local.known
        value = oracle.cross_entropy(scores, y, classes)
        for row, label in zip(scores, y, strict=True):
            below = torch.stack([torch.exp(row[c] - row[label]) for c in classes]).sum()
            value = value + reverse * math.log(1e4) * (1 - 1 / below) / len(y)
        return value

    def end_task(w: Any, local: Any) -> Any:
        for c, rows in after.by_class(w, world, local.task).items():
            spread = np.cov(rows, rowvar=False) if len(rows) > 1 else np.zeros((rows.shape[1],) * 2)
            gaussians[c] = rows.mean(axis=0), spread + 1e-4 * np.eye(len(spread))
        return w

    w = oracle.federated(tiny_config(settings), oracle.Method(loss, end_task=end_task), world)
    last = len(world.known) - 1
    born = [next(t for t, new in enumerate(world.new) if c in new) for c in world.known[last]]
    means = {c: mean * (0.9 + 0.1 * (born[c] + 1) / (last + 1)) for c, (mean, _) in gaussians.items()}
    x, y = after.draws(
        means, {c: spread for c, (_, spread) in gaussians.items()}, 5, *after.key(world), "slca", "draws"
    )

    def aligned(scores: Any, labels: list[int]) -> Any:
        total = torch.zeros((), dtype=torch.float64)
        for row, label in zip(scores, labels, strict=True):
            norms = [
                torch.stack([row[c] ** 2 for c in sorted(means) if born[c] == t]).sum().sqrt()
                for t in sorted({born[c] for c in means})
            ]
            scaled = row / (0.1 * (torch.stack(norms).mean() + 1e-7))
            total = total + torch.logsumexp(torch.stack([scaled[c] for c in sorted(means)]), 0) - scaled[label]
        return total / len(labels)

    head = after.fitted(
        w, x, y, aligned, epochs=3, lr=0.01, momentum=0.9, weight_decay=5e-4, batch=20,
        name=(*after.key(world), "slca", "order"), cosine=True,
    )  # fmt: skip
    found = after.ended(tiny(settings), "slca")
    assert oracle.distance(found.model, w) < 1e-10
    assert max(float((found.evaluated[n] - head[n]).abs().max()) for n in head) < 1e-8
    assert float((head["head.weight"] - w["head.weight"]).abs().max()) > 1e-3


def test_the_first_task_is_not_aligned(tiny: Any, oracle: Any, after: Any) -> None:
    found = after.ended(tiny({"strategy": ["slca"], **FAST, "scenario.tasks": 1}), "slca")
    assert oracle.identical(found.evaluated, found.model)
    assert found.state["counts"].sum() > 0


def test_the_encoder_is_slow(tiny: Any, oracle: Any, after: Any) -> None:
    """One step of plain SGD: the encoder moves by its share of what it would move, the head by all of it."""
    one = {
        "scenario.tasks": 1, "federation.rounds": 1, "federation.epochs": 1, "federation.batch_size": 500,
        "federation.clients": 1, "optimiser.momentum": 0.0, "strategy": ["slca"], **FEW,
    }  # fmt: skip
    none = oracle.final(tiny({**one, "optimiser.lr": 1e-300}))
    full = oracle.final(tiny({**one, "options.slca.encoder_lr": 1.0}))
    slow = oracle.final(tiny({**one, "options.slca.encoder_lr": 0.25}))
    frozen = oracle.final(tiny({**one, "options.slca.encoder_lr": 0.0}))
    for n in full:
        share = 1.0 if n.startswith("head.") else 0.25
        torch.testing.assert_close(slow[n] - none[n], share * (full[n] - none[n]), rtol=0, atol=1e-12)
        assert torch.equal(frozen[n], none[n]) != n.startswith("head.")


def test_without_normalisation_and_shrinking_it_trains_on_plain_draws(tiny: Any, after: Any) -> None:
    plain = {"options.slca.temperature": 0.0, "options.slca.shrink": False, "options.slca.weight_decay": 0.0}
    heads = [
        after.ended(tiny({"strategy": ["slca"], **FAST, **options}), "slca").evaluated["head.weight"]
        for options in (plain, {**plain, "options.slca.shrink": True}, {**plain, "options.slca.temperature": 0.1})
    ]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    found = tiny({"strategy": ["slca"], **FAST, **hard})
    assert all(value is None or 0 <= value <= 1 for row in found.matrix for value in row)
    assert found.summary["status"] == "done"


def test_published_settings() -> None:
    options = SLCA().options
    assert (options.encoder_lr, options.draws, options.epochs, options.temperature) == (0.01, 256, 5, 0.1)


@pytest.mark.parametrize(
    ("key", "value"), [("encoder_lr", -1.0), ("reverse", -0.1), ("draws", 0), ("lr", 0.0), ("compete", "old")]
)
def test_wrong_options(tiny: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["slca"], f"options.slca.{key}": value})
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)
