"""CReFF: gradients by class against autograd, a whole round written out, and features that outlive their task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import RunFailed, UsageError
from fedcl.local.client import NamedModels
from fedcl.models.heads import LinearHead
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.heterogeneity._head_gradients import class_gradients, gradient_distance, mean_gradients
from fedcl.strategies.heterogeneity.creff import CReFF
from fedcl.strategy import Predictor

SMALL = {
    "strategy": ["creff"], "options.creff.features": 4, "options.creff.steps": 3, "options.creff.epochs": 2,
    "options.creff.batch_size": 8, "seed": 3,
}  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(result: Any) -> Any:
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    return {n.removeprefix("strategy/creff/"): a for n, a in found.arrays.items() if n.startswith("strategy/creff/")}


def mean_slope(z: Tensor, label: int, weight: Tensor, bias: Tensor, classes: list[int]) -> Tensor:
    """The gradient in the weight of the mean cross entropy of some features of one class, by autograd."""
    rows = weight.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for feature in z:
        scores = {c: rows[c] @ feature + bias[c] for c in classes}
        total = total + torch.log(torch.stack([torch.exp(scores[c] - scores[label]) for c in classes]).sum()) / len(z)
    (slope,) = torch.autograd.grad(total, rows, create_graph=True)
    return slope


def literal_distance(one: Tensor, other: Tensor, classes: list[int]) -> Tensor:
    """``1 - cos`` row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for c in classes:
        norms = (one[c] ** 2).sum().sqrt() * (other[c] ** 2).sum().sqrt()
        total = total + 1 - (one[c] * other[c]).sum() / (norms + 1e-6)
    return total


def test_gradients_by_class_are_autograds() -> None:
    z, weight, bias = drawn(7, 3), drawn(4, 3, seed=1), drawn(4, seed=2)
    labels, known = torch.tensor([0, 2, 2, 0, 3, 2, -1]), torch.tensor([True, False, True, True])
    found = class_gradients(z, z @ weight.T + bias, labels, known)
    for c in range(4):
        mine = z[labels == c]
        expected = len(mine) * mean_slope(mine, c, weight, bias, [0, 2, 3]) if len(mine) else torch.zeros(4, 3)
        torch.testing.assert_close(found[c], expected.to(torch.float64), rtol=0, atol=1e-12)
    sets = torch.stack([z[labels == c][:2] for c in (0, 2)])
    means = mean_gradients(sets, torch.tensor([0, 2]), weight, bias, known.expand(2, -1))
    for place, c in enumerate((0, 2)):
        torch.testing.assert_close(
            means[place], mean_slope(sets[place], c, weight, bias, [0, 2, 3]), rtol=0, atol=1e-12
        )


def test_distance_is_that_of_the_rows_that_count() -> None:
    one, other = drawn(2, 4, 3), drawn(2, 4, 3, seed=1)
    other[0, 0] = 0.0
    rows = torch.tensor([[True, True, False, True], [False, True, True, False]])
    expected = literal_distance(one[0], other[0], [0, 1, 3]) + literal_distance(one[1], other[1], [1, 2])
    torch.testing.assert_close(gradient_distance(one, other, rows), expected, rtol=0, atol=1e-12)
    nothing = torch.zeros(1, 4, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gradient_distance(nothing, one[:1], rows[:1]), nothing)
    assert bool(slope.isfinite().all())


def first_head(*name: object) -> tuple[Tensor, Tensor]:
    """A head of ten classes and eight features as it is drawn under a name."""
    head, seed = LinearHead(8, bias=True), counter.fold(*name, "creff", "rows")
    weight, bias = (head.initial_rows(n, range(10), seed).double() for n in ("weight", "bias"))
    return weight, bias


