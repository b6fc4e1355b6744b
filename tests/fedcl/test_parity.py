"""Clients trained as one stacked model against the same clients one by one, for every strategy and optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.conduct import initial_state
from fedcl.federation.server import Callbacks, Federation
from fedcl.federation.store import ClientStore
from fedcl.local.optim import make_optimiser
from fedcl.local.stacked import Cohort, train_cohort
from fedcl.local.training import Trained, train_client

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.federation.call import Call
    from fedcl.federation.node import Node
    from fedcl.federation.server import State
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], "Config"]

STRATEGIES = [
    "cumulative", "derpp", "ditto", "fedadam", "fedewc", "fedlwf", "fedprox", "finetune", "finetune_masked", "gpfl",
    "joint", "krum", "nearest_mean", "replay", "simclr", "supcon", "upgd", "weight_aligning",
]  # fmt: skip
"""Of every kind: losses, memories, states, modules, phases, what is carried; the bounds too, a stack of one client.

Every strategy that says it can be stacked is held to it at its first round, by a step in float64 both ways."""

MIXED: dict[str, Any] = {
    "federation.clients": 7,
    "federation.rounds": 1,
    "federation.batch_min": 2,
    "partition.alpha": 0.5,
    "data.limit": 16,
    "data.augment": ["crop(1)", "rotation(10)"],
    "model.norm": "batch",
    "model.dropout": 0.3,
    "model.head_bias": False,
    "engine.path": "sequential",
}
"""Unequal clients whose last batches differ in size, with all that draws or keeps statistics inside a step."""

SMALL_MEMORY = {"replay": {"options.replay.budget": 640}}
"""Ten images, so that memories are shorter than a batch."""

OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "clip": {"momentum": 0.9, "clip": 0.1},
    "schedule": {"momentum": 0.9, "schedule": "cosine", "per": "step", "warmup": 1},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 0.01, "eps": 1e-3},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "eps": 1e-3, "clip": 0.5, "schedule": "linear",
              "per": "step"},
}  # fmt: skip
"""With a large ``eps`` here: BatchNorm takes a bias before it away again, whose gradient is then nothing but rounding
errors, and Adam makes a whole step of them. Its default is tried out below, on a network without BatchNorm."""


@dataclass(frozen=True)
class Recorded:
    """A federation that was run one by one, and the calls of local training that its node got."""

    node: Node
    calls: list[Call]
    state: State

    def first(self, task: int) -> Call:
        """The first round of a task."""
        return next(c for c in self.calls if c.header.task == task)

    def at(self, **optimiser: Any) -> Node:
        """The node with another optimiser."""
        settings = replace(self.node.config.optimiser, **optimiser)
        config = replace(self.node.config, optimiser=settings)
        return replace(self.node, config=config, optimiser=make_optimiser(settings))


def record(config: Config, folder: Path) -> Recorded:
    """All tasks of a federation without evaluation; clients' states of every call stay in ``folder``."""
    experiment = build(config)
    node = experiment.node
    node.clients = ClientStore(folder, 1 << 20)
    calls: list[Call] = []

    def send(call: Call) -> list[Any]:
        if call.header.function == "train":
            calls.append(call)
        return [node.handle(call)]

    callbacks = Callbacks(lambda state, measured: state, lambda state: state, lambda state, ended: None)
    state = Federation(node, experiment.stream, experiment.split, send, callbacks).run(initial_state(experiment))
    return Recorded(node, calls, state)


@pytest.fixture
def recorded(tiny_config: TinyConfig, tmp_path: Path) -> Callable[[Mapping[str, Any]], Recorded]:
    """``recorded(overrides)``: a federation of :data:`MIXED` clients."""

    def run(overrides: Mapping[str, Any]) -> Recorded:
        options = SMALL_MEMORY.get(overrides["strategy"][0], {})
        config = tiny_config({**MIXED, **options, **overrides})
        return record(config, Path(config.output.dir) / "clients")

    return run


def off(one: Tensor, other: Tensor, least: float = 0.0) -> float:
    """|one - other| / |other| in float64, in which |other| is ``least`` at least; 0 for equal arrays, zero ones too."""
    if torch.equal(one, other):
        return 0.0
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=least))


