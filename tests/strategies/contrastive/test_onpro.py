"""OnPro: prototypes and contrasts against loops, a step written out, whole runs, and the edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.contrastive_losses import (
    class_contrast,
    class_prototypes,
    pair_and_class_contrast,
    prototype_equilibrium,
)
from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.run import RunResult
from fedcl.strategies.contrastive._feedback import mixture
from fedcl.strategies.contrastive.onpro import OnPro, turned_labels, turned_views

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]

SMALL = {"strategy": ["onpro"], "model.projector": "linear", "model.projector_dim": 4}


def unit(rows: Tensor) -> list[Tensor]:
    return [row / row.square().sum().sqrt() for row in rows]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=make, dtype=torch.float64, requires_grad=True)


def means_of(z: list[Tensor], labels: list[int]) -> dict[int, Tensor]:
    return {c: torch.stack([r for r, y in zip(z, labels, strict=True) if y == c]).mean(0) for c in sorted(set(labels))}


def apart(first: Tensor, second: Tensor, labels: list[int], temperature: float) -> Tensor:
    """-1/2K sum over both views of log( exp(p_i p_i' / T) / sum_{a != i} exp(p_i p_a / T) )."""
    one, two = means_of(unit(first), labels), means_of(unit(second), labels)
    rows = unit(torch.stack([*one.values(), *two.values()]))
    total, count = torch.zeros((), dtype=first.dtype), len(one)
    for i in range(2 * count):
        others = torch.stack([torch.exp(rows[i] @ rows[a] / temperature) for a in range(2 * count) if a != i])
        total = total - torch.log(torch.exp(rows[i] @ rows[(i + count) % (2 * count)] / temperature) / others.sum())
    return total / (2 * count)


def of_new(scores: Tensor, labels: list[int]) -> Tensor:
    """The released rule for new images, but for the constant of an image with itself."""
    n, total = len(labels), torch.zeros((), dtype=scores.dtype)
    for i in range(n):
        below = sum(torch.exp(scores[i, a]) for a in range(n) if a != i)
        loss = [-torch.log(torch.exp(scores[i, j]) / below) for j in range(n)]
        own = [j for j in range(n) if labels[j] == labels[i]]
        total = total + loss[(i + n // 2) % n] + 2 * sum(loss[j] for j in own if j != i) / len(own)
    return total / n


def of_replayed(scores: Tensor, labels: list[int]) -> Tensor:
    n, total = len(labels), torch.zeros((), dtype=scores.dtype)
    for i in range(n):
        below = sum(torch.exp(scores[i, a]) for a in range(n))
        own = [j for j in range(n) if labels[j] == labels[i]]
        total = total - sum(torch.log(torch.exp(scores[i, j]) / below) for j in own) / len(own)
    return total / n


def same_gradient(ours: Tensor, theirs: Tensor, at: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    (one,) = torch.autograd.grad(ours, at, retain_graph=True)
    torch.testing.assert_close(one, torch.autograd.grad(theirs, at)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("labels", [[0, 1, 0, 3], [2, 0, 1, 3], [1, 1, 1, 1]], ids=["mixed", "single", "one class"])
def test_equilibrium_is_the_loop_over_prototypes(labels: list[int]) -> None:
    one, two, y = drawn(4, 3), drawn(4, 3, seed=1), torch.tensor(labels)

    def ours(one: Tensor, two: Tensor) -> Tensor:
        z = [torch.nn.functional.normalize(v, dim=1) for v in (one, two)]
        (first, counts), (second, _) = (class_prototypes(v, y, 5) for v in z)
        assert counts.tolist() == [labels.count(c) for c in range(5)]
        return prototype_equilibrium(first, second, counts > 0, 0.5)

    same_gradient(ours(one, two), apart(one, two, labels, 0.5), one)
    (gradient,) = torch.autograd.grad(ours(one, two), one)
    assert bool(gradient.any()) is (len(set(labels)) > 1), "one prototype has nothing to be told from"
    stacked = torch.func.vmap(ours)(torch.stack([one, two]), torch.stack([two, one]))
    torch.testing.assert_close(stacked, torch.stack([ours(one, two), ours(two, one)]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("labels", [[0, 1, 0], [2, 0, 1], [1, 1, 1], [0]])
def test_contrasts_of_turned_images_are_loops(labels: list[int]) -> None:
    twice = [*labels, *labels]
    scores = drawn(len(twice), len(twice))
    same_gradient(pair_and_class_contrast(scores, torch.tensor(twice)), of_new(scores, twice), scores)
    same_gradient(class_contrast(scores, torch.tensor(twice)), of_replayed(scores, twice), scores)


def test_turned_views() -> None:
    one, two = torch.arange(4.0).view(1, 1, 2, 2), torch.arange(4.0, 8.0).view(1, 1, 2, 2)
    found = turned_views(one, two).view(8, 4).tolist()
    assert found[:4] == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    assert found[4:] == [[v + 4 for v in row] for row in found[:4]]
    assert turned_labels(torch.tensor([2]), 10).tolist() == [2, 12, 22, 32, 2, 12, 22, 32]


def made(oracle: ModuleType, task: int) -> tuple[Any, Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """A step of two views of two stream images and three of the memory, a model of three linear maps."""
    labels, w = [3, 4, 0, 1, 3], oracle.model(3, 4, 5, seed=0)
    x = drawn(10, 1, 2, 2, seed=2).detach()
    maps = drawn(3, 6, 4, seed=3)

    def model(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten(1)
        return flat @ maps[0].T, flat @ maps[1, :4].T, flat @ maps[2, :5].T

    def models(x: Tensor, which: Any, mode: str, taps: Any = (), seed: Any = None) -> Any:
        features, embeddings, logits = model(x)
        output = oracle.step(w, x.flatten(1), [0] * len(x), known=[0], new=[0]).output
        return output._replace(features=features, embeddings=embeddings, logits=logits)

    step = oracle.step(w, x, labels * 2, known=[0, 1, 2, 3, 4], new=[3, 4], task=task)
    names = {"stream": torch.tensor([0, 1, 5, 6]), "onpro": torch.tensor([2, 3, 4, 7, 8, 9])}
    batch = type("Rows", (), {"rows": staticmethod(names.__getitem__), "hidden": (), "views": 2})()
    carried = {"means": drawn(5, 4, seed=4).detach(), "present": torch.tensor([True, True, False, True, True])}
    return replace(step, batch=batch, models=models, carried=carried), maps, model


def scores_of(model: Any, x: Tensor, start: int, temperature: float) -> Tensor:
    features, embeddings, _ = model(x)
    f, p = torch.stack(unit(features))[:, start : start + 4], torch.stack(unit(embeddings))
    return (p @ f.T + p @ p.T) / temperature


@pytest.mark.parametrize("task", [0, 1])
def test_a_step_written_out(oracle: ModuleType, task: int) -> None:
    step, maps, model = made(oracle, task)
    strategy = OnPro(OnPro.Options(base=0.34, chance=1.0))
    x, y = step.x, step.y.tolist()
    stream, memory = (x[[0, 1]], x[[5, 6]]), (x[[2, 3, 4]], x[[7, 8, 9]])
    prototypes = apart(model(stream[0])[1], model(stream[1])[1], y[:2], 0.5)
    prototypes = prototypes + apart(model(memory[0])[1], model(memory[1])[1], y[2:5], 0.5)
    start = int(step.integers(2, (1,), "onpro new"))
    turned = [c + 5 * q for q in range(4) for c in y[:2]] * 2
    instances = of_new(scores_of(model, turned_views(*stream), start, 0.07), turned)
    if task == 0:
        ce = oracle.cross_entropy(torch.cat([model(v)[2] for v in stream]), [3, 4, 3, 4], [0, 1, 2, 3, 4])
    else:
        pairs = mixture(step, step.y[2:5], step.carried["means"], step.carried["present"], 0.34, 1.0, 0.6, 0.4)
        assert bool((pairs.share > 0).all())
        images, kinds, ce = [], [], torch.zeros((), dtype=torch.float64)
        for view in memory:
            images.append(torch.stack([(1 - s) * view[i] + s * view[j] for i, j, s in zip(*pairs, strict=True)]))
            for scores, i, j, s in zip(model(images[-1])[2], *(p.tolist() for p in pairs), strict=True):
                for share, place in ((1 - s, i), (s, j)):
                    ce = ce + share * oracle.cross_entropy(scores[None], [y[2 + place]], [0, 1, 2, 3, 4]) / 6
        for place, (i, j) in enumerate(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)):
            kinds.append(y[2 + i] if y[2 + i] == y[2 + j] else 5 + place)
        turned = [c + 8 * q for q in range(4) for c in kinds] * 2
        start = int(step.integers(2, (1,), "onpro replayed"))
        instances = instances + of_replayed(scores_of(model, turned_views(*images), start, 0.07), turned)
    same_gradient(strategy.task_loss(step), ce, maps)
    terms = strategy.loss(step)
    assert set(terms) == {"prototypes", "instances"}
    same_gradient(terms["prototypes"], prototypes, maps)
    same_gradient(terms["instances"], instances, maps)
    half = OnPro(OnPro.Options(base=0.34, chance=1.0, prototypes=0.5, instances=0.25)).loss(made(oracle, task)[0])
    assert half["prototypes"].item() == pytest.approx(terms["prototypes"].item() / 2)
    assert half["instances"].item() == pytest.approx(terms["instances"].item() / 4)


def test_the_prototypes_of_a_step_are_carried(oracle: ModuleType) -> None:
    step, _, model = made(oracle, 1)
    found = OnPro().carry(step, {}, {})
    z = unit(model(step.x[[2, 3, 4, 7, 8, 9]])[1])
    expected = means_of(z, [0, 1, 3] * 2)
    assert found["present"].tolist() == [True, True, False, True, False]
    for c in range(5):
        torch.testing.assert_close(found["means"][c], expected.get(c, torch.zeros(4, dtype=torch.float64)).detach())
    assert not found["means"].requires_grad


def test_only_replay_is_the_literal_loop(tiny: Run, tiny_config: Configure, oracle: ModuleType) -> None:
    """Without contrast and mixing, after the first task every image so far counts in the cross entropy alike."""
    settings = {
        **SMALL, "federation.clients": 1, "partition.name": "iid", "federation.batch_size": 1000, "data.limit": 4,
        "scenario.tasks": 3, "options.onpro": {
            "prototypes": 0.0, "instances": 0.0, "chance": 0.0, "budget": 10**6, "batch_size": 1000, "per_class": 0,
        },
    }  # fmt: skip

    def loss(w: Any, x: Tensor, y: list[int], local: Any) -> Any:
        rows = [i for task in local.world.held[: local.task + 1] for i in task[0]] if local.task else []
        images, labels = (local.world.x[rows], [local.world.y[i] for i in rows]) if rows else (x, y)
        return oracle.cross_entropy(oracle.logits(w, images), labels, local.known)

    expected = oracle.federated(tiny_config(settings), oracle.Method(loss))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-9


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor, Tensor]]:
    """(client seed, what a step was given, what it carried on), as the run goes."""
    seen: list[tuple[int, Tensor, Tensor]] = []
    original = OnPro.carry

    def carry(self: OnPro, step: Any, grads: Any, params: Any) -> Any:
        found = original(self, step, grads, params)
        seen.append((int(step.index), step.carried["means"].clone(), found["means"].clone()))
        return found

    monkeypatch.setattr(OnPro, "carry", carry)
    return seen


@pytest.mark.parametrize("pooled", [False, True])
def test_prototypes_go_from_step_to_step(tiny: Run, monkeypatch: pytest.MonkeyPatch, pooled: bool) -> None:
    seen = noted(monkeypatch)
    tiny({
        **SMALL, "federation.clients": 1, "partition.name": "iid", "federation.batch_size": 20, "data.limit": 12,
        "engine.path": "sequential", "options.onpro.pooled": pooled, "evaluate.flops": False, "scenario.tasks": 1,
    })  # fmt: skip
    assert [index for index, _, _ in seen] == [0, 1, 2, 3, 4, 5] * 2
    for (index, given, _), (_, _, left) in zip(seen[1:], seen, strict=False):
        if index or pooled:  # the server of one client pools nothing but that client's last
            torch.testing.assert_close(given, left)
        else:
            assert not given.any()
    assert bool(seen[-1][2].any())


def test_pooled_prototypes_are_means_over_clients() -> None:
    old = {"means": torch.tensor([[9.0], [8.0]]), "present": torch.tensor([True, True])}
    uploads = {"sums": torch.tensor([[6.0], [0.0], [0.0]]), "counts": torch.tensor([2, 0, 0])}
    for state, means, present in (
        ({}, [3.0, 0.0, 0.0], [True, False, False]),
        (old, [3.0, 8.0, 0.0], [True, True, False]),
    ):
        server: Any = SimpleNamespace(arrays={}, state=state, uploads=uploads)
        _, after = OnPro().after_aggregate(server)
        assert after["means"].flatten().tolist() == means
        assert after["present"].tolist() == present
    nothing: Any = SimpleNamespace(arrays={}, state=old, uploads={})
    assert OnPro().after_aggregate(nothing)[1] is old


def test_prototypes_are_sent_only_where_they_are_pooled(tiny: Run) -> None:
    none, pooled = (tiny({**SMALL, "options.onpro.pooled": p}).summary for p in (False, True))
    # Clients times classes in each round: up a sum and a count of each, down a mean and a flag from the second on.
    assert pooled["bytes_up"] - none["bytes_up"] == 3 * (5 + 5 + 10 + 10) * (4 + 1) * 8
    assert pooled["bytes_down"] - none["bytes_down"] == 3 * (5 + 5 + 10) * (4 * 8 + 1)


def test_hard_settings(tiny: Run, oracle: ModuleType, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({**SMALL, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


def test_a_client_whose_new_images_have_no_label_learns_from_its_memory(
    tiny: Run, tiny_config: Configure, oracle: ModuleType
) -> None:
    """Another strategy of the stack trains on them, and OnPro sees the labelled images of the memory alone."""
    few = {
        **SMALL, "strategy": ["onpro", "simclr"], "options.simclr.weight": 0.1, "labels.rate": 0.1,
        "partition.alpha": 0.1, "seed": 3, "federation.clients": 4, "engine.path": "sequential",
    }  # fmt: skip
    split = build(tiny_config(few)).split
    assert split.unlabelled is not None
    assert [len(split.train[0][0]) > 0, len(split.train[1][0]), len(split.unlabelled[1][0]) > 0] == [True, 0, True]
    found = oracle.final(tiny(few))
    assert all(bool(a.isfinite().all()) for a in found.values())


def test_images_seen_once(tiny: Run, oracle: ModuleType) -> None:
    once = {**SMALL, "federation.passes": "once", "federation.epochs": None}
    found = oracle.final(tiny({**once, "options.onpro.pooled": True}))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, oracle.final(tiny(once))) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("base", 1.5), ("chance", -0.1), ("temperature", 0.0), ("per_class", -1), ("instances", math.inf), ("beta", 1)],
)
def test_wrong_options(tiny_config: Configure, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.onpro") as caught:
        build(tiny_config({**SMALL, f"options.onpro.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wide_projector_is_refused(tiny: Run) -> None:
    with pytest.raises(UsageError, match=r"model\.projector_dim"):
        tiny({**SMALL, "model.projector_dim": 9})
