"""NAPA-VQ: neighbourhoods against loops over single images, a whole first task against a literal one, later terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import RunFailed, UsageError
from fedcl.models.model import Output
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.prototype._neighbours import grown_edges, moved_edges, neighbour_loss, neighbour_mix
from fedcl.strategies.prototype.napa_vq import VECTORS, NapaVQ, distance_logits, rotated
from fedcl.strategy import Batch, Predictor

Run = Callable[[Mapping[str, Any]], Any]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other) ** 2).sum()


def literal_neighbours(x: Tensor, vectors: Tensor, labels: list[int], edges: list[list[float]]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(x, labels, strict=True):
        near = [m for m, edge in enumerate(edges[label]) if edge > 0 and m != label]
        if not near:
            continue
        distances = [squared(row, vectors[m]) for m in near]
        weights = [math.exp(-0.001 * d.item()) for d in distances]
        around = sum(w / sum(weights) * d for w, d in zip(weights, distances, strict=True))
        excess = squared(row, vectors[label]) - around
        if excess.item() > 0:
            total = total + excess
    return total / len(labels)


def literal_moved(edges: list[list[float]], x: Tensor, vectors: Tensor, known: list[int], k: int) -> list[list[float]]:
    """Image by image, as each comes."""
    edges = [list(row) for row in edges]
    for row in x:
        first = min(known, key=lambda m: squared(row, vectors[m]).item())
        others = sorted((m for m in known if m != first), key=lambda m: squared(vectors[first], vectors[m]).item())
        for m in range(len(vectors)):
            edges[first][m] = 1.0 if m in others[:k] else 0.9 * edges[first][m]
    edges = [[0.0 if e < 0.9**10 else e for e in row] for row in edges]
    size = range(len(vectors))
    return [[1.0 if i == j else (edges[i][j] + edges[j][i]) / 2 for j in size] for i in size]


def test_neighbour_loss_and_its_gradients() -> None:
    x, vectors = normal(6, 3, seed=0).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    edges = [[1, 1, 0.5, 0, 0], [1, 1, 0, 0, 0.4], [0, 0, 1, 0, 0], [1, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    labels = [0, 1, 2, 3, 4, 0]
    found = neighbour_loss(x, vectors, torch.tensor(labels), torch.tensor(edges, dtype=torch.float64))
    expected = literal_neighbours(x, vectors, labels, edges)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert found.item() > 0.1
    slopes, wanted = (torch.autograd.grad(v, [x, vectors]) for v in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(slopes, wanted, strict=True))
    alone = neighbour_loss(x, vectors, torch.tensor(labels), torch.eye(5, dtype=torch.float64))
    assert alone.item() == 0.0
    assert not torch.autograd.grad(alone, x)[0].any()


@pytest.mark.parametrize(("k", "known"), [(2, [0, 1, 2, 3, 4, 5]), (15, [0, 1, 2, 3, 4, 5]), (1, [1, 2, 4]), (3, [2])])
def test_edges_move_as_image_by_image(k: int, known: list[int]) -> None:
    vectors, mask = normal(6, 3, seed=2), torch.tensor([m in known for m in range(6)])
    edges = grown_edges(torch.zeros(0, 0, dtype=torch.float64), 6)
    literal = edges.tolist()
    for batch in range(6):
        x = 2 * normal(4, 3, seed=10 + batch)
        vectors = vectors + 0.5 * normal(6, 3, seed=30 + batch)
        edges = moved_edges(edges, x, vectors, mask, k)
        literal = literal_moved(literal, x, vectors, known, k)
        assert edges.tolist() == [pytest.approx(row, abs=1e-14) for row in literal]
    assert torch.equal(edges, edges.mT)
    if k == 2:
        assert bool(((edges > 0) & (edges < 1)).any()), "some faded"


def test_an_edge_fades_and_is_cut() -> None:
    vectors = torch.tensor([[0.0], [1.0], [5.0]])
    edges = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    two = moved_edges(edges, torch.zeros(2, 1), vectors, torch.ones(3, dtype=torch.bool), 1)
    assert two[0].tolist() == pytest.approx([1.0, 0.5, (0.9**2 + 1) / 2])
    many = moved_edges(edges, torch.zeros(11, 1), vectors, torch.ones(3, dtype=torch.bool), 1)
    assert many[0].tolist() == pytest.approx([1.0, 0.5, 0.5]), "cut in one direction"


def test_grown_edges_keep_what_was() -> None:
    edges = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    assert grown_edges(edges, 3)[:2, :2].tolist() == edges.tolist()
    assert grown_edges(edges, 3)[2].tolist() == [0.0, 0.0, 1.0]


def test_mixed_prototypes_are_of_a_class_and_its_neighbour() -> None:
    prototypes, held = normal(4, 2, seed=3), torch.tensor([True, True, True, False])
    edges = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    draw = torch.Generator().manual_seed(0)
    first, second, share = (torch.rand(s, generator=draw, dtype=torch.float64) for s in ((400, 4), (400, 4), (400,)))
    found, labels = neighbour_mix(prototypes, held, edges, first, second, share)
    pairs = set()
    for i in range(400):
        c = max((0, 1, 2), key=lambda m: first[i, m].item())
        n = max({0: [1], 1: [0, 2], 2: [1]}[c], key=lambda m: second[i, m].item())
        gamma = 0.5 + 0.5 * share[i]
        assert labels[i].item() == c
        assert torch.allclose(found[i], gamma * prototypes[c] + (1 - gamma) * prototypes[n])
        pairs.add((c, n))
    assert pairs == {(0, 1), (1, 0), (1, 2), (2, 1)}
    alone, labels = neighbour_mix(prototypes, held, torch.eye(4), first, second, share)
    assert torch.allclose(alone, prototypes[labels])


def test_rotations_stand_in_blocks() -> None:
    pixels = torch.arange(18, dtype=torch.uint8).reshape(2, 1, 3, 3)
    zeros = torch.zeros(2, dtype=torch.int64)
    batch = rotated(Batch(pixels, torch.tensor([4, 1]), zeros, zeros))
    assert batch.views == 4
    assert batch.labels.tolist() == [4, 1] * 4
    for k in range(4):
        for image in range(2):
            turned = np.rot90(pixels[image, 0].numpy(), k)
            assert batch.pixels[2 * k + image, 0].tolist() == turned.tolist()
    with pytest.raises(ValueError, match="not square"):
        rotated(Batch(pixels[..., :2], torch.tensor([4, 1]), zeros, zeros))


def test_distance_logits() -> None:
    x, vectors = normal(3, 2, seed=4), normal(5, 2, seed=5)
    expected = [[-math.sqrt(squared(row, v).item()) / 0.1 for v in vectors] for row in x]
    assert distance_logits(x, vectors, 0.1).tolist() == [pytest.approx(row, rel=1e-12) for row in expected]
    zero = torch.zeros(1, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(distance_logits(zero, torch.zeros(1, 2), 0.1).sum(), zero)
    assert bool(slope.isfinite().all())


def first_task(oracle: Any, config: Any) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Encoder, vectors and edges after the first task, in plain loops."""
    world = oracle.World.of(config)
    w = {n: a for n, a in world.start.items() if n.startswith("encoder.")}
    width, classes = len(w["encoder.1.bias"]), len(world.known[0])
    rows = [counter.uniform(4 * width, config.seed, "init", "napa_vq", world.order[c]) for c in range(classes)]
    start = (np.stack(rows) * 2 - 1) / width**0.5
    w["v"] = torch.from_numpy(start.astype(np.float32)).to(torch.float64).reshape(-1, width)
    edges = [[float(i == j) for j in range(4 * classes)] for i in range(4 * classes)]
    every = list(range(4 * classes))
    for round_ in range(config.federation.rounds):
        sums, total, found = {n: torch.zeros_like(a) for n, a in w.items()}, 0, []
        for client in range(config.federation.clients):
            own, near, held = dict(w), edges, world.held[0][client]
            velocity = {n: torch.zeros_like(a) for n, a in w.items()}
            order = counter.permutation(len(held), config.seed, "client", client, 0, round_, "order", 0).tolist()
            for at in range(0, len(held), config.federation.batch_size):
                batch = [held[i] for i in order[at : at + config.federation.batch_size]]
                images = world.x[batch].reshape(-1, 8, 8)
                x = torch.cat([torch.rot90(images, k, (1, 2)) for k in range(4)]).reshape(-1, 64)
                labels = [4 * world.y[i] + k for k in range(4) for i in batch]
                own = oracle.leaves(own)
                hidden = x @ own["encoder.1.weight"].T + own["encoder.1.bias"]
                f = hidden * (hidden > 0)
                scores = torch.stack([torch.stack([-squared(row, v).sqrt() / 0.1 for v in own["v"]]) for row in f])
                loss = oracle.cross_entropy(scores, labels, every) + literal_neighbours(f, own["v"], labels, near)
                grads = oracle.gradient(loss, own)
                for n in own:
                    velocity[n] = 0.9 * velocity[n] + grads[n]
                    scale = 3.0 if n == "v" else 1.0
                    own[n] = (own[n] - scale * config.optimiser.lr * velocity[n]).detach()
                near = literal_moved(near, f.detach(), own["v"], every, 2)
            found.append(near)
            total += len(held)
            for n in sums:
                sums[n] += len(held) * own[n].detach()
        w = {n: a / total for n, a in sums.items()}
        edges = [[max(one[i][j] for one in found) for j in every] for i in every]
    return w, edges