def hidden(w: Any, x: Tensor) -> Tensor:
    z: Tensor = (x @ w["encoder.1.weight"].T + w["encoder.1.bias"]).clamp(min=0).detach()
    return z


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_round_equals_the_literal_one(tiny: Any, tiny_config: Any, oracle: Any, epochs: int) -> None:
    """Gradients of the received encoder, their mean over holders, matched features, and a head trained on these."""
    settings = {**SMALL, "scenario.tasks": 1, "federation.rounds": 1, "federation.epochs": epochs}
    state, world = state_of(tiny(settings)), oracle.World.of(tiny_config(settings))
    known, key = world.known[0], (3, "server", 0, 0)
    w = oracle.grown(world.start, world, 10)
    weight, bias = first_head(*key)
    features, labels = [], []
    for c in sorted(known):
        slopes = []
        for held in world.held[0]:
            rows = [row for row in held if world.y[row] == c]
            if rows:
                slopes.append(mean_slope(hidden(w, world.x[rows]), c, weight, bias, known).detach())
        if not slopes:
            continue
        target = torch.stack(slopes).mean(dim=0)
        generator = torch.Generator().manual_seed(counter.key(*key, "creff", "features", c) & (2**63 - 1))
        made = torch.randn(4, 8, generator=generator, dtype=torch.float64)
        for _ in range(3):
            leaf = made.clone().requires_grad_()
            distance = literal_distance(mean_slope(leaf, c, weight, bias, known), target, known)
            made = made - 0.1 * torch.autograd.grad(distance, leaf)[0]
        torch.testing.assert_close(state["features"][c], made, rtol=0, atol=1e-9)
        features += list(made)
        labels += [c] * 4
    present = sorted(set(labels))
    assert torch.nonzero(state["filled"]).flatten().tolist() == present
    for epoch in range(2):
        order = counter.permutation(len(labels), *key, "creff", "order", epoch).tolist()
        for at in range(0, len(order), 8):
            leaves = [a.clone().requires_grad_() for a in (weight, bias)]
            batch = order[at : at + 8]
            scores = torch.stack([features[i] for i in batch]) @ leaves[0].T + leaves[1]
            loss = oracle.cross_entropy(scores, [labels[i] for i in batch], present)
            slopes = list(torch.autograd.grad(loss, leaves))
            weight, bias = weight - 0.01 * slopes[0], bias - 0.01 * slopes[1]
    torch.testing.assert_close(state["head.weight"], weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(state["head.bias"], bias, rtol=0, atol=1e-9)


def test_the_model_that_is_sent_is_that_of_plain_averaging(tiny: Any, oracle: Any) -> None:
    assert oracle.identical(oracle.final(tiny(SMALL)), oracle.final(tiny({"seed": 3})))


@pytest.mark.parametrize("stack", [["creff"], ["creff", "replay"]])
def test_features_of_earlier_tasks_stay(tiny: Any, tiny_config: Any, stack: list[str], oracle: Any) -> None:
    """Those of a memory's images too: only the client's own images of the task give gradients."""
    settings = {**SMALL, "strategy": stack}
    world = oracle.World.of(tiny_config(settings))
    first, both = state_of(tiny({**settings, "scenario.first": 1})), state_of(tiny(settings))
    old, new = world.new
    assert first["features"].shape == (5, 4, 8)
    assert torch.equal(first["features"], both["features"][old])
    assert both["filled"].tolist() == [True] * 10
    assert bool(both["features"][new].any(dim=2).all())
    assert not torch.equal(first["head.weight"], both["head.weight"][old])


def test_features_go_on_from_the_round_before(tiny: Any) -> None:
    still = {**SMALL, "options.creff.steps": 0, "scenario.tasks": 1}
    one, three = (state_of(tiny({**still, "federation.rounds": n})) for n in (1, 3))
    assert torch.equal(one["features"], three["features"])
    untrained = state_of(tiny({**still, "options.creff.epochs": 0, "federation.rounds": 3}))
    assert torch.equal(untrained["head.weight"], first_head(3, "server", 0, 2)[0])  # the head is drawn anew


def test_matching_brings_gradients_nearer(tiny: Any) -> None:
    """The features of a class are nearer to its images' gradient the longer they are matched."""
    found = [state_of(tiny({**SMALL, "options.creff.steps": n, "federation.rounds": 1})) for n in (0, 40)]
    assert not torch.equal(found[0]["features"], found[1]["features"])
    weight, bias, z = drawn(4, 3), drawn(4, seed=1), drawn(1, 5, 3, seed=2)
    own, rows = torch.tensor([2]), torch.ones(1, 4, dtype=torch.bool)
    target, distances = mean_gradients(drawn(1, 9, 3, seed=3) + 1, own, weight, bias, rows), []
    for _ in range(60):
        z = z.detach().requires_grad_()
        distances.append(gradient_distance(mean_gradients(z, own, weight, bias, rows), target, rows))
        z = z - 0.1 * torch.autograd.grad(distances[-1], z)[0]
    assert float(distances[-1]) < 0.5 * float(distances[0])


def test_the_retrained_head_predicts(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    result, node = tiny(SMALL), build(tiny_config(SMALL)).node
    w, state = oracle.final(result), state_of(result)
    x = node.store.batch(torch.arange(12), torch.float64)
    predictor = Predictor(w, state, torch.ones(10, dtype=torch.bool), NamedModels(node, {}), strategy="creff")
    expected = hidden(w, x.flatten(1)) @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(CReFF().predict(predictor, x), expected, rtol=0, atol=1e-12)
    assert float((state["head.weight"] - w["head.weight"]).abs().max()) > 1e-3


def test_images_that_are_seen_once_and_a_head_without_bias(tiny: Any, oracle: Any) -> None:
    result = tiny({**SMALL, "federation.passes": "once", "model.head_bias": False, "federation.participation": 0.67})
    state = state_of(result)
    assert "head.bias" not in state
    assert all(bool(a.isfinite().all()) for a in state.values())


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    state = state_of(tiny({**SMALL, **hard}))
    assert all(bool(a.isfinite().all()) for a in state.values())
    assert bool(state["filled"].any())


def test_a_rate_that_is_too_large_is_told(tiny: Any) -> None:
    with pytest.raises(RunFailed, match="diverged") as caught:
        tiny({**SMALL, "options.creff.feature_lr": 1e300})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("options.creff.features", 0), ("options.creff.steps", -1), ("options.creff.feature_lr", 0.0),
        ("options.creff.epochs", -1), ("options.creff.lr", 0.0), ("model.head", "cosine"),
        ("model.feature_norm", "l2"),
    ],
)  # fmt: skip
def test_wrong_settings(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        build(tiny_config({"strategy": ["creff"], name: value}))
    assert name.rpartition(".")[2] in str(caught.value)
    assert "\n" not in str(caught.value)
