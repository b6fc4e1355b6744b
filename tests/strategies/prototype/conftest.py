"""One model on a hundred digits, and what the server has after clients of any partition were asked about them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl.build import Experiment, build
from fedcl.config import load_config
from fedcl.federation.call import Call, Header
from fedcl.federation.reduction import Reducer
from fedcl.local.training import NamedModels
from fedcl.models.arrays import grow_head
from fedcl.strategy import Predictor, Strategy

Arrays = dict[str, Tensor]


@dataclass
class Lab:
    """A strategy of one task, whose model has a head of ten classes; the encoder is as it was drawn."""

    experiment: Experiment
    arrays: Arrays
    down: Arrays = field(default_factory=dict)
    """What the strategy sends with its exchange."""

    @property
    def strategy(self) -> Strategy:
        (found,) = self.experiment.node.stack
        return found

    @property
    def labels(self) -> list[int]:
        labels: list[int] = self.experiment.node.store.label_tensor.tolist()
        return labels

    def rows(self, clients: int, skew: float, seed: int) -> list[list[int]]:
        """A partition: some images go to the client of their class, so that clients lack classes, and the last may
        have no image."""
        generator = np.random.default_rng(seed)
        owner = [
            label % max(1, clients - 1) if generator.random() < skew else int(generator.integers(clients))
            for label in self.labels
        ]
        return [[i for i, k in enumerate(owner) if k == client] for client in range(clients)]

    def asked(self, rows: list[list[int]], nodes: int = 1) -> Arrays:
        """What all clients' counts are reduced to, and what was sent down."""
        reducer, name = Reducer(self.strategy.reductions), self.strategy.name
        everything = list(range(10))
        for node in range(nodes):
            hosted = [k for k in range(len(rows)) if k % nodes == node]
            header = Header(f"{name}:count", hosted, 0, 1, 1, 1, 1, 10, everything, everything)
            ids = {k: torch.tensor(rows[k], dtype=torch.int64) for k in hosted}
            reply = self.experiment.node.handle(Call(header, self.arrays, {}, {name: self.down}, ids))
            reducer.merge(reply.arrays, reply.facts)
        return {**reducer.result(), **self.down}

    def scores(self, state: Arrays) -> Tensor:
        """(B, 10) of the test images by the strategy, with a state of the server."""
        known, models = torch.ones(10, dtype=torch.bool), NamedModels(self.experiment.node, {})
        return self.strategy.predict(Predictor(self.arrays, state, known, models), self.images("test")).detach()

    def images(self, part: str) -> Tensor:
        """All training or test images."""
        store = self.experiment.test if part == "test" else self.experiment.node.store
        return store.batch(torch.arange(len(store)), torch.float64)

    def features(self, part: str, arrays: Arrays | None = None) -> Tensor:
        """(n, d) of all training or test images, image by image."""
        node = self.experiment.node
        rows = [node.forward(arrays or self.arrays, image[None], "eval").features[0] for image in self.images(part)]
        return torch.stack(rows).detach()


@functools.cache
def _lab(name: str, options: tuple[tuple[str, Any], ...]) -> Lab:
    config = load_config(
        {"strategy": [name]},
        {
            "data.limit": 10, "data.validation": 0.0, "scenario.tasks": 1, "model.width": 8, "model.depth": 1,
            "engine.dtype": "float64", "engine.threads": 1, "engine.device": "cpu", f"options.{name}": dict(options),
        },
    )  # fmt: skip
    experiment = build(config)
    return Lab(experiment, grow_head(experiment.initial, experiment.node.model, experiment.stream.class_order, 0))


@pytest.fixture
def pooled() -> Any:
    """``pooled(name, **options)``: a :class:`Lab`."""

    def make(name: str, **options: Any) -> Lab:
        lab = _lab(name, tuple(sorted(options.items())))
        return Lab(lab.experiment, lab.arrays)

    return make


@pytest.fixture(params=range(8))
def partition(request: pytest.FixtureRequest) -> tuple[int, int, float, int]:
    """(clients, nodes, skew, seed): from one client to more clients than classes, from even to one owner a class."""
    seed = int(request.param)
    return (1, 3, 9, 12)[seed % 4], 1 + seed % 2, (0.0, 0.9, 1.0)[seed % 3], seed