def test_a_first_task_equals_the_literal_loop(tiny: Run, tiny_config: Any, oracle: Any) -> None:
    settings = {
        "strategy": ["napa_vq"], "scenario.tasks": 5, "scenario.first": 1, "data.limit": 5, "federation.clients": 2,
        "options.napa_vq.neighbours": 2, "options.napa_vq.lr_scale": 3.0, "optimiser.lr": 0.01, "model.width": 5,
    }  # fmt: skip
    result = tiny(settings)
    w, edges = first_task(oracle, tiny_config(settings))
    final = oracle.final(result)
    assert torch.allclose(final["encoder.1.weight"], w["encoder.1.weight"], atol=1e-10)
    assert torch.allclose(final[VECTORS].flatten(0, 1), w["v"], atol=1e-10)
    assert kept(result)["edges"].tolist() == [pytest.approx(row, abs=1e-10) for row in edges]


def kept(result: Any) -> dict[str, Tensor]:
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    prefix = "strategy/napa_vq/"
    return {n.removeprefix(prefix): a for n, a in found.arrays.items() if n.startswith(prefix)}


def later_step(oracle: Any) -> Any:
    """A step of a second task: features are the images, those of the previous model half of them."""
    w = {"head.weight": torch.zeros(3, 2), VECTORS: normal(3, 4, 2, seed=6).requires_grad_()}
    x = normal(8, 2, seed=7).requires_grad_()
    down = {"prototypes": normal(3, 2, seed=8), "held": torch.tensor([True, True, False])}
    step = oracle.step(w, x, [2] * 8, known=[0, 1, 2], new=[2], down=down)

    def models(x: Tensor, which: Any, mode: str, taps: Any = (), seed: Any = None) -> Output:
        return Output(x / 2 if which == "stage:previous" else x, None, torch.zeros(len(x), 3), {})

    edges = torch.ones(12, 12, dtype=torch.float64)
    batch = replace(step.batch, views=4)
    return replace(step, models=models, batch=batch, carried={"edges": edges})


