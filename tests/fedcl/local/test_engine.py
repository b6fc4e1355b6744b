"""How a run computes: chosen once, by the settings, a measured table or the built-in one, and kept with the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl import random as counter
from fedcl.build import build, first_sizes
from fedcl.config import Config, load_config
from fedcl.errors import Interrupted, UsageError
from fedcl.federation.cohort import cohort_size
from fedcl.local import engine
from fedcl.local.batching import sharing
from fedcl.local.engine import Choice, resolve_engine
from fedcl.run import execute, resume
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], Config]
CPU = torch.device("cpu")


def settings(**overrides: Any) -> Config:
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config({"strategy": ["finetune"]}, {"engine.device": "cpu", "federation.clients": 8, **keys})


def resolved(
    config: Config, centralised: bool = False, shape: tuple[int, int, int] = (1, 8, 8), sizes: Sequence[int] = ()
) -> Choice:
    clients = 1 if centralised else cohort_size(config, config.federation.clients)
    found = resolve_engine(config, shape, sizes or [32] * clients).engine
    return Choice(found.path, found.chunk, found.threads, found.memory_format)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test keeps what `fedcl tune` measures."""
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engine.json"


@pytest.mark.parametrize("network", engine.ON_CPU)
def test_small_networks_are_stacked_on_a_cpu(network: str) -> None:
    found = resolved(settings(model__name=network))
    known = engine.ON_CPU[network]
    assert (found.path, found.chunk, found.memory_format) == (known.path, known.chunk, known.memory_format)
    assert found.chunk > 0
    assert found.threads >= 1


@pytest.mark.parametrize("network", ["resnet18", "resnet20"])
def test_other_networks_are_trained_one_by_one(network: str) -> None:
    found = resolved(settings(model__name=network))
    assert (found.path, found.memory_format) == ("sequential", "channels_last")


@pytest.mark.parametrize("network", ["mlp", "simple_cnn", "resnet18"])
def test_the_settings_win(network: str) -> None:
    for path in ("stacked", "sequential"):
        assert resolved(settings(model__name=network, engine__path=path)).path == path
    forced = settings(
        model__name=network, engine__path="stacked", engine__chunk=3, engine__threads=2,
        engine__memory_format="contiguous",
    )  # fmt: skip
    assert resolved(forced) == Choice("stacked", 3, 2, "contiguous")


@pytest.mark.parametrize(
    "one",
    [{"federation__clients": 1}, {"federation__cohort": 1}, {"federation__participation": 0.1}],
    ids=["one client", "a cohort of one", "a small share"],
)
def test_a_cohort_of_one_is_not_stacked(one: dict[str, Any]) -> None:
    assert resolved(settings(model__name="mlp", **one)).path == "sequential"
    assert resolved(settings(model__name="mlp", engine__path="stacked", **one)).path == "stacked"


def test_a_centralised_bound_is_not_stacked(tiny: Tiny) -> None:
    assert resolved(settings(model__name="mlp")).path == "stacked"
    assert resolved(settings(model__name="mlp"), centralised=True).path == "sequential"
    result = tiny({"strategy": ["joint"]})
    assert load_config(result.folder / "config.yaml").engine.path == "sequential"


def test_a_cohort_of_one_ignores_what_was_measured_for_stacks(table: Path) -> None:
    config = settings(model__name="mlp", federation__cohort=1)
    engine.remember(engine.key(config, CPU), Choice("stacked", chunk=4))
    assert resolved(config).path == "sequential"


def test_nodes_share_a_cohort(tiny_config: TinyConfig) -> None:
    config = tiny_config({"federation.clients": 9})
    split = build(config).split
    assert first_sizes(config, split) == [len(ids) for ids in split.rows[0]]
    quarter = replace(config, engine=replace(config.engine, nodes=4))
    assert first_sizes(quarter, split) == [len(split.rows[0][c]) for c in (0, 4, 8)]


def test_sharing_counts_the_calls() -> None:
    # Batches of 32: steps of 32, 32, 8 images; of 32, 20; of 20. Calls at the three steps: {32, 20}, {32, 20}, {8}.
    assert sharing([72, 52, 20], settings(federation__batch_size=32)) == 6 / 5
    assert sharing([64] * 10, settings(federation__batch_size=32)) == 10.0
    assert sharing([0, 0], settings()) == sharing([], settings()) == 1.0


def test_clients_that_share_few_calls_are_trained_one_by_one() -> None:
    config = settings(model__name="mlp")
    assert resolved(config, sizes=[72, 52, 20]).path == "sequential"
    assert resolved(config, sizes=[72, 72, 72]).path == "stacked"
    assert resolved(settings(model__name="mlp", engine__path="stacked"), sizes=[72, 52, 20]).path == "stacked"