def worst(together: Cohort, alone: list[Trained]) -> float:
    """The largest relative error of an array of any client, in both forms in which a cohort returns them."""
    errors = [0.0]
    for (_, one), other in zip(together.clients, alone, strict=True):
        assert (one.steps, one.samples, one.dropped) == (other.steps, other.samples, other.dropped)
        assert one.arrays.keys() == other.arrays.keys()
        assert one.losses.keys() == other.losses.keys()
        errors += [off(one.arrays[n], a) for n, a in other.arrays.items()]
    for row, place in enumerate(together.active):
        errors += [off(a[row], alone[place].arrays[n]) for n, a in together.arrays.items()]
    return max(errors)


def apart(node: Node, call: Call, limit: int | None = None) -> float:
    """How far the clients of a call come apart, from the same state."""
    numbers = [n for n in call.header.clients if len(call.ids[n])]
    alone = [train_client(node.client(call, n), limit) for n in numbers]
    assert any(not torch.equal(a, call.model[n]) for t in alone for n, a in t.arrays.items() if n in call.model)
    return worst(train_cohort([node.client(call, n) for n in numbers], limit), alone)


def test_there_are_strategies_of_every_kind() -> None:
    assert {"finetune", "fedprox", "fedewc", "fedlwf", "replay", "supcon", "krum", "joint"} <= set(STRATEGIES)