def test_terms_of_a_later_task(oracle: Any) -> None:
    step = later_step(oracle)
    terms = NapaVQ().loss(step)
    x, vectors = step.x, step.params[VECTORS].flatten(0, 1)
    half = torch.stack([squared(row, row / 2) for row in x])
    assert terms["distillation"].item() == pytest.approx(10 * half.sum().sqrt().item(), rel=1e-12)
    each = NapaVQ(NapaVQ.Options(norm="image")).loss(step)["distillation"]
    assert each.item() == pytest.approx(10 * half.sqrt().mean().item(), rel=1e-12)
    labels = [8, 8, 9, 9, 10, 10, 11, 11]
    ones = [[1.0] * 12] * 12
    assert terms["neighbours"].item() == pytest.approx(literal_neighbours(x, vectors, labels, ones).item(), rel=1e-12)
    draws = [step.uniform(shape, tag) for shape, tag in (((64, 3), "class"), ((64, 3), "neighbour"), ((64,), "share"))]
    mixed, classes = neighbour_mix(step.down["prototypes"], step.down["held"], torch.ones(3, 3), *draws)
    assert set(classes.tolist()) == {0, 1}
    scores = torch.stack([torch.stack([-squared(row, v).sqrt() / 0.1 for v in vectors]) for row in mixed])
    wanted = oracle.cross_entropy(scores, [4 * c for c in classes.tolist()], list(range(12)))
    assert terms["prototypes"].item() == pytest.approx(10 * wanted.item(), rel=1e-10)
    repelled = literal_neighbours(mixed, vectors, [4 * c for c in classes.tolist()], ones)
    assert terms["mixed"].item() == pytest.approx(repelled.item(), rel=1e-10)