@pytest.mark.parametrize("network", ["mlp", "resnet18"])
def test_what_was_measured_is_used(network: str, table: Path) -> None:
    config = settings(model__name=network)
    measured = Choice("stacked", chunk=7, threads=1, memory_format="channels_last")
    assert engine.remember(engine.key(config, CPU), measured) == table
    assert resolved(config) == measured
    assert resolved(settings(model__name=network, engine__chunk=2)) == replace(measured, chunk=2)
    # What was measured for one path says nothing of the other one.
    assert resolved(settings(model__name=network, engine__path="sequential")) != replace(measured, path="sequential")
    # Nor of another width or number type.
    assert resolved(settings(model__name=network, engine__dtype="float64")).chunk != 7
    assert resolved(settings(model__name=network, model__norm="group")).chunk != 7
    other = settings(model__name="lenet")
    engine.remember(engine.key(other, CPU), Choice("sequential"))
    assert set(engine.measured()) == {engine.key(config, CPU), engine.key(other, CPU)}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"a": 1}', '{"a": {"path": "stacked", "speed": 3}}', '{"a": {}}', "\x00\xff"],
)
def test_a_damaged_table_is_named(content: str, table: Path) -> None:
    table.parent.mkdir()
    table.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"fedcl tune") as caught:
        resolved(settings(model__name="mlp"))
    assert str(table) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "choice",
    [{"path": "parallel"}, {"path": "stacked", "chunk": -1}, {"path": "stacked", "chunk": "many"},
     {"path": "stacked", "threads": -2}, {"path": "stacked", "memory_format": "square"}],
)  # fmt: skip
def test_a_table_with_a_wrong_value_is_named(choice: dict[str, Any], table: Path) -> None:
    config = settings(model__name="mlp")
    table.parent.mkdir()
    table.write_text(json.dumps({engine.key(config, CPU): choice}))
    with pytest.raises(UsageError, match="fedcl tune"):
        resolved(config)


def test_threads_of_small_perceptrons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack's first layers decide whether a second thread pays: clients, pixels and hidden units."""
    monkeypatch.setattr(engine, "usable_cpus", lambda: 2)
    config = settings(model__name="mlp", federation__clients=100, model__width=128)
    assert resolved(config, shape=(1, 8, 8)).threads == 1
    assert resolved(config, shape=(3, 32, 32)).threads == 2
    assert resolved(settings(model__name="lenet", federation__clients=100)).threads == 2


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"engine.device='cuda:99': this machine has \d+ CUDA devices"):
        resolved(settings(engine__device="cuda:99"))


def test_a_run_keeps_its_engine(table: Path, tiny: Tiny, tiny_config: TinyConfig) -> None:
    """Resuming computes as the run began, whatever has been measured meanwhile: the bits depend on it."""
    automatic = {"engine.threads": 0, "federation.rounds": 3}
    config = tiny_config(automatic)
    engine.remember(engine.key(config, CPU), Choice("stacked", chunk=2, threads=1))
    whole = tiny(automatic)

    class Interrupting(QuietProgress):
        def round(self, *told: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(config, progress=Interrupting())
    folder = Path(config.output.dir) / config.name / f"seed-{config.seed}"
    stored = load_config(folder / "config.yaml").engine
    assert (stored.path, stored.chunk, stored.threads, stored.memory_format) == ("stacked", 2, 1, "contiguous")
    assert stored.device == "cpu"
    engine.remember(engine.key(config, CPU), Choice("sequential", threads=1, memory_format="channels_last"))
    assert resume(folder, progress=QuietProgress()).summary["model_sha256"] == whole.summary["model_sha256"]
    assert asdict(load_config(folder / "config.yaml").engine) == asdict(stored)


@pytest.mark.parametrize("p", [0.0, 2.0**-25, 2.0**-24, 3e-8, 1e-3, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.9, 1 - 2.0**-24])
def test_a_mask_is_where_the_uniform_numbers_are_large(p: float) -> None:
    shape = (64, 1024)
    drawn = counter.counter_uniform(torch.tensor(5), counter.fold("a"), shape, torch.float64)
    assert torch.equal(counter.counter_keep(torch.tensor(5), counter.fold("a"), shape, p), drawn >= p)


def test_a_mask_agrees_at_each_of_its_thresholds() -> None:
    """Every value that was drawn, its neighbours and points between them as the probability."""
    drawn = counter.counter_uniform(torch.tensor(5), counter.fold("a"), (200,), torch.float64)
    for value in drawn[:50].tolist():
        for p in (value, value + 2.0**-26, value - 2.0**-26, value + 2.0**-50, value - 2.0**-50):
            assert torch.equal(counter.counter_keep(torch.tensor(5), counter.fold("a"), (200,), p), drawn >= p)
