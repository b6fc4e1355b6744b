"""PeFLL: its gradients against plain autograd, whole runs against one fused graph, and models of new clients."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import Interrupted, RunFailed, UsageError
from fedcl.records.checkpoint import load_newest
from fedcl.run import execute, resume
from fedcl.strategies.hypernetwork._networks import drawn_hypernetwork, generated, pulled_back
from fedcl.strategies.hypernetwork.pefll import PHI, PeFLL, widened, with_scale
from fedcl.tell.progress import QuietProgress

STEPS, UNITS, LENGTH, KERNELS = 3, 6, 5, 2
SMALL = {
    "strategy": ["pefll"], "options.pefll.inner_steps": STEPS, "options.pefll.hidden": UNITS,
    "options.pefll.descriptor": LENGTH, "options.pefll.kernels": KERNELS,
}  # fmt: skip
ONE_TASK = {**SMALL, "scenario.tasks": 1}


class StopAt(QuietProgress):
    """Interrupts a run at one of its rounds."""

    def __init__(self, number: int) -> None:
        self.left = number

    def round(self, *given: Any, **more: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(result: Any) -> Any:
    """The server state of a finished run."""
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    start = "strategy/pefll/"
    return {n.removeprefix(start): a for n, a in found.arrays.items() if n.startswith(start)}


def hyper(state: Any) -> Any:
    return {n: a for n, a in state.items() if n.split("/")[0] in ("hidden", "slope", "base")}


def phi_in(arrays: Any) -> Any:
    return {n.removeprefix(PHI): a for n, a in arrays.items() if n.startswith(PHI)}


def rest_of(arrays: Any) -> Any:
    return {n: a for n, a in arrays.items() if not n.startswith(PHI)}


@pytest.mark.parametrize("clients", [1, 4])
def test_gradients_are_those_of_the_sum_of_inner_products(clients: int, by_hand: Any) -> None:
    start = {"w": random(2, 3), "b": random(2, seed=1)}
    h = drawn_hypernetwork(start, 4, 5, 3, "test")
    v, changes = random(clients, 4, seed=2), {"w": random(clients, 2, 3, seed=3), "b": random(clients, 2, seed=4)}
    found, back = pulled_back(h, v, changes)
    leaves = {n: a.clone().requires_grad_() for n, a in h.items()}
    inputs = v.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for k in range(clients):
        theta = by_hand(leaves, inputs[k])
        total = total + torch.stack([(changes[n][k] * theta[n]).sum() for n in theta]).sum()
    expected = torch.autograd.grad(total, [*leaves.values(), inputs])
    for one, other in zip([*found.values(), back], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert float(back.abs().max()) > 1e-4
    assert all(not a.requires_grad for a in (*found.values(), back))


def test_the_first_models_lie_around_the_initial_one() -> None:
    start = {"w": random(2, 3)}
    h = drawn_hypernetwork(start, 4, 5, 2, "test")
    assert torch.equal(h["base/w"], start["w"])
    assert h["slope/w"].abs().max() <= 5**-0.5
    assert torch.equal(h["slope/w"], drawn_hypernetwork(start, 4, 5, 2, "test")["slope/w"])
    assert not torch.equal(h["slope/w"], drawn_hypernetwork(start, 4, 5, 2, "other")["slope/w"])
    theta = generated(h, random(2, 4, seed=1))["w"]
    assert not torch.allclose(theta[0], theta[1])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_exchanges_equal_one_fused_graph(
    literal: Any, tiny: Any, tiny_config: Any, oracle: Any, kept: Any, name: str
) -> None:
    settings = {**ONE_TASK, "seed": 2, "options.pefll.optimiser": name, "options.pefll.lr": 0.01}
    result = tiny({**settings, "partition.test": "same_mix"})
    run = literal(tiny_config(settings))
    before = {n: a.detach().clone() for n, a in run.phi.items()}
    run.run([[0, 1, 2], [0, 1, 2]])
    state, model = state_of(result), oracle.final(result)
    assert float(state["deviation"]) == pytest.approx(run.deviation, rel=1e-12)
    # Adam divides by the size of a gradient, so that rounding shows where that is next to nothing.
    close = 1e-6 if name == "adam" else 1e-11
    assert oracle.distance(hyper(state), {n: a.detach() for n, a in run.h.items()}) < close
    assert oracle.distance(phi_in(model), {n: a.detach() for n, a in run.phi.items()}) < close
    assert oracle.distance(phi_in(model), before) > 1e-5
    own = kept(result)
    assert sorted(own) == [0, 1, 2]
    descriptors = {c: run.descriptor(c, None).detach() for c in own}
    for client, arrays in own.items():
        expected = run.model(descriptors[client])
        assert oracle.distance(arrays, expected) < 10 * close
    expected = run.model(torch.stack(list(descriptors.values())).mean(0))
    assert oracle.distance(rest_of(model), expected) < 10 * close
    assert result.summary["personal"]["average_accuracy"]["weighted_mean"] is not None


def test_gradients_are_clipped(literal: Any, tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**ONE_TASK, "options.pefll.optimiser": "sgd", "options.pefll.decay": 0.0, "federation.rounds": 1}
    ends = [state_of(tiny({**settings, "options.pefll.clip": c, "options.pefll.lr": 1.0})) for c in (1e-3, 2e-3)]
    run = literal(tiny_config(settings))
    moved = [sum(float((a - run.h[n].detach()).square().sum()) for n, a in hyper(end).items()) ** 0.5 for end in ends]
    assert moved == pytest.approx([1e-3, 2e-3], rel=1e-4)


def test_a_client_that_never_trained_gets_a_model_of_its_own(
    literal: Any, tiny: Any, tiny_config: Any, oracle: Any, kept: Any
) -> None:
    settings = {**ONE_TASK, "federation.participation": 0.34, "federation.rounds": 1}
    cohort = counter.sample(3, 1, tiny_config(settings).seed, "cohort", 0, 0)
    result = tiny(settings)
    own, model = kept(result), rest_of(oracle.final(result))
    assert sorted(own) == [0, 1, 2]
    run = literal(tiny_config(settings))
    run.run([cohort])
    for client in {0, 1, 2} - set(cohort):
        assert oracle.distance(own[client], model) > 1e-4
        expected = run.model(run.descriptor(client, None))
        assert oracle.distance(own[client], expected) < 1e-6


@pytest.mark.parametrize("rule", ["global", "holdout(0.5)"])
def test_a_newcomer_gets_a_model_from_its_own_descriptor(
    literal: Any, tiny: Any, tiny_config: Any, oracle: Any, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Only where it has test images of its own: a label must not decide about its own image."""
    settings = {**ONE_TASK, "federation.clients": 6, "partition.held_out": 3, "partition.test": rule}
    made: list[Any] = []
    original = PeFLL.newcomer

    def noted(self: PeFLL, *given: Any) -> Any:
        made.append(original(self, *given))
        return made[-1]

    monkeypatch.setattr(PeFLL, "newcomer", noted)
    result, config = tiny(settings), tiny_config(settings)
    run, state, final = literal(config), state_of(result), oracle.final(result)
    run.h, run.phi, run.mean, run.deviation = hyper(state), phi_in(final), state["mean"], state["deviation"]
    never = build(config).split.held_out
    assert never is not None
    assert len(made) == (0 if rule == "global" else 3)
    for client, arrays in enumerate(made):
        run.world.held[0].append(never.rows[0][client].tolist())
        assert oracle.distance(rest_of(arrays), run.model(run.descriptor(3 + client, None))) < 1e-10
        assert oracle.distance(rest_of(arrays), rest_of(final)) > 1e-5


