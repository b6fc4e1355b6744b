"""Fixtures of all tests: tiny real runs, and the literal federated loop they are compared with."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

TINY: dict[str, Any] = {
    "data.name": "digits",
    "data.limit": 12,
    "data.validation": 0.0,
    "data.augment": [],
    "scenario.tasks": 2,
    "partition.name": "dirichlet",
    "partition.alpha": 1.0,
    "partition.min_size": 1,
    "model.name": "mlp",
    "model.width": 8,
    "model.depth": 1,
    "federation.clients": 3,
    "federation.rounds": 2,
    "federation.epochs": 1,
    "federation.batch_size": 8,
    "optimiser.lr": 0.1,
    "optimiser.momentum": 0.9,
    "engine.device": "cpu",
    "engine.dtype": "float64",
    "engine.threads": 1,
    "output.plots": False,
}
"""Under a second: 120 digits, two tasks of five classes, three unequal clients, two rounds."""


@pytest.fixture(autouse=True)
def own_plugins() -> Iterator[None]:
    """What a test loads as a plugin is unknown to the next one, so that tests may run in any order."""
    from fedcl import registry

    known = registry._default
    before = dict(known._plugins), dict(known._classes)
    yield
    known._plugins, known._classes = before


@pytest.fixture(autouse=True)
def no_measured_engine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `fedcl tune` has measured on this machine does not decide a test."""
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path_factory.getbasetemp() / "no-cache"))


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[[Mapping[str, Any]], Config]:
    """``tiny_config({"strategy": ["fedprox"]})``: settings of a tiny run in a folder of its own."""
    from fedcl.config import load_config

    folders = count()

    def config(overrides: Mapping[str, Any]) -> Config:
        place = {"output.dir": str(tmp_path / f"runs{next(folders)}")}
        return load_config({"strategy": ["finetune"]}, {**TINY, **place, **overrides})

    return config


@pytest.fixture
def tiny(tiny_config: Callable[[Mapping[str, Any]], Config]) -> Callable[[Mapping[str, Any]], RunResult]:
    """``tiny(overrides)``: runs a tiny experiment and returns its result."""
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress

    return lambda overrides: execute(tiny_config(overrides), progress=QuietProgress())


def _helper(name: str) -> ModuleType:
    # Tests are imported by path, so a module beside them has no importable name of its own.
    path = Path(__file__).parent / "helpers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fedcl_test_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "__loaded__"):
        spec.loader.exec_module(module)
        module.__dict__["__loaded__"] = True
    return module


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """``tests/helpers/oracle.py``: federated continual learning as plain loops in float64."""
    return _helper("oracle")


@pytest.fixture(scope="session")
def rehearsal() -> ModuleType:
    """``tests/helpers/rehearsal.py``: the same with one memory a client."""
    return _helper("rehearsal")


@pytest.fixture(scope="session")
def made_runs() -> ModuleType:
    """``tests/helpers/made_runs.py``: run folders as a finished run leaves them, without the run."""
    return _helper("made_runs")


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """``plugin(body)``: settings of a run with a strategy of this body; ``plugin.seen(settings)``: what it noted."""
    return _helper("probes").Probes(tmp_path)


@pytest.fixture
def moved() -> Callable[[RunResult], set[str]]:
    """``moved(result)``: names of the parameters that a tiny run changed."""
    compare: Callable[[RunResult], set[str]] = _helper("probes").moved
    return compare


@pytest.fixture(scope="session")
def children() -> Iterator[Any]:
    """Starts runs in processes of their own that die or fail at an exact point."""
    forking = _helper("children").Children()
    yield forking
    forking.close()


@pytest.fixture
def lab(children: Any, tiny_config: Callable[[Mapping[str, Any]], Config], tmp_path: Path) -> Any:
    """``tests/helpers/lab.py``: whole, stopped and resumed runs of a few stacks."""
    return _helper("lab").Lab(children, tiny_config, _helper("children").EVERYTHING, tmp_path)


def _images(path: Path, classes: int, each: int) -> str:
    """Writes ``each`` training images and one test image a class, 4x4 noise, and returns the path."""
    import numpy as np

    from fedcl import random as counter

    def part(count: int, name: str) -> tuple[Any, Any]:
        labels = np.repeat(np.arange(classes), count)
        noise = counter.uniform(len(labels) * 16, 0, "images", name).reshape(-1, 4, 4)
        shades = (labels * (100 // classes)).astype(np.uint8)[:, None, None]
        return (noise * 155).astype(np.uint8) + shades, labels

    (train_x, train_y), (test_x, test_y) = part(each, "train"), part(1, "test")
    np.savez(path, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
    return str(path)


@pytest.fixture(
    params=[
        "one class",
        "one class a task",
        "one image a client",
        "empty clients",
        "batch of 1",
        "unseen classes",
    ]
)
def hard(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run at the edge of what works; every strategy must get through."""
    file = tmp_path / "hard.npz"
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "one class": lambda: {"data.name": _images(file, 1, 9), "scenario.tasks": 1},
        "one class a task": lambda: {"data.name": _images(file, 2, 9), "partition.name": "iid"},
        "one image a client": lambda: {"data.name": _images(file, 6, 1), "partition.name": "iid"},
        "empty clients": lambda: {
            "data.name": _images(file, 4, 2), "partition.min_size": 0, "federation.clients": 9,
        },
        "batch of 1": lambda: {
            "data.name": _images(file, 4, 3), "federation.batch_size": 1, "optimiser.lr": 0.01,
        },
        "unseen classes": lambda: {
            "data.name": _images(file, 6, 4), "partition.name": "classes_per_client", "partition.classes": 1,
        },
    }  # fmt: skip
    return cases[request.param]()