def test_vectors_of_old_classes_stay_and_prototypes_are_pooled(tiny: Run, tiny_config: Any, oracle: Any) -> None:
    settings = {"strategy": ["napa_vq"], "optimiser.weight_decay": 0.01, "optimiser.lr": 0.01}
    one, two = tiny({**settings, "scenario.first": 1}), tiny(settings)
    before, after = oracle.final(one), oracle.final(two)
    assert torch.allclose(after[VECTORS][:5], before[VECTORS], atol=1e-14)
    assert not torch.allclose(after["encoder.1.weight"], before["encoder.1.weight"], atol=1e-3)
    world, state = oracle.World.of(tiny_config(settings)), kept(two)
    for model, classes in ((before, world.new[0]), (after, world.new[1])):
        for c in classes:
            x = world.x[[i for i, y in enumerate(world.y) if y == c]]
            hidden = x @ model["encoder.1.weight"].T + model["encoder.1.bias"]
            assert torch.allclose(state["sums"][c], (hidden * (hidden > 0)).sum(dim=0), atol=1e-10)
            assert state["counts"][c].item() == len(x)


def test_the_nearest_direction_predicts() -> None:
    vectors = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 9.0]] * 4])
    vectors[:, 1:] = 7.0

    def models(x: Tensor, which: Any, mode: str, taps: Any = (), seed: Any = None) -> Output:
        return Output(x, None, torch.zeros(len(x), 2), {})

    predictor = Predictor({VECTORS: vectors}, {}, torch.tensor([True, True]), models)  # type: ignore[arg-type]
    scores = NapaVQ().predict(predictor, torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 0.0]]))
    assert scores.tolist() == [pytest.approx([0.6, 0.8]), pytest.approx([1.0, 0.0]), [0.0, 0.0]]


def test_other_views_are_refused(tiny: Run) -> None:
    with pytest.raises(RunFailed, match="no other strategy") as caught:
        tiny({"strategy": ["napa_vq", "simclr"]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("neighbours", 0), ("weight", -1), ("prototypes", -1), ("distillation", float("inf")),
     ("mixed", 0), ("lr_scale", 0), ("norm", "sum"), ("tau", 1)],
)  # fmt: skip
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.napa_vq") as caught:
        build(tiny_config({"strategy": ["napa_vq"], f"options.napa_vq.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