def test_newcomers_before_the_first_descriptor_have_the_global_model() -> None:
    class Nothing:
        arrays = {"w": torch.zeros(1)}
        state = {"base/w": torch.zeros(1)}

    nothing: Any = Nothing()
    assert PeFLL().newcomer(nothing, ()) is nothing.arrays


def test_after_a_round_the_global_model_is_that_of_the_mean_descriptor(
    literal: Any, tiny_config: Any, oracle: Any
) -> None:
    settings = {**ONE_TASK, "federation.participation": 0.67}
    config = tiny_config(settings)
    with pytest.raises(Interrupted):
        execute(config, progress=StopAt(2))
    (folder,) = Path(config.output.dir).glob("*/seed-*")
    found = load_newest(folder / "checkpoints", lambda text: None)
    assert found is not None
    model = {n.removeprefix("model/"): a for n, a in found.arrays.items() if n.startswith("model/")}
    run = literal(config)
    cohort = counter.sample(3, 2, config.seed, "cohort", 0, 0)
    expected = run.run([cohort])
    assert oracle.distance(rest_of(model), expected) < 1e-6


def test_clients_are_tested_with_their_own_models() -> None:
    arrays, own = {"w": torch.zeros(2), f"{PHI}bias": torch.ones(1)}, {"own/w": torch.ones(2)}
    assert PeFLL().personal(arrays, own)["w"].tolist() == [1.0, 1.0]
    assert PeFLL().personal(arrays, {}) == arrays


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_travels_in_a_round(tiny: Any, rounds: int) -> None:
    result = tiny({**ONE_TASK, "federation.rounds": rounds, "engine.dtype": "float32"})
    arrays = {n: a.numel() for n, a in result.model.named_parameters()}
    phi = sum(a for n, a in arrays.items() if n.startswith(PHI))
    model = sum(arrays.values()) - phi
    with (result.folder / "costs.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for row in rows[:rounds]:
        one_way = 3 * (model + LENGTH + phi)
        assert (int(row["floats_up"]), int(row["floats_down"])) == (one_way, one_way)
        assert int(row["bytes_down"]) == 4 * one_way
        assert int(row["bytes_up"]) == 4 * one_way + 3 * 2 * 8  # whose descriptor, and whose change
    end = rows[rounds]
    assert int(end["floats_up"]) == 3 * LENGTH
    assert int(end["floats_down"]) == 3 * (phi + model)


def test_new_classes_start_as_without_the_hypernetwork(tiny: Any, tiny_config: Any, oracle: Any, kept: Any) -> None:
    still = {**SMALL, "options.pefll.optimiser": "sgd", "options.pefll.lr": 1e-30}
    result = tiny(still)
    world = oracle.World.of(tiny_config(still))
    initial = oracle.grown(rest_of(world.start), world, 10)
    state = state_of(result)
    assert state["slope/head.weight"].shape == (UNITS, 10, 8)
    assert state["slope/head.weight"][:, 5:].abs().max() < 1e-20
    assert state["slope/head.weight"][:, :5].all()
    for client, arrays in kept(result).items():
        for n in ("head.weight", "head.bias"):
            assert torch.equal(arrays[n][5:], initial[n][5:]), client
            assert not torch.equal(arrays[n][:5], initial[n][:5])
    moving = state_of(tiny({**SMALL, "options.pefll.lr": 1e-3}))
    for n in ("exp_avg-slope", "exp_avg-base", "slope"):
        assert moving[f"{n}/head.weight"].shape[-2:] == (10, 8)
        assert moving[f"{n}/head.weight"][..., 5:, :].any()
    assert moving[f"exp_avg-phi/{PHI}label"][5:].any()


def test_widening_keeps_what_was_there() -> None:
    old = random(2, 3, 4)
    wide = widened(old, torch.Size([5, 4]))
    assert torch.equal(wide[:, :3], old)
    assert not wide[:, 3:].any()
    assert torch.equal(widened(old, torch.Size([3, 4])), old)


def test_a_resumed_run_ends_the_same(tiny_config: Any) -> None:
    settings = {**SMALL, "engine.dtype": "float32"}
    whole = execute(tiny_config(settings), progress=QuietProgress())
    config = tiny_config(settings)
    with pytest.raises(Interrupted):
        execute(config, progress=StopAt(3))
    (folder,) = Path(config.output.dir).glob("*/seed-*")
    again = resume(folder, progress=QuietProgress())
    for digest in ("model_sha256", "state_sha256"):
        assert again.summary[digest] == whole.summary[digest]
    assert again.matrix == whole.matrix


def test_images_seen_once(tiny: Any, kept: Any) -> None:
    result = tiny({**SMALL, "federation.passes": "once", "federation.epochs": None})
    assert sorted(kept(result)) == [0, 1, 2]


def test_hard_streams(tiny: Any, hard: Any, oracle: Any, kept: Any) -> None:
    result = tiny({**SMALL, **hard, "federation.rounds": 1})
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())
    for arrays in kept(result).values():
        assert all(bool(a.isfinite().all()) for a in arrays.values())


