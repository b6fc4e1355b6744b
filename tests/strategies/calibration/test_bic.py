"""BiC: the loss in plain loops, held-out images that nobody trains on, a correction equal to the centralised one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.local.client import NamedModels
from fedcl.strategies.calibration._correction import best_correction, class_weights, correction_sums
from fedcl.strategies.calibration.bic import BiC
from fedcl.strategy import Predictor

ALPHA, BETA = "extra.bic.correction.alpha", "extra.bic.correction.beta"
STAGE_ONE = {"strategy": ["bic"], "options.bic.budget": 0, "options.bic.validation": 0.0}
WHOLE = {"strategy": ["bic"], "options.bic.validation": 0.4, "seed": 3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_loss(scores: Any, labels: list[int], known: list[int], new: list[int], point: Tensor) -> Tensor:
    """The mean over classes of the mean cross entropy of their images, score by score."""
    held = sorted(set(labels))
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(scores, labels, strict=True):
        corrected = {c: point[0] * row[c] + point[1] if c in new else row[c] for c in known}
        below = torch.stack([torch.exp(corrected[c] - corrected[label]) for c in known]).sum()
        total = total + torch.log(below) / (labels.count(label) * len(held))
    return total


def lowest(scores: Any, labels: list[int], known: list[int], new: list[int], decay: float) -> Tensor:
    """The minimum over alpha and beta by LBFGS on the literal loss."""
    point = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [point], max_iter=300, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = literal_loss(scores, labels, known, new, point)
        value = value + decay / 2 * ((point[0] - 1) ** 2 + point[1] ** 2)
        torch.autograd.backward(value)
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    return point.detach()


SCORES, LABELS = drawn(12, 5) * 3, [0, 0, 0, 1, 3, 3, 4, 4, 4, 4, 0, 3]
KNOWN = torch.tensor([True, True, False, True, True])
NEW = torch.tensor([False, False, False, True, True])


def measured(point: Tensor, rows: slice = slice(None)) -> Any:
    weights = class_weights(torch.bincount(torch.tensor(LABELS), minlength=5))
    labels = torch.tensor(LABELS[rows], dtype=torch.int64)
    return correction_sums(SCORES[rows], labels, KNOWN, NEW, weights, point)


def test_sums_are_the_balanced_loss_and_its_derivatives() -> None:
    point = torch.tensor([0.7, -0.4], dtype=torch.float64)

    def literal(at: Tensor) -> Tensor:
        return literal_loss(SCORES, LABELS, [0, 1, 3, 4], [3, 4], at)

    found = measured(point)
    torch.testing.assert_close(found["loss"], literal(point), rtol=0, atol=1e-12)
    slope = torch.autograd.functional.jacobian(literal, point)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found["slope"], slope, rtol=0, atol=1e-12)
    curvature = torch.autograd.functional.hessian(literal, point)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found["curvature"], curvature, rtol=0, atol=1e-11)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_newton_finds_the_minimum_of_the_union_of_any_parts(decay: float) -> None:
    expected = lowest(SCORES, LABELS, [0, 1, 3, 4], [3, 4], decay)
    assert float((expected - torch.tensor([1.0, 0.0])).abs().max()) > 0.1
    whole = best_correction(measured, decay, 30)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)

    def in_parts(point: Tensor) -> Any:
        parts = [measured(point, rows) for rows in (slice(0, 5), slice(5, 5), slice(5, 12))]
        return {n: sum(p[n] for p in parts) for n in parts[0]}

    torch.testing.assert_close(best_correction(in_parts, decay, 30), whole, rtol=0, atol=1e-9)


def test_images_that_are_all_classified_right_give_a_finite_correction() -> None:
    scores = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    two, new = torch.tensor([True, True]), torch.tensor([False, True])
    weights = class_weights(torch.tensor([1, 1]))
    for decay, most in ((0.0, 50.0), (1e-3, 4.0)):
        found = best_correction(
            lambda at: correction_sums(scores, torch.tensor([0, 1]), two, new, weights, at), decay, 20
        )
        assert bool(found.isfinite().all())
        assert 1 < float(found[0]) < most


def test_no_image_has_no_sum() -> None:
    found = measured(torch.tensor([1.0, 0.0], dtype=torch.float64), slice(0, 0))
    assert [float(a.abs().sum()) for a in found.values()] == [0.0, 0.0, 0.0]
    assert class_weights(torch.zeros(3, dtype=torch.int64)).tolist() == [0.0, 0.0, 0.0]


# training


@pytest.mark.parametrize(
    ("settings", "temperature", "squared", "factor"),
    [({}, 2.0, False, 1.0), ({"scenario.tasks": 3}, 1.3, True, 0.6)],
    ids=["default", "three tasks"],
)
def test_the_first_stage_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: Any, temperature: float, squared: bool, factor: float
) -> None:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        scores = oracle.logits(w, x)
        value = oracle.cross_entropy(scores, y, local.known)
        if local.previous is None:
            return value
        share = factor * len(local.old) / len(local.known)
        teacher = oracle.logits(local.previous, x)
        distilled = oracle.soft_cross_entropy(scores, teacher, local.old, temperature)
        return (1 - share) * value + share * (temperature**2 if squared else 1) * distilled

    named = {"temperature": temperature, "squared": squared, "distillation": factor}
    settings = {**STAGE_ONE, **settings, **{f"options.bic.{n}": v for n, v in named.items()}}
    expected = oracle.federated(tiny_config(settings), oracle.Method(loss))
    assert oracle.distance(plain(oracle.final(tiny(settings))), plain(expected)) < 1e-10


def plain(arrays: Any) -> Any:
    """The arrays of the model without those of the correction."""
    return {n: a for n, a in arrays.items() if n not in (ALPHA, BETA)}


def test_without_its_parts_it_is_replay(tiny: Any, oracle: Any) -> None:
    memory = {"policy": "class_balanced", "budget": 640}
    bic = {"validation": 0.0, "distillation": 0.0, "budget": 640}
    first = tiny({"strategy": ["bic"], **{f"options.bic.{n}": v for n, v in bic.items()}})
    other = tiny({"strategy": ["replay"], **{f"options.replay.{n}": v for n, v in memory.items()}})
    assert oracle.identical(plain(oracle.final(first)), oracle.final(other))
    forgetful = tiny({"strategy": ["bic"], **{f"options.bic.{n}": v for n, v in {**bic, "budget": 0}.items()}})
    assert not oracle.identical(oracle.final(first), oracle.final(forgetful))


def out(world: Any, client: int, rows: list[int], share: float) -> list[int]:
    """Rows that a client holds out, by the documented draw."""
    numbers = counter.uniform(len(world.y), world.config.seed, "client", client, "bic", "validation")
    found = [row for row in rows if numbers[row] < share]
    return [] if len(found) == len(rows) else found


def test_held_out_images_are_not_trained_on(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**STAGE_ONE, "options.bic.validation": 0.4, "options.bic.distillation": 0.0}
    world = oracle.World.of(tiny_config(settings))
    left = [
        [[row for row in rows if row not in out(world, k, rows, 0.4)] for k, rows in enumerate(task)]
        for task in world.held
    ]
    assert all(0 < len(a) < len(b) for a, b in zip(left[0], world.held[0], strict=True))
    world.held = left
    method = oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known))
    expected = oracle.federated(tiny_config(settings), method, world)
    assert oracle.distance(plain(oracle.final(tiny(settings))), plain(expected)) < 1e-10


def test_exemplars_that_are_held_out_are_not_mixed_in() -> None:
    ids = torch.arange(40)
    ctx: Any = SimpleNamespace(
        state={"ids": ids}, ids=ids[:0], store=range(40), key=(0, "client", 2, 1, 0), batch_size=8
    )
    method = BiC(BiC.Options(validation=0.5))
    (source,) = method.sources(ctx)
    kept, held = method.parted(ctx, ids)
    assert source.ids.tolist() == kept.tolist()
    assert 0 < len(held) < 40
    assert sorted(kept.tolist() + held.tolist()) == ids.tolist()
    assert method.parted(ctx, held[:3])[1].tolist() == []  # something must be left to train on


# the correction


def test_the_correction_is_that_of_all_held_out_images_together(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    """The memory holds everything of the first task, so that the held-out images of both are known."""
    result, world = tiny(WHOLE), oracle.World.of(tiny_config(WHOLE))
    w = oracle.final(result)
    rows = [row for task in world.held for k, r in enumerate(task) for row in out(world, k, r, 0.4)]
    labels = [world.y[row] for row in rows]
    assert len(set(labels)) == 10
    scores = oracle.logits(plain(w), world.x[rows]).detach()
    expected = lowest(scores, labels, world.known[1], world.new[1], 1e-3)
    found = torch.stack([w[ALPHA][world.new[1]], w[BETA][world.new[1]]])
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=0, atol=1e-6)
    assert w[ALPHA][world.new[0]].tolist() == [1.0] * 5
    assert w[BETA][world.new[0]].tolist() == [0.0] * 5
    assert float((expected - torch.tensor([1.0, 0.0])).abs().max()) > 0.05


def test_averaged_is_the_mean_of_the_clients_own_fits(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**WHOLE, "options.bic.fit": "averaged", "options.bic.decay": 0.01}
    w, world = oracle.final(tiny(settings)), oracle.World.of(tiny_config(settings))
    total, images = torch.zeros(2, dtype=torch.float64), 0
    for k in range(3):
        rows = [row for task in world.held for row in out(world, k, task[k], 0.4)]
        labels = [world.y[row] for row in rows]
        if any(c in world.new[0] for c in labels) and any(c in world.new[1] for c in labels):
            scores = oracle.logits(plain(w), world.x[rows]).detach()
            total += len(rows) * lowest(scores, labels, world.known[1], world.new[1], 0.01)
            images += len(rows)
    assert images > 0
    found = torch.stack([w[ALPHA][world.new[1][0]], w[BETA][world.new[1][0]]])
    torch.testing.assert_close(found, total / images, rtol=0, atol=1e-5)


def test_corrected_scores_predict(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    w, node = oracle.final(tiny(WHOLE)), build(tiny_config(WHOLE)).node
    x = node.store.batch(torch.arange(20), torch.float64)
    predictor = Predictor(w, {}, torch.ones(10, dtype=torch.bool), NamedModels(node, {}), strategy="bic")
    scores = oracle.logits(plain(w), x.flatten(1)).tolist()
    found = BiC().predict(predictor, x)
    for row, before in zip(found, scores, strict=True):
        for c in range(10):
            assert float(row[c]) == pytest.approx(float(w[ALPHA][c]) * before[c] + float(w[BETA][c]), abs=1e-10)


def test_later_tasks_train_and_distil_corrected_scores(oracle: Any) -> None:
    """The student has the corrections of the tasks before, and so has its teacher."""
    w, before = oracle.leaves(oracle.model(5, 4, 4, 0)), oracle.model(5, 4, 4, 1)
    w[ALPHA], w[BETA] = torch.tensor([1.0, 0.5, 1.0, 1.0]), torch.tensor([0.0, 2.0, 0.0, 0.0])
    before[ALPHA], before[BETA] = w[ALPHA], torch.tensor([0.0, 3.0, 0.0, 0.0])
    x, y = drawn(4, 4), [0, 2, 3, 1]
    step = oracle.step(w, x, y, known=[0, 1, 2, 3], new=[2, 3], previous=before, task=2)

    class Models:
        def __call__(self, x: Tensor, which: Any, *rest: Any) -> Any:
            return step.models(x, which, *rest)

        def apply(self, module: str, which: Any, inputs: Any, *rest: Any) -> Tensor:
            assert module == "extra.bic.correction"
            arrays = before if which == "stage:previous" else which
            scaled: Tensor = arrays[ALPHA] * inputs[0] + arrays[BETA]
            return scaled

    student = oracle.logits(plain(w), x) * w[ALPHA] + w[BETA]
    teacher = oracle.logits(plain(before), x) * before[ALPHA] + before[BETA]
    entropy = oracle.soft_cross_entropy(student, teacher, [0, 1], 2.0)
    expected = 0.5 * oracle.cross_entropy(student, y, [0, 1, 2, 3]) + 0.5 * entropy
    found = BiC().task_loss(replace(step, models=Models(), strategy="bic"))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"scenario.tasks": 1},
        {"options.bic.budget": 0},
        {"options.bic.validation": 0.0},
        {"scenario.name": "new_instances"},
        {"scenario.name": "task_incremental"},
    ],
    ids=["one task", "no memory", "nothing held out", "no new class", "tasks known"],
)
def test_where_nothing_can_be_corrected_nothing_is(tiny: Any, oracle: Any, settings: dict[str, Any]) -> None:
    w = oracle.final(tiny({**WHOLE, **settings}))
    assert set(w[ALPHA].tolist()) == {1.0}
    assert set(w[BETA].tolist()) == {0.0}
    assert all(bool(a.isfinite().all()) for a in w.values())


def test_each_increment_has_its_own_correction(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**WHOLE, "scenario.tasks": 3}
    result, world = tiny(settings), oracle.World.of(tiny_config(settings))
    w = oracle.final(result)
    found = [set(w[ALPHA][task].tolist()) for task in world.new]
    assert [len(f) for f in found] == [1, 1, 1]
    assert found[0] == {1.0}
    assert len({next(iter(f)) for f in found}) == 3


def test_clients_keep_ids_alone(tiny: Any) -> None:
    states = ClientStore(tiny(WHOLE).folder / "clients", 0).get(0, 10**6)
    assert set(states) == {"bic/ids", "bic/priority"}


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    assert all(bool(a.isfinite().all()) for a in oracle.final(tiny({**WHOLE, **hard})).values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("validation", 1.0), ("validation", -0.1), ("distillation", 1.5), ("temperature", 0.0), ("decay", -1.0),
        ("steps", 0), ("fit", "mean"), ("budget", -1),
    ],
)  # fmt: skip
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.bic") as caught:
        build(tiny_config({"strategy": ["bic"], f"options.bic.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_are_seen_once_are_refused(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match="once"):
        build(tiny_config({"strategy": ["bic"], "federation.passes": "once"}))
