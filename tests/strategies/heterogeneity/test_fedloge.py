"""FedLoGe: the sparse frame against Adam by hand, whole runs with three heads, and both realignments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.call import below
from fedcl.federation.store import ClientStore
from fedcl.local.training import NamedModels
from fedcl.models.heads import SimplexHead
from fedcl.strategies.heterogeneity.fedloge import FedLoGe, SparseFrame, frame_loss, kept_entries, spread
from fedcl.strategy import Predictor

FRAME, OWN = "extra.fedloge.frame.weight", "extra.fedloge.personal."
LOGE = {"strategy": ["fedloge"], "model.head_allocate": "all", "model.width": 12, "options.fedloge.steps": 30}


def literal_loss(rows: Tensor, norm: float) -> Tensor:
    """Norms and nearest angles, row by row."""
    lengths = [torch.sqrt((row * row).sum()) for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        total = total + (lengths[i] - norm) ** 2
        cosines = [(row * rows[j]).sum() / (lengths[i] * lengths[j]) for j in range(len(rows)) if j != i]
        nearest = (
            max(cosines, key=lambda cosine: float(cosine.detach()))
            if cosines
            else torch.tensor(-1.0, dtype=torch.float64)
        )
        total = total - torch.acos(torch.clamp(nearest, -0.99999, 0.99999)) / len(rows)
    return total


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (5, 7), (4, 2)])
def test_loss_of_the_frame_and_its_gradient(shape: tuple[int, int]) -> None:
    rows = drawn(*shape).requires_grad_()
    ours, theirs = frame_loss(rows, 0.1), literal_loss(rows, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (one,), (other,) = torch.autograd.grad(ours, rows), torch.autograd.grad(theirs, rows)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_spreading_is_adam_on_the_kept_entries() -> None:
    start, kept = drawn(4, 6), kept_entries(4, 6, 0.5, 1)
    rows = torch.where(kept, start, torch.zeros_like(start))
    first, second = torch.zeros_like(rows), torch.zeros_like(rows)
    for step in range(1, 8):
        leaf = rows.clone().requires_grad_()
        slope = torch.autograd.grad(literal_loss(leaf, 0.1), leaf)[0] * kept
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rows = rows - 1e-4 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(spread(start, kept, 0.1, 7), rows, rtol=0, atol=1e-10)
    assert torch.equal(spread(start, kept, 0.1, 0), torch.where(kept, start, 0.0))


def test_spreading_widens_the_nearest_angles_and_keeps_the_zeros() -> None:
    classes, dim = 4, 16
    frames = [SparseFrame(dim, 0.6, 0.3, n).initial_rows("weight", list(range(classes)), 0).double() for n in (0, 2000)]
    assert all(int((frame == 0).sum()) == int(0.6 * classes * dim) for frame in frames)
    assert torch.equal(frames[0] == 0, frames[1] == 0)
    norms, cosines = [], []
    for frame in frames:
        norms.append(float((frame.norm(dim=1) - 0.3).abs().max()))
        unit = frame / frame.norm(dim=1, keepdim=True)
        cosines.append(max(float(unit[i] @ unit[j]) for i in range(classes) for j in range(i)))
    assert norms[1] < norms[0]
    assert cosines[1] < -0.2 < cosines[0]  # the best of four is -1/3


def test_a_frame_that_keeps_all_entries_is_equiangular() -> None:
    dense = SparseFrame(16, 0.0, 1.0, 0).initial_rows("weight", list(range(4)), 0).double()
    for i in range(4):
        for j in range(4):
            assert float(dense[i] @ dense[j]) == pytest.approx(1.0 if i == j else -1 / 3, abs=1e-6)


def test_rows_go_by_rank_and_depend_on_the_seed() -> None:
    frame = SparseFrame(6, 0.5, 0.1, 5)
    rows = frame.initial_rows("weight", [7, 2, 5], 1)
    assert torch.equal(rows[[1, 2, 0]], frame.initial_rows("weight", [0, 1, 2], 1))
    assert not torch.equal(rows, frame.initial_rows("weight", [7, 2, 5], 2))
    assert frame.initial_rows("weight", [], 1).shape == (0, 6)


@pytest.mark.parametrize(("count", "dim"), [(3, 3), (10, 8), (1, 4)])
def test_each_class_keeps_an_entry(count: int, dim: int) -> None:
    for seed in range(20):
        kept = kept_entries(count, dim, 0.6, seed)
        assert int((~kept).sum()) == int(0.6 * count * dim)
        assert bool(kept.any(dim=1).all())


def test_a_frame_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"options\.fedloge\.sparsity"):
        SparseFrame(3, 0.9, 0.1, 1).initial_rows("weight", [0, 1, 2], 0)
    with pytest.raises(UsageError, match="10 classes") as caught:
        SparseFrame(8, 0.6, 0.1, 1).initial_rows("weight", list(range(10)), 0)
    assert "\n" not in str(caught.value)


def hidden(w: Any, x: Tensor) -> Any:
    out = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return out * (out > 0)


def scores_of(weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    out = z @ weight.T
    return out if bias is None else out + bias


def private_heads(result: Any) -> dict[int, Any]:
    """The private head of each client that has one."""
    store = ClientStore(result.folder / "clients", 0)
    found = {client: below(store.get(client, 10**9), "private/") for client in store.clients()}
    return {client: arrays for client, arrays in found.items() if arrays}


def held_classes(result: Any) -> dict[int, list[int]]:
    store = ClientStore(result.folder / "clients", 0)
    found = {client: below(store.get(client, 10**9), "fedloge/") for client in store.clients()}
    return {c: torch.nonzero(arrays["held"]).flatten().tolist() for c, arrays in found.items() if arrays}


def test_whole_run_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**LOGE, "seed": 3}
    result = tiny(settings)
    found = oracle.final(result)
    frame = found[FRAME]
    world = oracle.World.of(tiny_config(settings))
    expected_frame = SparseFrame(12, 0.6, 0.1, 30).initial_rows("weight", world.order, 3).double()
    assert torch.equal(frame, expected_frame)
    names = [n for n in world.start if n.startswith(OWN)]
    assert sorted(names) == [OWN + "bias", OWN + "weight"]
    w = oracle.grown({n: a for n, a in world.start.items() if n not in names and n != FRAME}, world, 10)
    other = counter.fold(3, "fedloge", "personal")
    seeded = replace(world, config=replace(world.config, seed=other))
    fresh = oracle.grown({"head.weight": w["head.weight"][:0], "head.bias": w["head.bias"][:0]}, seeded, 10)
    heads: dict[int, Any] = {}
    for task in range(len(world.known)):
        for round_ in range(2):
            outcomes = []
            for client, rows in enumerate(world.held[task]):
                own = heads.get(client, {OWN + "weight": fresh["head.weight"], OWN + "bias": fresh["head.bias"]})

                def loss(m: Any, x: Any, y: Any, local: Any) -> Any:
                    z = hidden(m, x)
                    still = z.detach()
                    three = (
                        scores_of(frame, None, z),
                        scores_of(m["head.weight"], m["head.bias"], still),
                        scores_of(m[OWN + "weight"], m[OWN + "bias"], still),
                    )
                    return sum(oracle.cross_entropy(scores, y, local.known) for scores in three)

                local = oracle.Local(world, task, {**w, **own}, None, {})
                trained = oracle.train(client, round_, local, oracle.Method(loss))
                if trained is None:
                    continue
                heads[client] = {n: trained[n] for n in names}
                outcomes.append((len(rows), trained))
            total = sum(count for count, _ in outcomes)
            w = {n: sum(count * m[n] for count, m in outcomes) / total for n in w}
    assert oracle.distance({n: found[n] for n in w}, w) < 1e-10
    kept = private_heads(result)
    assert kept.keys() == heads.keys()
    assert all(oracle.distance(kept[c], heads[c]) < 1e-10 for c in heads)
    assert float((heads[0][OWN + "weight"] - heads[1][OWN + "weight"]).abs().max()) > 1e-3
    for client, classes in held_classes(result).items():
        assert classes == sorted({world.y[i] for task in world.held for i in task[client]})


def test_the_encoder_learns_from_the_frame_alone(tiny: Any, oracle: Any) -> None:
    """Heads that do not learn leave the encoder's path as it is: it is the same whatever the head's first rows are."""
    one = {n: a for n, a in oracle.final(tiny(LOGE)).items() if n.startswith("encoder.")}
    bare = oracle.final(tiny({**LOGE, "model.head_bias": False}))
    assert oracle.distance(one, {n: bare[n] for n in one}) < 1e-12
    assert FRAME in bare
    assert "head.bias" not in bare


def test_predictions_are_realigned(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**LOGE, "options.fedloge.gamma": 2.0, "partition.name": "classes_per_client", "partition.classes": 2}
    result = tiny(settings)
    w, heads, held = oracle.final(result), private_heads(result), held_classes(result)
    experiment = build(tiny_config(settings))
    known = torch.ones(10, dtype=torch.bool)
    x = drawn(6, 1, 8, 8)
    z = hidden(w, x.flatten(1))
    method = FedLoGe(FedLoGe.Options(gamma=2.0, steps=30))
    models = NamedModels(experiment.node, {})
    whole = method.predict(Predictor(w, {}, known, models, strategy="fedloge"), x)
    newcomer = method.predict(Predictor(w, {}, known, models, client=9, strategy="fedloge"), x)
    assert torch.equal(whole, newcomer)
    for i, feature in enumerate(z):
        for c in range(10):
            row = w["head.weight"][c]
            expected = 2.0 / math.sqrt(float(row @ row)) * float(row @ feature) + float(w["head.bias"][c])
            assert float(whole[i, c]) == pytest.approx(expected, abs=1e-12)
    for client, arrays in heads.items():
        mask = torch.tensor([c in held[client] for c in range(10)])
        assert 0 < int(mask.sum()) < 10
        own = {"held": mask}
        seen = Predictor({**w, **arrays}, {}, known, models, client=client, own=own, strategy="fedloge")
        found = method.predict(seen, x)
        for i, feature in enumerate(z):
            for c in range(10):
                if c not in held[client]:
                    assert float(found[i, c]) < -1e30
                    continue
                psi, phi = w["head.weight"][c], arrays[OWN + "weight"][c]
                shared = math.sqrt(float(phi @ phi)) * float(psi @ feature) + float(w["head.bias"][c])
                local = float(phi @ feature) + float(arrays[OWN + "bias"][c])
                assert float(found[i, c]) == pytest.approx(shared + local, abs=1e-10)


def test_global_and_personal_accuracies_are_those_of_the_realigned_heads(
    tiny: Any, tiny_config: Any, oracle: Any
) -> None:
    settings = {**LOGE, "scenario.tasks": 1, "data.limit": 60, "federation.rounds": 4, "partition.test": "same_mix"}
    result = tiny(settings)
    w, heads, held = oracle.final(result), private_heads(result), held_classes(result)
    experiment = build(tiny_config(settings))
    test, train = experiment.test, experiment.node.store
    every = train.gather(torch.arange(len(train))).to(torch.float64) / 255.0
    mean, std = every.mean(dim=(0, 2, 3), keepdim=True), every.std(dim=(0, 2, 3), keepdim=True, correction=0)
    z = hidden(w, ((test.gather(torch.arange(len(test))).to(torch.float64) / 255.0 - mean) / std).flatten(1))
    labels = torch.as_tensor(experiment.stream.test_labels)
    even = 1.7 * w["head.weight"] / w["head.weight"].norm(dim=1, keepdim=True)
    guess = scores_of(even, w["head.bias"], z).argmax(dim=1)
    assert result.summary["average_accuracy"] == pytest.approx(float((guess == labels).double().mean()))
    right = []
    assert experiment.split.test is not None
    assert experiment.split.test_store == "test"
    for client, rows in enumerate(experiment.split.test[0]):
        own = heads[client]
        shared = w["head.weight"] * own[OWN + "weight"].norm(dim=1, keepdim=True)
        scores = scores_of(shared, w["head.bias"], z) + scores_of(own[OWN + "weight"], own[OWN + "bias"], z)
        mine = torch.tensor([c in held[client] for c in range(10)])
        scores = torch.where(mine, scores, -torch.inf)
        right.append(float((scores.argmax(dim=1) == labels)[torch.as_tensor(rows)].double().mean()))
    assert result.summary["personal"]["average_accuracy"]["mean"] == pytest.approx(float(np.mean(right)))


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({**LOGE, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model.head_allocate": "grow"}, r"model\.head_allocate"),
        ({"model.head": "cosine"}, r"model\.head"),
        ({"options.fedloge.sparsity": 1.0}, r"options\.fedloge"),
        ({"options.fedloge.sparsity": -0.1}, r"options\.fedloge"),
        ({"options.fedloge.norm": 0.0}, r"options\.fedloge"),
        ({"options.fedloge.gamma": math.inf}, r"options\.fedloge"),
        ({"options.fedloge.steps": -1}, r"options\.fedloge"),
    ],
)
def test_wrong_settings(tiny_config: Any, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key) as caught:
        build(tiny_config({**LOGE, **changes}))
    assert "\n" not in str(caught.value)


def test_one_simplex_serves_both() -> None:
    """Nothing is dropped and nothing is spread: the frame is the simplex."""
    ids = [4, 1, 3]
    plain = SimplexHead(5).initial_rows("weight", ids, 2)
    assert torch.equal(SparseFrame(5, 0.0, 1.0, 0).initial_rows("weight", ids, 2), plain)
