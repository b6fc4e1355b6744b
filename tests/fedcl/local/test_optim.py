"""Optimisers, clipping and schedules against torch's own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedcl.config import Optimiser
from fedcl.errors import UsageError
from fedcl.local.optim import Group, clip_by_norm, global_norm, make_optimiser, schedule

STEPS = 20
SETTINGS = [
    Optimiser(name="sgd", lr=0.1, momentum=0.0),
    Optimiser(name="sgd", lr=0.05, momentum=0.9, weight_decay=1e-2),
    Optimiser(name="sgd", lr=0.05, momentum=0.8, nesterov=True, weight_decay=1e-3),
    Optimiser(name="adam", lr=0.01),
    Optimiser(name="adam", lr=0.003, betas=[0.8, 0.95], eps=1e-5, weight_decay=0.1),
    Optimiser(name="adamw", lr=0.01, weight_decay=0.2),
]
IDS = ["sgd", "momentum", "nesterov", "adam", "adam-l2", "adamw"]


def _theirs(config: Optimiser, params: list[Tensor]) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(
            params, config.lr, config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    betas = (config.betas[0], config.betas[1])
    return kind(params, config.lr, betas, config.eps, weight_decay=config.weight_decay)


def _start(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b": ()}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def _grads(step: int, seed: int = 0) -> dict[str, Tensor]:
    return {n: t * (0.3 + 0.1 * step) for n, t in _start(100 * seed + step + 7).items()}


@pytest.mark.parametrize("config", SETTINGS, ids=IDS)
def test_equals_torch_over_twenty_steps(config: Optimiser) -> None:
    params = _start()
    leaves = {n: nn.Parameter(t.clone()) for n, t in params.items()}
    theirs, ours = _theirs(config, list(leaves.values())), make_optimiser(config)
    state = ours.init(params)
    for step in range(STEPS):
        grads = _grads(step)
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        for group in theirs.param_groups:
            group["lr"] = config.lr / (1 + step)
        theirs.step()
        params, state = ours.update(params, grads, state, config.lr / (1 + step))
        for name, leaf in leaves.items():
            torch.testing.assert_close(params[name], leaf.detach(), rtol=0, atol=1e-12)
    assert int(state["step"]) == STEPS


@pytest.mark.parametrize("config", SETTINGS, ids=IDS)
def test_nothing_that_is_given_is_written_to(config: Optimiser) -> None:
    ours, params = make_optimiser(config), _start()
    _, state = ours.update(params, _grads(0), ours.init(params), config.lr)
    grads = _grads(1)
    kept = [{n: t.clone() for n, t in given.items()} for given in (params, grads, state)]
    new_params, new_state = ours.update(params, grads, state, config.lr)
    for given, copy in zip((params, grads, state), kept, strict=True):
        assert all(torch.equal(given[n], copy[n]) for n in copy)
    assert not any(torch.equal(new_params[n], params[n]) for n in params)
    assert new_state.keys() == state.keys()


@pytest.mark.parametrize("config", SETTINGS, ids=IDS)
@pytest.mark.parametrize("how", ["stacked", "vmap"])
def test_a_stack_of_clients_equals_each_alone(config: Optimiser, how: str) -> None:
    clients = 3
    ours = make_optimiser(config)
    lrs = torch.tensor([0.1, 0.01, 0.03], dtype=torch.float64)
    alone = [(_start(k), ours.init(_start(k))) for k in range(clients)]
    # Client 2 is ahead by one step: counts and rates differ within the stack.
    alone[2] = ours.update(alone[2][0], _grads(9), alone[2][1], 0.1)
    stacked = tuple({n: torch.stack([a[i][n] for a in alone]) for n in alone[0][i]} for i in (0, 1))
    update = ours.update if how == "stacked" else torch.func.vmap(ours.update)
    for step in range(4):
        each = [_grads(step, seed=k) for k in range(clients)]
        alone = [ours.update(*_with(a, each[k]), float(lrs[k])) for k, a in enumerate(alone)]
        grads = {n: torch.stack([g[n] for g in each]) for n in each[0]}
        stacked = update(stacked[0], grads, stacked[1], lrs)
    for part, k in itertools.product((0, 1), range(clients)):
        for name, tensor in alone[k][part].items():
            torch.testing.assert_close(stacked[part][name][k], tensor, rtol=1e-13, atol=1e-13)


def _with(pair: tuple[dict[str, Tensor], dict[str, Tensor]], grads: dict[str, Tensor]) -> tuple:  # type: ignore[type-arg]
    return pair[0], grads, pair[1]


def test_groups_equal_torchs_parameter_groups() -> None:
    config = Optimiser(name="adamw", lr=0.02, weight_decay=0.1)
    groups = [Group(lambda n: n.endswith("bias"), 0.1, 0.0), Group(lambda n: n.startswith("a."), 2.0)]
    params = _start()
    leaves = {n: nn.Parameter(t.clone()) for n, t in params.items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [leaves["a.bias"]], "lr": 0.002, "weight_decay": 0.0},
            {"params": [leaves["a.weight"]], "lr": 0.04},
            {"params": [leaves["b"]]},
        ],
        lr=0.02,
        weight_decay=0.1,
    )
    ours = make_optimiser(config, groups)
    state = ours.init(params)
    for step in range(5):
        for name, leaf in leaves.items():
            leaf.grad = _grads(step)[name]
        theirs.step()
        params, state = ours.update(params, _grads(step), state, 0.02)
    for name, leaf in leaves.items():
        torch.testing.assert_close(params[name], leaf.detach(), rtol=0, atol=1e-12)


def test_parameters_without_gradient_stay() -> None:
    ours, params = make_optimiser(Optimiser(name="adam", weight_decay=0.1)), _start()
    state = ours.init(params)
    new, after = ours.update(params, {"b": torch.tensor(1.0, dtype=torch.float64)}, state, 0.1)
    assert new["a.weight"] is params["a.weight"]
    assert after["exp_avg/a.weight"] is state["exp_avg/a.weight"]
    assert new["b"] != params["b"]
    with pytest.raises(KeyError):
        ours.update(params, {"c": torch.tensor(1.0)}, state, 0.1)


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e3])
def test_clipping_equals_torch(max_norm: float) -> None:
    grads = _start()
    leaves = [nn.Parameter(t.clone()) for t in grads.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    torch.testing.assert_close(global_norm(grads), norm, rtol=0, atol=1e-14)
    for leaf, clipped in zip(leaves, clip_by_norm(grads, max_norm).values(), strict=True):
        torch.testing.assert_close(clipped, leaf.grad, rtol=0, atol=1e-14)


def test_clipping_a_stack_clips_each_client_alone() -> None:
    each = [_start(0), {n: 100 * t for n, t in _start(1).items()}]
    stacked = {n: torch.stack([g[n] for g in each]) for n in each[0]}
    batched = clip_by_norm(stacked, 2.0, batch_dims=1)
    mapped = torch.func.vmap(lambda g: clip_by_norm(g, 2.0))(stacked)
    for k, name in itertools.product(range(2), stacked):
        alone = clip_by_norm(each[k], 2.0)[name]
        torch.testing.assert_close(batched[name][k], alone, rtol=0, atol=1e-14)
        torch.testing.assert_close(mapped[name][k], alone, rtol=0, atol=1e-14)


def _torch_rates(kind: str, total: int) -> list[float]:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedulers = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total, eta_min=0.04),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total),
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5], 0.2),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0, total),
    }
    scheduler = schedulers[kind]()
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "step"])
@pytest.mark.parametrize("per", ["step", "round", "task"])
def test_schedules_equal_torch(kind: str, per: str) -> None:
    config = Optimiser(lr=0.4, schedule=kind, per=per, final=0.1, gamma=0.2, milestones=[3, 5])
    counters = [{"step": 90, "round": 80, "task": 70} | {per: t} for t in range(8)]
    ours = [schedule(config, **counter, total=8) for counter in counters]
    assert ours == pytest.approx(_torch_rates(kind, 8), abs=1e-14)


def test_warmup_is_linear_and_then_the_schedule_takes_the_rest() -> None:
    config = Optimiser(lr=1.0, schedule="cosine", warmup=4, per="step")
    rates = [schedule(config, step=t, total=12) for t in range(14)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.5)
    assert rates[12:] == pytest.approx([0.0, 0.0], abs=1e-15)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sdg"),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", float("nan")),
        ("weight_decay", -1e-4),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0]),
        ("eps", 0.0),
        ("clip", 0.0),
        ("clip", float("nan")),
        ("schedule", "cosin"),
        ("per", "epoch"),
        ("warmup", -1),
        ("gamma", 0.0),
        ("final", 1.5),
        ("milestones", [5, 3]),
    ],
)
def test_wrong_values_are_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^optimiser\.{field}="):
        make_optimiser(replace(Optimiser(), **{field: value}))


def test_wrong_names_suggest_the_nearest_and_combinations_are_checked() -> None:
    with pytest.raises(UsageError, match="Did you mean 'sgd'"):
        make_optimiser(Optimiser(name="sdg"))
    with pytest.raises(UsageError, match=r"optimiser\.nesterov"):
        make_optimiser(Optimiser(nesterov=True, momentum=0.0))
    with pytest.raises(UsageError, match=r"optimiser\.milestones"):
        make_optimiser(Optimiser(schedule="step"))
    with pytest.raises(UsageError, match=r"optimiser\.per"):
        schedule(Optimiser(per="epoch"), total=1)
