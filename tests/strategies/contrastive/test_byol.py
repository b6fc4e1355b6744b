"""BYOL against two rounds written out as loops, with the target network restarted or kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.run import RunResult, run
from fedcl.strategies.contrastive.byol import rising_momentum

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]
OWN = "extra.byol.predictor."


def predicted(z: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Linear, BatchNorm over all rows, ReLU, linear."""
    hidden = z @ w[f"{OWN}0.weight"].T
    mean = hidden.sum(dim=0) / len(z)
    spread = (hidden - mean).square().sum(dim=0) / len(z)
    normed = (hidden - mean) / torch.sqrt(spread + 1e-5) * w[f"{OWN}1.weight"] + w[f"{OWN}1.bias"]
    return torch.relu(normed) @ w[f"{OWN}3.weight"].T + w[f"{OWN}3.bias"]


def embedded(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    hidden = torch.relu(x @ w["encoder.1.weight"].T + w["encoder.1.bias"])
    return hidden @ w["projector.weight"].T + w["projector.bias"]


def grill(q: Tensor, target: Tensor) -> Tensor:
    """Equation 2 both ways: the squared distance of unit vectors, mean over images, both directions added."""
    half, total = len(q) // 2, torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        one, other = q[i], target[(i + half) % len(q)].detach()
        total = total + (one / one.square().sum().sqrt() - other / other.square().sum().sqrt()).square().sum()
    return total / half


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_first_step_moves_by_the_gradient_of_the_loss(rate: float, moves_by: Callable[..., None]) -> None:
    moves_by("byol", lambda z, w: grill(predicted(z, w), z), rate)


@pytest.mark.parametrize(
    ("target", "rounds", "momenta"),
    [("kept", 0, (0.7, 0.7, 0.7)), ("received", 0, (0.7, 0.7, 0.7)), ("kept", 2, (0.7, 0.85, 1.0))],
)
def test_three_rounds_are_those_of_a_loop(
    target: str, rounds: int, momenta: tuple[float, ...], one_step: dict[str, Any], tiny_config: Configure,
    oracle: ModuleType, shown: Callable[..., Tensor],
) -> None:  # fmt: skip
    """One client takes a step a round, so that the kept target is two steps behind and the restarted one none."""
    settings = {
        **one_step, "strategy": ["byol"], "labels.rate": 0.0, "federation.rounds": 3, "options.byol.target": target,
        "options.byol.momentum": 0.7, "options.byol.rounds": rounds, "optimiser.lr": 2.0,
    }  # fmt: skip
    config = tiny_config(settings)
    world = oracle.World.of(config)
    w = {n: a for n, a in world.start.items() if not n.rpartition(".")[2].startswith(("running_", "num_"))}
    followed = {n: a for n, a in w.items() if n.startswith(("encoder.", "projector."))}
    kept = dict(followed)
    for number, momentum in enumerate(momenta):
        if target == "received":
            kept = {n: w[n] for n in followed}
        x, w = shown(settings, number), oracle.leaves(w)
        slope = oracle.gradient(grill(predicted(embedded(x, w), w), embedded(x, kept)), w)
        w = {n: (a - config.optimiser.lr * slope[n]).detach() for n, a in w.items()}
        kept = {n: momentum * a + (1 - momentum) * w[n] for n, a in kept.items()}
    result = run(config)
    found = oracle.final(result)
    for name, array in w.items():
        if not name.startswith("head."):
            torch.testing.assert_close(found[name], array, rtol=1e-9, atol=1e-10)
    state = ClientStore(result.folder / "clients", 0).get(0, 10**6)
    if target == "received":
        assert not any("target/" in name for name in state)
    else:
        assert len([name for name in state if "target/" in name]) == len(kept)
        for name, array in kept.items():
            torch.testing.assert_close(state[f"byol/target/{name}"], array, rtol=1e-9, atol=1e-10)


def test_momentum_rises_along_a_cosine() -> None:
    for done in range(15):
        share = min(done / 10, 1.0)
        expected = 1 - (1 - 0.9) * (math.cos(math.pi * share) + 1) / 2
        assert rising_momentum(0.9, torch.tensor(float(done), dtype=torch.float64), 10).item() == pytest.approx(
            expected
        )


def test_weight_zero_is_finetune_on_the_same_two_views(equals_two_views: Callable[[str], None]) -> None:
    equals_two_views("byol")


def test_the_targets_pass_leaves_the_running_statistics_alone(tiny: Run, oracle: ModuleType) -> None:
    """BatchNorm's statistics are of the network's own passes: momentum 0 and 1 see other targets, in a first step."""
    common = {
        "strategy": ["byol"], "model.norm": "batch", "federation.rounds": 1, "scenario.tasks": 1,
        "federation.clients": 1, "data.limit": 4, "federation.batch_size": 64, "data.augment": ["crop(1)"],
    }  # fmt: skip
    one, other = (oracle.final(tiny({**common, "options.byol.weight": w})) for w in (0.0, 1.0))
    running = [n for n in one if "running_" in n and n.startswith("encoder.")]
    assert running
    assert all(torch.equal(one[n], other[n]) for n in running)


@pytest.mark.parametrize("path", ["sequential", "stacked"])
def test_what_a_phase_does_not_train_is_followed_as_it_is(tiny: Run, oracle: ModuleType, path: str) -> None:
    """With momentum 0 the target is the network itself, also where a phase trains the head alone."""
    phases = {"strategy": ["byol", "fedrep"], "options.fedrep.head_epochs": 1, "engine.path": path}
    result = tiny({**phases, "options.byol.target": "kept", "options.byol.momentum": 0.0, "federation.clients": 1})
    found, state = oracle.final(result), ClientStore(result.folder / "clients", 0).get(0, 10**6)
    followed = [n for n in found if n.startswith(("encoder.", "projector."))]
    assert followed
    for name in followed:
        torch.testing.assert_close(state[f"byol/target/{name}"], found[name], rtol=1e-9, atol=1e-12)


def test_odd_input(tiny: Run, oracle: ModuleType, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": ["byol"], "labels.rate": 0.5, "options.byol.target": "kept", **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -1.0), ("views", 0), ("views", 1), ("hidden", 0), ("momentum", 1.5), ("momentum", -0.1),
        ("rounds", -1), ("target", "mean"), ("tau", 1.0),
    ],
)  # fmt: skip
def test_wrong_options(tiny_config: Configure, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_config({"strategy": ["byol"], f"options.byol.{key}": value}))
    assert "\n" not in str(caught.value)
    assert "options.byol" in str(caught.value)
