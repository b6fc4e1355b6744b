"""CSD: its terms against loops over anchors, whole runs against the literal federated loop, and the edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import batch_hard_triplet, contrastive_distillation
from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.run import RunResult
from fedcl.strategies.contrastive.csd import CSD

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]


def unit(rows: Tensor) -> list[Tensor]:
    return [row / row.square().sum().sqrt() if bool(row.any()) else row for row in rows]


def distilled(student: Tensor, teacher: Tensor, labels: list[int], temperature: float) -> Tensor:
    """-1/B sum_i 1/|P(i)| sum_p log( exp(z_i c_p / T) / sum_{a != i} exp(z_i c_a / T) ), anchors: students."""
    z, both = unit(student), [*unit(student), *unit(teacher.detach())]
    twice, total = [*labels, *labels], torch.zeros((), dtype=student.dtype)
    for i, anchor in enumerate(z):
        below = torch.stack([torch.exp(anchor @ c / temperature) for a, c in enumerate(both) if a != i]).sum()
        own = [p for p in range(len(both)) if p != i and twice[p] == labels[i]]
        total = total - sum(torch.log(torch.exp(anchor @ both[p] / temperature) / below) for p in own) / len(own)
    return total / len(z)


def triplets(features: Tensor, labels: list[int], margin: float) -> Tensor:
    """Every image with its hardest positive and negative; mean over those above 0."""
    z, found = unit(features), []
    for i, anchor in enumerate(z):
        same = [anchor @ z[j] for j in range(len(z)) if j != i and labels[j] == labels[i]]
        other = [anchor @ z[j] for j in range(len(z)) if labels[j] != labels[i]]
        if same and other:
            excess = max(other, key=float) - min(same, key=float) + margin
            if float(excess) > 0:
                found.append(excess)
    return torch.stack(found).mean() if found else torch.zeros((), dtype=features.dtype)


def drawn(count: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=make, dtype=torch.float64, requires_grad=True)


LABELS = [[0, 1, 0, 1, 0, 2], [0, 1, 2], [1, 1, 1], [4]]


@pytest.mark.parametrize("labels", LABELS, ids=["mixed", "no pair", "one class", "one image"])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_distillation_is_the_loop_over_students(labels: list[int], temperature: float) -> None:
    student, teacher = drawn(len(labels), 0), drawn(len(labels), 1)
    ours = contrastive_distillation(student, teacher, torch.tensor(labels), temperature)
    theirs = distilled(student, teacher, labels, temperature)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    (one,), (other,) = torch.autograd.grad(ours, student, retain_graph=True), torch.autograd.grad(theirs, student)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert torch.autograd.grad(ours, teacher, allow_unused=True) == (None,), "the teacher is not trained"
    # An image has its teacher as a positive, but alone nothing else to be told from.
    assert (len(labels) == 1) is not bool(one.any())


@pytest.mark.parametrize("labels", LABELS, ids=["mixed", "no pair", "one class", "one image"])
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
def test_triplet_is_the_loop_over_hardest_images(labels: list[int], margin: float) -> None:
    features = drawn(len(labels), 2)
    ours, theirs = batch_hard_triplet(features, torch.tensor(labels), margin), triplets(features, labels, margin)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (one,) = torch.autograd.grad(ours, features)
    expected = torch.autograd.grad(theirs, features)[0] if theirs.requires_grad else torch.zeros_like(features)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)
    assert bool(one.any()) is (len(set(labels)) > 1 and len(set(labels)) < len(labels))


def test_triplet_equals_pytorch_metric_learning() -> None:
    library = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners

    assert library
    features, labels = drawn(9, 3), torch.tensor([0, 1, 2] * 3)
    loss = losses.TripletMarginLoss(distance=distances.CosineSimilarity(), margin=0.2)
    theirs = loss(features, labels, miners.BatchHardMiner()(features, labels))
    torch.testing.assert_close(batch_hard_triplet(features, labels, 0.2), theirs, rtol=0, atol=1e-12)


def test_triplets_that_hold_count_neither_as_loss_nor_in_the_mean() -> None:
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    assert batch_hard_triplet(apart, labels, 1.0).item() == 0
    near = torch.cat([apart, torch.tensor([[1.0, 0.0]], dtype=torch.float64)])  # of class 1, where class 0 lies
    expected = triplets(near, [0, 0, 1, 1, 1], 1.0)
    assert float(expected) > 1
    torch.testing.assert_close(batch_hard_triplet(near, torch.tensor([0, 0, 1, 1, 1]), 1.0), expected)


def test_a_feature_of_zeros_gives_finite_gradients() -> None:
    features = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    loss = batch_hard_triplet(features, labels) + contrastive_distillation(features, features, labels)
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())


def test_stacked_clients_are_the_same_as_one_by_one() -> None:
    x, t = (torch.stack([drawn(6, seed + at).detach() for seed in range(3)]) for at in (0, 9))
    y = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])

    def both(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return batch_hard_triplet(x, y) + contrastive_distillation(x, t, y)

    alone = torch.stack([both(*lane) for lane in zip(x, t, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(both)(x, t, y), alone, rtol=0, atol=1e-12)


def method(oracle: ModuleType, **given: float) -> Any:
    o = CSD.Options(**given)

    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        def features(v: Any) -> Tensor:
            hidden = x @ v["encoder.1.weight"].T + v["encoder.1.bias"]
            return hidden * (hidden > 0)

        scores = oracle.logits(w, x)
        value = oracle.cross_entropy(scores, y, local.known) + o.triplet * triplets(features(w), y, o.margin)
        if local.previous is None:
            return value
        teacher = oracle.logits(local.previous, x)
        divergence = oracle.soft_cross_entropy(scores, teacher, local.old, o.softening)
        divergence = divergence - oracle.entropy(teacher[:, local.old], range(len(local.old)), o.softening)
        contrast = distilled(features(w), features(local.previous), y, o.temperature)
        return value + o.distillation * divergence + o.weight * contrast

    return oracle.Method(loss)


@pytest.mark.parametrize(
    ("settings", "options"),
    [({}, {}), ({"scenario.tasks": 3}, {"weight": 0.5, "temperature": 0.2, "triplet": 0.3, "softening": 3.0})],
    ids=["as released", "three tasks"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Run, tiny_config: Configure, oracle: ModuleType, settings: dict[str, Any], options: dict[str, float]
) -> None:
    settings = {
        "strategy": ["csd"], "data.limit": 4, "optimiser.lr": 0.02, **settings,
        **{f"options.csd.{n}": v for n, v in options.items()},
    }  # fmt: skip
    expected = oracle.federated(tiny_config(settings), method(oracle, **options))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-9


@pytest.mark.parametrize("term", ["weight", "triplet", "distillation"])
def test_a_term_is_linear_in_its_weight(oracle: ModuleType, term: str) -> None:
    """The slope at 0 is the literal term's gradient, so nothing is left out of the loss at weight 0."""
    w, previous = oracle.leaves(oracle.model(3, 2, 5, seed=0)), oracle.leaves(oracle.model(3, 2, 3, seed=1))
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64), [3, 4, 3, 3, 4, 4]
    step = oracle.step(w, x, y, known=[0, 1, 2, 3, 4], new=[3, 4], previous=previous)
    none = {"weight": 0.0, "triplet": 0.0, "distillation": 0.0}

    def total(weight: float) -> Any:
        return sum(CSD(CSD.Options(**{**none, term: weight})).loss(step).values())

    assert total(0.0).item() == 0
    literal = {
        "weight": lambda: distilled(x @ torch.eye(2, dtype=x.dtype), x, y, 0.07),
        "triplet": lambda: triplets(x, y, 1.0),
        "distillation": lambda: (
            oracle.soft_cross_entropy(oracle.logits(w, x), oracle.logits(previous, x), [0, 1, 2], 2.0)
            - oracle.entropy(oracle.logits(previous, x), [0, 1, 2], 2.0)
        ),
    }[term]()  # the oracle's step has the images themselves as features
    slope = (total(1e-3) - total(0.0)) / 1e-3
    assert slope.item() == pytest.approx(literal.item(), rel=1e-10)
    assert literal.item() > 0
    if term == "distillation":
        expected, found = oracle.gradient(literal, w), oracle.gradient(slope, w)
        assert all(torch.allclose(found[n], expected[n], atol=1e-10) for n in w)
        assert all(not g.any() for g in oracle.gradient(total(1.0), previous).values())


def test_without_its_terms_it_is_finetune(tiny: Run, oracle: ModuleType) -> None:
    none = {f"options.csd.{n}": 0.0 for n in ("weight", "triplet", "distillation")}
    assert oracle.identical(oracle.final(tiny({"strategy": ["csd"], **none})), oracle.final(tiny({})))


def test_the_first_task_has_no_teacher(oracle: ModuleType) -> None:
    w = oracle.model(3, 2, 2, seed=0)
    step = oracle.step(w, torch.ones(2, 2, dtype=torch.float64), [0, 1], known=[0, 1], new=[0, 1], task=0)
    assert set(CSD().loss(step)) == {"triplet"}


def test_hard_settings(tiny: Run, oracle: ModuleType, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["csd"], **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1.0), ("triplet", math.inf), ("temperature", 0.0), ("softening", -2.0), ("margin", -0.1), ("tau", 1)],
)
def test_wrong_options(tiny_config: Configure, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.csd") as caught:
        build(tiny_config({"strategy": ["csd"], f"options.csd.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