def test_clients_differ_in_steps_and_last_batches(recorded: Callable[..., Recorded]) -> None:
    found = recorded({"strategy": ["finetune"]})
    sizes = [len(rows) for rows in found.first(0).ids.values()]
    assert len({-(-n // 8) for n in sizes}) > 1
    assert len({n % 8 for n in sizes}) > 2


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_step(strategy: str, dtype: str, bound: float, recorded: Callable[..., Recorded]) -> None:
    found = recorded({"strategy": [strategy], "engine.dtype": dtype})
    errors = {
        (name, task): apart(found.at(**optimiser), found.first(task), limit=1)
        for name, optimiser in OPTIMISERS.items()
        for task in (0, 1)
    }
    assert {place: error for place, error in errors.items() if not error < bound} == {}


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("strategy", ["finetune", "fedewc"])
def test_one_step_of_adam(
    strategy: str, dtype: str, bound: float, name: str, recorded: Callable[..., Recorded]
) -> None:
    found = recorded({"strategy": [strategy], "engine.dtype": dtype, "model.norm": "layer"})
    for task in (0, 1):
        assert apart(found.at(name=name, lr=0.01), found.first(task), limit=1) < bound


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("network", ["lenet", "simple_cnn", "tiny_vit", "resnet20"])
def test_one_step_of_a_network(network: str, dtype: str, bound: float, recorded: Callable[..., Recorded]) -> None:
    own = {"model.width": None, "model.depth": 1 if network == "tiny_vit" else None, "model.norm": "default"}
    few = {"data.size": 16, "data.limit": 4, "federation.clients": 3, "scenario.tasks": 1}
    found = recorded({**own, **few, "strategy": ["finetune"], "model.name": network, "engine.dtype": dtype})
    assert apart(found.at(momentum=0.0), found.first(0), limit=1) < bound


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_round_of_an_optimiser(optimiser: str, recorded: Callable[..., Recorded]) -> None:
    found = recorded({"strategy": ["replay"], "model.batch_norm": "local", "federation.epochs": 2})
    for task in (0, 1):
        assert apart(found.at(**OPTIMISERS[optimiser]), found.first(task)) < 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_tasks(strategy: str, recorded: Callable[..., Recorded]) -> None:
    more = {"strategy": [strategy], "federation.rounds": 3, "federation.participation": 0.75}
    alone, together = recorded(more), recorded({**more, "engine.path": "stacked"})
    one, other = alone.state.arrays(), together.state.arrays()
    assert one.keys() == other.keys()
    # An adaptive server keeps the mean change of a bias that BatchNorm takes away: 1e-17, rounding errors.
    errors = {n: off(other[n], a, least=1e-6) for n, a in one.items()}
    assert {n: error for n, error in errors.items() if not error < 1e-8} == {}
    for client in alone.node.clients.clients():
        mine, its = (r.node.clients.get(client, r.state.sequence) for r in (alone, together))
        assert mine.keys() == its.keys()
        assert all(off(its[n], a, least=1e-6) < 1e-8 for n, a in mine.items())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_chunks_of_any_size(size: int, recorded: Callable[..., Recorded]) -> None:
    found = recorded({"strategy": ["fedlwf"], "federation.steps": 4, "federation.epochs": None})
    node, call = found.node, found.first(1)
    numbers = call.header.clients
    for limit, bound in ((1, 1e-12), (None, 1e-10)):
        alone = {n: train_client(node.client(call, n), limit) for n in numbers}
        for at in range(0, len(numbers), size):
            chunk = numbers[at : at + size]
            cohort = train_cohort([node.client(call, n) for n in chunk], limit)
            assert [c.id for c, _ in cohort.clients] == chunk
            assert worst(cohort, [alone[n] for n in chunk]) < bound


def test_clients_with_fewer_steps_or_none(recorded: Callable[..., Recorded]) -> None:
    found = recorded({"strategy": ["finetune"]})
    federation = replace(found.node.config.federation, drop_last=True, epochs=3)
    node = replace(found.node, config=replace(found.node.config, federation=federation))
    call = found.first(0)
    alone = [train_client(node.client(call, n)) for n in call.header.clients]
    together = train_cohort([node.client(call, n) for n in call.header.clients])
    steps = [t.steps for t in alone]
    assert 0 in steps
    assert len(set(steps)) > 2
    assert worst(together, alone) < 1e-10
    assert sorted(together.active) == [i for i, count in enumerate(steps) if count]
    for (_, trained), count in zip(together.clients, steps, strict=True):
        if not count:
            assert trained.losses == {}
            assert all(torch.equal(a, call.model[n]) for n, a in trained.arrays.items())
    idle = [n for n, count in zip(call.header.clients, steps, strict=True) if not count]
    nobody = train_cohort([node.client(call, n) for n in idle])
    assert nobody.active == []
    assert [t.steps for _, t in nobody.clients] == [0] * len(idle)


def test_what_the_server_sent_is_not_written_to(recorded: Callable[..., Recorded]) -> None:
    """Parameters and statistics of BatchNorm alike, whichever way the clients are trained."""
    found = recorded({"strategy": ["weight_aligning"]})
    call = found.first(1)
    sent = {**call.model, **{f"previous/{n}": a for n, a in call.previous.items()}}
    before = {n: a.clone() for n, a in sent.items()}
    assert any("running_mean" in n for n in sent)
    for path in ("sequential", "stacked"):
        reply = found.node.handle(replace(call, header=replace(call.header, path=path, chunk=3)))
        assert reply.measured["steps"] > 0
        assert all(torch.equal(a, before[n]) for n, a in sent.items()), path


@pytest.mark.parametrize("path", ["sequential", "stacked"])
def test_nothing_is_serialised_in_a_round(path: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcl.federation import flower_internals

    monkeypatch.setattr(flower_internals.TensorArray, "serialisations", 0)
    assert tiny({"engine.path": path, "strategy": ["fedlwf"]}).summary["bytes_up"] > 0
    assert flower_internals.TensorArray.serialisations == 0


def test_accuracies_agree_in_float32(tiny: Tiny) -> None:
    """Rounding decides single images, in either direction: over seeds the paired difference is none."""
    differences = []
    for seed in range(10):
        settings = {"seed": seed, "engine.dtype": "float32", "scenario.tasks": 1, "federation.rounds": 4,
                    "federation.epochs": 2, "data.limit": 40, "model.width": 16}  # fmt: skip
        alone, together = (tiny({**settings, "engine.path": p}) for p in ("sequential", "stacked"))
        one, other = alone.matrix[0][0], together.matrix[0][0]
        assert one is not None
        assert other is not None
        assert one > 0.5  # far from chance, 0.1
        differences.append(other - one)
    mean = sum(differences) / len(differences)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
    assert abs(mean) <= 3 * deviation / math.sqrt(len(differences))
