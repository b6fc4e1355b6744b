"""FedBR: its terms against literal loops, one step of a run by hand, and how pseudo-images come about."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.check.lab import read
from fedcl.errors import UsageError
from fedcl.strategies.heterogeneity.fedbr import FedBR, average_images, soft_cross_entropy

ONE_STEP = {
    "strategy": ["fedbr"], "scenario.tasks": 1, "federation.clients": 1, "federation.rounds": 1, "data.limit": 1,
    "federation.batch_size": 64, "optimiser.momentum": 0.0, "options.fedbr.images": 1, "options.fedbr.averaged": 10,
}  # fmt: skip
"""Ten images, whose mean is the one pseudo-image, in one batch."""


def soft(scores: Tensor, target: Tensor, classes: list[int]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, q in zip(scores, target, strict=True):
        below = torch.stack([torch.exp(row[c]) for c in classes]).sum()
        total = total - torch.stack([q[c] * torch.log(torch.exp(row[c]) / below) for c in classes]).sum()
    return total / len(scores)


def hidden(w: Any, x: Tensor) -> Any:
    out = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return out * (out > 0)


def projected(w: Any, z: Tensor) -> Tensor:
    prefix = "extra.fedbr.projection."
    for layer in ("0", "2", "4"):
        z = z @ w[f"{prefix}{layer}.weight"].T + w[f"{prefix}{layer}.bias"]
        z = z if layer == "4" else z * (z > 0)
    return z


def mean_l(w: Any, one: Tensor, target: Tensor, other: Tensor, tau_1: float, tau_2: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b, c in zip(projected(w, one), projected(w, target), projected(w, other), strict=True):
        near, far = (a @ z / (a.norm() * z.norm()) for z in (b, c))
        top = torch.exp(tau_1 * near)
        total = total + torch.log(top / (top + torch.exp(tau_2 * far)))
    return total / len(one)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 2], [1]])
def test_soft_cross_entropy_and_its_gradient(classes: list[int]) -> None:
    scores, mask = drawn(4, 3).requires_grad_(), torch.tensor([c in classes for c in range(3)])
    target = torch.where(mask, drawn(4, 3).exp(), 0.0)
    target = target / target.sum(dim=1, keepdim=True)
    ours, theirs = soft_cross_entropy(scores, target, mask), soft(scores, target, classes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (one,), (other,) = torch.autograd.grad(ours, scores), torch.autograd.grad(theirs, scores)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"mu": 2.0, "weight": 0.3, "tau_global": 1.0, "tau_local": 3.0}, {"mu": 0.0}])
def test_a_step_by_hand(tiny: Any, tiny_config: Any, oracle: Any, options: dict[str, float]) -> None:
    settings = ONE_STEP | {f"options.fedbr.{k}": v for k, v in options.items()}
    config = tiny_config(settings)
    world = oracle.World.of(config)
    store = build(config).node.store
    rows = [
        world.held[0][0][i] for i in oracle.counter.permutation(10, config.seed, "client", 0, 0, 0, "order", 0).tolist()
    ]
    assert len(rows) == 10
    pixels = average_images(store, torch.arange(10), 10, "all")
    assert pixels.tolist() == store.gather(torch.arange(10)).double().mean(dim=0).round().tolist()
    pseudo = store.standardise(store.pixels(pixels[None], torch.float64)).flatten(1)
    w = oracle.leaves(oracle.grown(world.start, world, 10))
    chosen = {"mu": 0.5, "weight": 1.0, "tau_global": 2.0, "tau_local": 2.0} | options
    x, classes = world.x[rows], list(range(10))
    features, own, received = hidden(w, pseudo), hidden(w, x[:1]), hidden(w, pseudo).detach()
    adversary = mean_l(w, features.detach(), received, own.detach(), chosen["tau_global"], chosen["tau_local"])
    likeness = mean_l(w, features, received, own, chosen["tau_global"], chosen["tau_local"])
    supervised = oracle.cross_entropy(oracle.logits(w, x), [world.y[r] for r in rows], classes)
    flat = soft(oracle.logits(w, pseudo), torch.full((1, 10), 0.1, dtype=torch.float64), classes)
    model = oracle.gradient(supervised - chosen["mu"] * likeness + chosen["weight"] * flat, w)
    projection = oracle.gradient(adversary, w)
    found = oracle.final(tiny(settings))
    for n in w:
        slope = projection[n] if n.startswith("extra.") else model[n]
        torch.testing.assert_close(found[n], w[n].detach() - config.optimiser.lr * slope, rtol=0, atol=1e-10)
    assert max(float(projection[n].abs().max()) for n in w if n.startswith("extra.")) > 1e-4


def test_no_weight_is_averaging(tiny: Any, oracle: Any) -> None:
    zero = {"options.fedbr.mu": 0.0, "options.fedbr.weight": 0.0}
    plain, ours = oracle.final(tiny({})), oracle.final(tiny({"strategy": ["fedbr"], **zero}))
    assert oracle.distance({n: ours[n] for n in plain}, plain) < 1e-12
    assert any(n.startswith("extra.fedbr.projection.") for n in ours)
    both = oracle.final(tiny({"strategy": ["fedbr"]}))
    assert oracle.distance({n: both[n] for n in plain}, plain) > 1e-4


def test_pseudo_images_are_made_once_of_single_clients(tiny: Any, tiny_config: Any) -> None:
    settings = {"strategy": ["fedbr"], "options.fedbr.averaged": 1, "options.fedbr.images": 12}
    store = build(tiny_config(settings)).node.store
    first = read(tiny({**settings, "scenario.tasks": 1}).folder).server["strategy/fedbr/images"]
    assert first.shape == (12, 1, 8, 8)
    assert first.dtype == torch.uint8
    everything = store.gather(torch.arange(len(store)))
    for image in first:  # the mean of one image is that image
        assert bool((everything == image).flatten(1).all(dim=1).any())
    assert len({tuple(image.flatten().tolist()) for image in first}) > 6
    one, two = (read(tiny({**settings, "federation.rounds": r}).folder).server for r in (1, 2))
    assert torch.equal(one["strategy/fedbr/images"], two["strategy/fedbr/images"])


def test_who_is_asked_for_a_pseudo_image_depends_on_the_seed() -> None:
    def asked(seed: int) -> list[int]:
        owners: list[int] = []

        def exchange(function: Any, clients: Any = "holders", down: Any = None) -> Any:
            owners.extend(down.get("owners", torch.zeros(0)).tolist())
            return {"present": torch.ones(4, dtype=torch.int64), "images": torch.zeros(1)}

        server: Any = SimpleNamespace(state={}, num_clients=4, key=(seed, "server", 0, 0), exchange=exchange)
        FedBR(FedBR.Options()).begin_task(server)
        return owners

    assert len(asked(0)) == 32
    assert set(asked(0)) == {0, 1, 2, 3}
    assert asked(0) == asked(0)
    assert asked(0) != asked(1)


def test_public_images_are_mixed_with_the_clients(tiny: Any, oracle: Any) -> None:
    public = {"strategy": ["fedbr"], "options.fedbr.source": "public", "partition.public": 2}
    found = oracle.final(tiny(public))
    assert all(bool(a.isfinite().all()) for a in found.values())
    one, other = (oracle.final(tiny({**public, "engine.path": path})) for path in ("sequential", "stacked"))
    assert oracle.distance(one, other) < 1e-9


def test_public_images_are_needed(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match=r"partition\.public"):
        build(tiny_config({"strategy": ["fedbr"], "options.fedbr.source": "public"}))


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["fedbr"], **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("key", "value"), [("mu", -1.0), ("weight", math.inf), ("images", 0), ("averaged", 0), ("source", "noise")]
)
def test_wrong_options(tiny_config: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=r"options\.fedbr") as caught:
        build(tiny_config({"strategy": ["fedbr"], f"options.fedbr.{key}": value}))
    assert "\n" not in str(caught.value)
