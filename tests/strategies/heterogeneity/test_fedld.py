"""FedLD: margin and aggregation against literal loops, whole runs, and plain averaging as the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.heterogeneity.fedld import FedLD, margin_control, principal_update


def zeng(updates: list[Tensor], share: float) -> Tensor:
    """Clients and directions one by one, with the sign of each direction by majority."""
    clients, rows = len(updates), torch.stack(updates)
    gram = torch.tensor([[float(a @ b) / clients for b in updates] for a in updates], dtype=torch.float64)
    _, strength, right = torch.svd(gram)
    total = torch.zeros_like(updates[0])
    for g in updates:
        revised = torch.zeros_like(g)
        for j in range(max(1, int(clients * share))):
            v = rows.T @ right[:, j]
            if sum(float(other @ v) >= 0 for other in updates) < sum(float(other @ v) < 0 for other in updates):
                v = -v
            projection = (g @ v) / (v @ v) * v
            if float(projection.norm()) > 1e-12 * float(g.norm()):
                revised = revised + strength[j] / strength.sum() * g.norm() / projection.norm() * projection
        total = total + revised / clients
    return total


def literal_margin(scores: Tensor, classes: list[int]) -> Tensor:
    """log(1 + the sum of squared probabilities), entry by entry."""
    total = torch.zeros((), dtype=torch.float64)
    for row in scores:
        below = torch.stack([torch.exp(row[c]) for c in classes]).sum()
        total = total + torch.stack([(torch.exp(row[c]) / below) ** 2 for c in classes]).sum()
    return torch.log(1 + total)


def drawn(clients: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clients, size, generator=generator, dtype=torch.float64) + 0.5


@pytest.mark.parametrize(("clients", "size"), [(2, 3), (3, 4), (5, 17), (10, 6), (4, 1)])
@pytest.mark.parametrize("share", [0.4, 0.8, 1.0])
def test_update_equals_the_literal_loop(clients: int, size: int, share: float) -> None:
    # Directions beyond the rank are rounding errors without strength: those of the loop may point anywhere.
    updates = drawn(clients, size)
    torch.testing.assert_close(principal_update(updates, share), zeng(list(updates), share), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scales", [[1.0], [1.0, 3.0, -0.5], [2.0, 2.0, 2.0, 2.0], [0.0, 4.0]])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_updates_along_one_line_are_averaged(scales: list[float], share: float) -> None:
    line = drawn(1, 6)[0]
    updates = torch.stack([s * line for s in scales])
    torch.testing.assert_close(principal_update(updates, share), updates.mean(dim=0), rtol=0, atol=1e-12)


def test_orthogonal_clients_by_hand() -> None:
    updates = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    # Strengths 9/2 and 1/2; the second client has no part along the first direction, nor the first along the second.
    expected = {0.5: [0.5 * 0.9 * 3.0, 0.0], 1.0: [0.5 * 0.9 * 3.0, 0.5 * 0.1 * 1.0]}
    for share, values in expected.items():
        torch.testing.assert_close(principal_update(updates, share), torch.tensor(values))


def test_orthogonal_up_to_rounding_is_orthogonal() -> None:
    turn = torch.linalg.qr(drawn(5, 5, seed=1)).Q
    updates = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ turn[:3]
    products = updates @ updates.T
    assert bool((products - torch.diag(products.diagonal())).any())
    # Strengths 9/3, 4/3 and 1/3: each client has a part along its own direction alone.
    expected = sum(share / 14 * row / 3 for share, row in zip((9.0, 4.0, 1.0), updates, strict=True))
    torch.testing.assert_close(principal_update(updates, 1.0), expected)


def test_nobody_moved_and_a_client_that_did_not() -> None:
    assert principal_update(torch.zeros(3, 4), 0.8).tolist() == [0.0] * 4
    updates = torch.stack([torch.zeros(4), torch.arange(4.0)])
    torch.testing.assert_close(principal_update(updates, 0.8), torch.arange(4.0) / 2)


def test_a_turned_space_turns_the_update() -> None:
    updates = drawn(4, 5)
    turn = torch.linalg.qr(drawn(5, 5, seed=1)).Q
    torch.testing.assert_close(principal_update(updates @ turn, 0.8), principal_update(updates, 0.8) @ turn)


@pytest.mark.parametrize("classes", [[0, 1, 2], [1, 2], [2]])
def test_margin_and_its_gradient(classes: list[int], oracle: Any) -> None:
    scores = drawn(4, 3).requires_grad_()
    mask = torch.tensor([c in classes for c in range(3)])
    ours, theirs = margin_control(scores, mask), literal_margin(scores, classes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (one,), (other,) = torch.autograd.grad(ours, scores), torch.autograd.grad(theirs, scores)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_margin_of_one_class_is_constant() -> None:
    assert margin_control(drawn(3, 2), torch.tensor([True, False])).item() == pytest.approx(math.log(4))


def test_term_is_linear_in_the_weight(oracle: Any) -> None:
    w = oracle.leaves(oracle.model(3, 2, 2, seed=1))
    x = drawn(4, 2)
    step = oracle.step(w, x, [0, 1, 1, 0], known=[0, 1], new=[0, 1])

    def term(weight: float) -> Any:
        return FedLD(FedLD.Options(weight=weight)).loss(step)["margin"]

    slope = (term(0.7) - term(0.0)) / 0.7
    found = oracle.gradient(slope, w)
    expected = oracle.gradient(literal_margin(oracle.logits(w, x), [0, 1]), w)
    assert all(torch.allclose(found[n], expected[n], atol=1e-12) for n in w)


def _method(oracle: Any, weight: float, share: float) -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        scores = oracle.logits(w, x)
        return oracle.cross_entropy(scores, y, local.known) + weight * literal_margin(scores, local.known)

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        if not outcomes:
            return w
        joined = {}
        for n in w:
            updates = [(o.trained[n] - w[n]).flatten() for o in outcomes]
            plain = not local.memory or len(updates[0]) == 1
            update = sum(updates) / len(updates) if plain else zeng(updates, share)
            joined[n] = w[n] + update.view_as(w[n])
        local.memory["rounds"] = 1
        return joined

    return oracle.Method(loss, join=join)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"options.fedld.share": 0.4, "options.fedld.weight": 0.3, "federation.weighting": "uniform"},
        {"federation.clients": 5, "federation.participation": 0.6, "scenario.tasks": 3},
    ],
    ids=["default", "strong", "sampled"],
)
def test_whole_run_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any]) -> None:
    settings = {"strategy": ["fedld"], "seed": 4, **settings}
    method = _method(oracle, settings.get("options.fedld.weight", 0.03), settings.get("options.fedld.share", 0.8))
    expected = oracle.federated(tiny_config(settings), method)
    # Eigenvectors carry rounding errors larger than those of a sum.
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-7


def test_mean_without_margin_is_averaging(tiny: Any, oracle: Any) -> None:
    mean = {"options.fedld.aggregation": "mean", "options.fedld.weight": 0.0}
    plain = oracle.final(tiny({}))
    assert oracle.distance(oracle.final(tiny({"strategy": ["fedld"], **mean})), plain) < 1e-12
    for part in mean:  # each of the two alone changes the model
        alone = {k: v for k, v in mean.items() if k != part}
        assert oracle.distance(oracle.final(tiny({"strategy": ["fedld"], **alone})), plain) > 1e-4


def test_one_client_is_centralised_training(tiny: Any, oracle: Any) -> None:
    ours = oracle.final(tiny({"strategy": ["fedld"], "federation.clients": 1, "options.fedld.weight": 0.0}))
    assert oracle.distance(ours, oracle.final(tiny({"federation.clients": 1}))) < 1e-10


def test_buffers_are_averaged(tiny: Any, oracle: Any) -> None:
    common = {"model.norm": "batch", "federation.rounds": 1, "scenario.tasks": 1}
    ours = oracle.final(tiny({**common, "strategy": ["fedld"], "options.fedld.weight": 0.0}))
    plain = oracle.final(tiny(common))
    buffers = [n for n in plain if "running" in n]
    assert buffers
    assert all(torch.allclose(ours[n], plain[n], atol=1e-12) for n in buffers)


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["fedld"], **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", -0.1), ("weight", math.inf), ("share", 0.0), ("share", 1.1), ("aggregation", "qr")],
)
def test_wrong_options(tiny_config: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=r"options\.fedld") as caught:
        build(tiny_config({"strategy": ["fedld"], f"options.fedld.{key}": value}))
    assert "\n" not in str(caught.value)