def test_a_cohort_without_images_changes_nothing() -> None:
    class Nobody:
        arrays = {"w": torch.zeros(1)}
        state = {"base/w": torch.zeros(1)}
        cohort = (0,)

        def exchange(self, *given: Any) -> dict[str, Any]:
            return {}

    server: Any = Nobody()
    assert PeFLL().round(server) == (server.arrays, server.state)
    assert PeFLL().adopted(server) == (server.arrays, server.state)


def test_a_descriptor_of_equal_entries_is_refused() -> None:
    with pytest.raises(RunFailed, match="cannot be standardised"):
        with_scale({}, torch.ones(1, 3))
    found = with_scale({}, torch.tensor([[1.0, 3.0], [7.0, 7.0]]))
    assert (float(found["mean"]), round(float(found["deviation"]), 4)) == (2.0, 1.4142)
    assert with_scale(found, torch.zeros(1, 2)) is found


def test_batch_norm_is_refused(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match=r"model\.norm=group or none") as caught:
        build(tiny_config({**SMALL, "model.norm": "batch"}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("descriptor", 1), ("inner_steps", 0), ("embed_batches", 0), ("lr", 0.0), ("clip", -1.0), ("decay", -0.1)],
)
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.pefll"):
        build(tiny_config({"strategy": ["pefll"], f"options.pefll.{key}": value}))
