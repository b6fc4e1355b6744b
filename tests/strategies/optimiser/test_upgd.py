"""UPGD: utilities and protection by hand, exact second derivatives, and a round against a literal loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import RunFailed, UsageError
from fedcl.strategies.optimiser.upgd import curvatures, protection, trace, utility

ONE = {"strategy": ["upgd"], "scenario.tasks": 1, "federation.rounds": 2, "optimiser.momentum": 0.0, "seed": 8,
       "options.upgd.noise": 0.0, "options.upgd.decay": 0.9, "optimiser.weight_decay": 0.01}  # fmt: skip


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_utility_is_the_increase_of_a_quadratic_loss() -> None:
    w, h = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([3.0, 0.5], dtype=torch.float64)

    def loss(v: Any) -> Any:
        return 0.5 * (h * (v - 1).square()).sum()

    found = utility(w, h * (w - 1), h)
    for i in range(2):
        without = w.clone()
        without[i] = 0
        assert found[i].item() == pytest.approx(float(loss(without) - loss(w)))
    assert trace(torch.tensor(1.0), torch.tensor(3.0), 0.75).item() == 1.5


def test_protection_is_its_formula() -> None:
    traces = {"a": torch.tensor([[1.0, -2.0], [0.5, 0.0]]), "b": torch.tensor([4.0, -4.0])}
    found = protection(traces, "global")
    for name, u in traces.items():
        wanted = [sigmoid(float(v) / 4.0) for v in u.flatten()]
        assert found[name].flatten().tolist() == pytest.approx(wanted, rel=1e-6)
    local = protection(traces, "local")
    rows = [(1.0, -2.0, 5**0.5), (0.5, 0.0, 0.5)]
    wanted = [sigmoid(v / norm) for *values, norm in rows for v in values]
    assert local["a"].flatten().tolist() == pytest.approx(wanted, rel=1e-6)
    none = protection({"a": torch.tensor([-1.0, -2.0])}, "global")["a"]
    assert float(none.max()) < 1e-20
    assert not protection({"a": torch.zeros(2, 2)}, "local")["a"].isnan().any()


def test_curvatures_are_the_diagonal_of_the_hessian(oracle: Any) -> None:
    w = oracle.model(3, 2, 2, seed=1)
    x, y = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), [0, 1, 1, 0]
    step = oracle.step(w, x, y, known=[0, 1], new=[0, 1])
    found = curvatures(step, list(w))
    sizes = [a.numel() for a in w.values()]

    def loss(flat: Any) -> Any:
        parts = torch.split(flat, sizes)
        return oracle.cross_entropy(
            oracle.logits({n: p.view(w[n].shape) for n, p in zip(w, parts, strict=True)}, x), y, [0, 1]
        )

    whole = torch.autograd.functional.hessian(loss, torch.cat([a.reshape(-1) for a in w.values()]))
    diagonal = torch.cat([found[n].reshape(-1) for n in w])
    assert torch.allclose(diagonal, whole.diagonal(), atol=1e-10)


@pytest.mark.parametrize("path", ["sequential", "stacked"])
@pytest.mark.parametrize("scaling", ["global", "local"])
def test_rounds_equal_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, path: str, scaling: str) -> None:
    settings = {**ONE, "options.upgd.scaling": scaling, "engine.path": path}
    world = oracle.World.of(tiny_config(settings))
    config, known = world.config, world.known[0]
    w = oracle.grown(world.start, world, len(known))
    kept: dict[int, Any] = {}
    for round_ in range(2):
        models, total = [], 0.0
        for client, rows in enumerate(world.held[0]):
            if not rows:
                continue
            own, (u, k) = dict(w), kept.get(client, ({n: torch.zeros_like(a) for n, a in w.items()}, 0))
            order = counter.permutation(len(rows), config.seed, "client", client, 0, round_, "order", 0).tolist()
            for at in range(0, len(rows), 8):
                batch = [rows[i] for i in order[at : at + 8]]
                own = oracle.leaves(own)
                labels = [world.y[i] for i in batch]
                grads = oracle.gradient(oracle.cross_entropy(oracle.logits(own, world.x[batch]), labels, known), own)
                k += 1
                u = {n: 0.9 * u[n] + 0.1 * (-grads[n] * own[n].detach()) for n in own}
                corrected = {n: a / (1 - 0.9**k) for n, a in u.items()}
                top = max(float(a.max()) for a in corrected.values())
                for n in own:
                    c = corrected[n]
                    if scaling == "local":
                        norms = c.norm(dim=1, keepdim=True) if c.dim() > 1 else c.norm()
                        top_n = norms.clamp(min=1e-300)
                    else:
                        top_n = torch.tensor(top, dtype=torch.float64)
                    shield = 1 / (1 + torch.exp(-c / top_n))
                    g = 2.0 * grads[n] * (1 - shield) + 0.01 * own[n]
                    own[n] = (own[n] - 0.1 * g).detach()
            kept[client] = (u, k)
            models.append((len(rows), own))
            total += len(rows)
        w = {n: sum(count / total * m[n] for count, m in models) for n in w}
    assert oracle.distance(oracle.final(tiny(settings)), w) < 1e-10


def test_noise_moves_unprotected_weights_and_is_the_same_again(tiny: Any, oracle: Any) -> None:
    noisy = {**ONE, "options.upgd.noise": 0.1}
    one, two = oracle.final(tiny(noisy)), oracle.final(tiny(noisy))
    assert oracle.identical(one, two)
    assert not oracle.identical(one, oracle.final(tiny(ONE)))


def test_second_order_runs_on_small_networks_only(tiny: Any, oracle: Any) -> None:
    second = {**ONE, "options.upgd.order": "second", "federation.rounds": 1, "data.limit": 4}
    found = oracle.final(tiny(second))
    assert not oracle.identical(found, oracle.final(tiny({**second, "options.upgd.order": "first"})))
    assert all(bool(a.isfinite().all()) for a in found.values())
    with pytest.raises((UsageError, RunFailed), match="20,000"):
        tiny({**second, "model.width": 600})


@pytest.mark.parametrize(("key", "value"), [("decay", 1.0), ("noise", -1.0), ("scale", 0.0), ("order", "third")])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.upgd"):
        build(tiny_config({"strategy": ["upgd"], f"options.upgd.{key}": value}))
