"""Avalanche's plugins inside runs, against Avalanche alone on the same batches; and their state as arrays and back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcl import random as counter
from fedcl import registry
from fedcl.bridges import avalanche_state as states
from fedcl.build import build
from fedcl.check import check_strategy
from fedcl.config import Config
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.run import RunResult

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]

ALONE = {
    "scenario.tasks": 3, "federation.clients": 1, "federation.rounds": 2, "optimiser.momentum": 0.0, "data.limit": 6,
    "federation.batch_size": 64,
}  # fmt: skip
"""One client with 18 to 24 images a task, each step on all of them: what a plugin draws decides the memory only."""

STRONG: dict[str, dict[str, Any]] = {
    "avalanche_ewc": {"ewc_lambda": 20.0},
    "avalanche_si": {"si_lambda": 4000.0, "eps": 1e-3},
    "avalanche_mas": {"lambda_reg": 0.5},
    "avalanche_lwf": {"alpha": 2.0},
    "avalanche_agem": {"patterns_per_experience": 7, "sample_size": 64},
    "avalanche_replay": {"mem_size": 11},
}
ONLINE = {"ewc_lambda": 20.0, "mode": "online", "decay_factor": 0.5}
NEUTRAL = {n: dict(registry.load("strategies", n).neutral or {}) for n in STRONG if n != "avalanche_agem"}


def stored(result: RunResult, client: int) -> dict[str, Tensor]:
    """The newest state of a client."""
    return ClientStore(result.folder / "clients", 0).get(client, 10**6)


def generators() -> Any:
    """The states of the global generators."""
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return random.getstate(), numpy["key"].tolist(), torch.get_rng_state().tolist()


def options(name: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {"strategy": [name], **{f"options.{name}.{n}": v for n, v in chosen.items()}}


class Net(nn.Module):
    """The model of tiny runs, its parameters by the names of the run."""

    def __init__(self, arrays: Mapping[str, Tensor], logits: Callable[..., Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.names: dict[str, str] = {}
        self.take(arrays)

    def take(self, arrays: Mapping[str, Tensor]) -> None:
        for name, array in arrays.items():
            self.names[name] = name.replace(".", "_")
            setattr(self, self.names[name], nn.Parameter(array.clone()))

    def arrays(self) -> dict[str, Tensor]:
        return {name: getattr(self, own).detach().clone() for name, own in self.names.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.logits({name: getattr(self, own) for name, own in self.names.items()}, x)


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def plain(config: Config, plugin: Any, oracle: ModuleType, name: str) -> dict[str, Tensor]:
    """Avalanche's own training on the tasks of one client, with the batches of the run; nothing of the bridge."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset
    from avalanche.training.templates import SupervisedTemplate

    world = oracle.World.of(config)
    rounds, seed = config.federation.rounds, config.seed

    class Housed(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            # On a CPU Avalanche's SI keeps views of the parameters; on a GPU these are copies.
            for p in self.param_groups[0]["params"]:
                p.data = p.data.clone()
            return super().step(closure)

    class Ordered(SupervisedTemplate):  # type: ignore[misc]
        def make_train_dataloader(self, **kwargs: Any) -> None:
            task, rows = len(seen), world.held[len(seen)][0]
            epochs = []
            for round_ in range(rounds):
                order = counter.permutation(len(rows), seed, "client", 0, task, round_, "order", 0).tolist()
                ids = [rows[i] for i in order]
                y = torch.tensor([world.y[i] for i in ids])
                epochs.append([[world.x[ids], y, torch.zeros_like(y)]])
            self.dataloader = Epochs(epochs)

        def _after_training_exp(self, **kwargs: Any) -> None:
            drawn = counter.fold(seed, "client", 0, len(seen), rounds, name, "end")
            torch.manual_seed(drawn)
            random.seed(drawn)
            super()._after_training_exp(**kwargs)

    class Epochs:
        def __init__(self, epochs: list[Any]) -> None:
            self.epochs = iter(epochs)

        def __iter__(self) -> Iterator[Any]:
            return iter(next(self.epochs))

    datasets = []
    for held in world.held:
        labels = [world.y[i] for i in held[0]]
        pairs = torch.utils.data.TensorDataset(world.x[held[0]], torch.tensor(labels))
        datasets.append(_make_taskaware_classification_dataset(pairs, targets=labels, task_labels=[0] * len(labels)))
    seen: list[int] = []
    model = Net(oracle.grown(world.start, world, len(world.known[0])), oracle.logits)
    loop = Ordered(
        model=model, optimizer=Housed(model.parameters(), config.optimiser.lr), criterion=nn.CrossEntropyLoss(),
        train_mb_size=64, train_epochs=rounds, plugins=[plugin], evaluator=None,
    )  # fmt: skip
    for task, experience in enumerate(benchmark_from_datasets(train=datasets).streams["train"]):
        model.take(oracle.grown(model.arrays(), world, len(world.known[task])))
        loop.optimized_param_id = None
        loop.train(experience)
        seen.append(task)
    return model.arrays()


@pytest.mark.parametrize(
    ("name", "chosen"), [*STRONG.items(), ("avalanche_ewc", ONLINE)], ids=[*STRONG, "avalanche_ewc online"]
)
@pytest.mark.usefixtures("double")
def test_one_client_is_avalanche_alone(
    tiny: Run, tiny_config: Configure, oracle: ModuleType, name: str, chosen: dict[str, Any]
) -> None:
    settings = {**ALONE, **options(name, chosen)}
    strategy = registry.load("strategies", name)
    made = strategy(strategy.Options(**chosen)).made()
    before = generators()
    ours = oracle.final(tiny(settings))
    assert generators() == before
    with states.inside(0, torch.float64):
        theirs = plain(tiny_config(settings), made, oracle, name)
    assert oracle.distance(ours, theirs) < 1e-6
    finetuned = oracle.final(tiny({**ALONE, "strategy": ["finetune"]}))
    assert oracle.distance(ours, finetuned) > 1e-3


def test_avalanches_si_alone_learns_nothing_on_a_cpu() -> None:
    """What the card says: without fresh memory for each step, its importances are all 0."""
    plugin = states.make_plugin(states.PLUGINS + "SynapticIntelligencePlugin", {"si_lambda": 1.0}, "options")
    model, data = nn.Linear(2, 2), plugin.syn_data
    theirs = type(plugin)
    theirs.create_syn_data(model, plugin.ewc_data, data, set())
    theirs.init_batch(model, plugin.ewc_data, data, set())
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    theirs.pre_update(model, data, set())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    theirs.post_update(model, data, set())
    assert float(data["trajectory"]["weight"].data.abs().sum()) == 0.0


@pytest.mark.parametrize("name", NEUTRAL)
def test_strength_zero_is_plain_averaging(tiny: Run, oracle: ModuleType, name: str) -> None:
    common = {
        "federation.weighting": "uniform", "optimiser.clip": 0.5, "optimiser.schedule": "cosine",
        "optimiser.per": "step", "optimiser.weight_decay": 0.01, "data.augment": ["crop(1)"], "federation.epochs": 2,
    }  # fmt: skip
    zero = oracle.final(tiny({**common, **options(name, NEUTRAL[name])}))
    averaged = oracle.final(tiny({**common, "strategy": ["finetune"]}))
    assert oracle.distance(zero, averaged) < 1e-9
    assert oracle.distance(oracle.final(tiny({**common, **options(name, STRONG[name])})), averaged) > 1e-4


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_other_optimisers_are_those_of_the_run(tiny: Run, oracle: ModuleType, optimiser: str) -> None:
    common = {"optimiser.name": optimiser, "optimiser.lr": 0.01, "optimiser.weight_decay": 0.1}
    zero = oracle.final(tiny({**common, **options("avalanche_ewc", {"ewc_lambda": 0.0})}))
    assert oracle.distance(zero, oracle.final(tiny({**common, "strategy": ["finetune"]}))) < 1e-9


@pytest.mark.parametrize("name", STRONG)
def test_state_goes_to_arrays_and_back(tiny: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is read into a new plugin is written from it again in every bit, between and within the tasks of a run."""
    cls = registry.load("strategies", name)
    adapter = states.adapter_of(cls(cls.Options(**STRONG[name])).made())
    assert adapter is not None
    load, read = adapter.load, []

    def checked(loop: Any, state: dict[str, Tensor]) -> None:
        load(loop, state)
        again = adapter.save(loop)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[n], a) and again[n].dtype == a.dtype for n, a in state.items())
        read.append((loop.ctx.task, loop.ctx.round, len(state)))

    monkeypatch.setattr(adapter, "load", checked)
    # SI keeps its arrays flat: their shapes are those of the model only once a task has begun.
    tiny({**options(name, STRONG[name]), "model.norm": "batch", "model.head_allocate": "all"})
    assert {(0, 0), (0, 1), (1, 0), (1, 1)} <= {(task, round_) for task, round_, _ in read}
    assert all(bool(n) == (task > 0) for task, _, n in read if name != "avalanche_si")


@pytest.mark.parametrize("name", ["avalanche_si", "avalanche_replay"])
def test_resumed_runs_are_the_same(name: str) -> None:
    report = check_strategy(registry.load("strategies", name), only=("resume",))
    assert [(r.name, r.outcome) for r in report.results] == [("resume", "pass")]


def test_a_client_without_images_keeps_nothing(tiny: Run, tiny_config: Configure) -> None:
    settings = {**options("avalanche_lwf", {}), "partition.min_size": 0, "federation.clients": 40}
    result, held = tiny(settings), build(tiny_config(settings)).split.train
    trained = [any(len(task[client]) for task in held) for client in range(40)]
    assert [bool(stored(result, client)) for client in range(40)] == trained
    assert not all(trained)


def test_memories_hold_the_clients_own_images_within_their_size(tiny: Run, tiny_config: Configure) -> None:
    for name, kept in (("avalanche_agem", [7, 7]), ("avalanche_replay", [6, 5])):
        settings = {**options(name, STRONG[name]), "federation.clients": 2}
        result, held = tiny(settings), build(tiny_config(settings)).split.train
        for client in range(2):
            state = stored(result, client)
            assert state[f"{name}/sizes"].tolist() == kept
            rows = torch.split(state[f"{name}/ids"], kept)
            for task, some in enumerate(rows):
                assert set(some.tolist()) <= set(held[task][client].tolist())
                assert len(set(some.tolist())) == len(some)


def test_a_client_that_never_trained_in_a_task_does_not_end_it(tiny: Run) -> None:
    result = tiny({**options("avalanche_mas", {}), "federation.participation": 0.34, "federation.rounds": 1})
    ended = [int(state["avalanche_mas/clock"][0]) for c in range(3) if (state := stored(result, c))]
    assert sum(ended) == 2  # one client of three trained in each of two tasks


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("avalanche_ewc", {"ewc_lambda": -1.0}),
        ("avalanche_ewc", {"decay_factor": 0.5}),
        ("avalanche_ewc", {"mode": "online", "decay_factor": 2.0}),
        ("avalanche_si", {"eps": 0.0}),
        ("avalanche_mas", {"alpha": 2.0}),
        ("avalanche_lwf", {"temperature": 0.0}),
        ("avalanche_agem", {"sample_size": 0}),
        ("avalanche_replay", {"mem_size": -1}),
    ],
)
def test_options_out_of_range_are_refused(tiny: Run, name: str, chosen: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(chosen))):
        tiny(options(name, chosen))
