"""Where a strategy is tried out: tiny streams of noise, real runs in a folder that is thrown away, and a watch on it.

The runs are those of ``fedcl run``: build, train, evaluate, checkpoint. Only the images are made up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .. import random as counter
from .. import registry
from ..app import client as client_app
from ..config import load_config
from ..federation.call import Header
from ..federation.flower_internals import LocalGrid
from ..federation.store import ClientStore
from ..records.checkpoint import load_newest
from ..records.hashing import model_sha256
from ..run import execute, resume
from ..strategy import Arrays, Strategy
from ..tell.progress import QuietProgress

if TYPE_CHECKING:
    from ..config import Config
    from ..federation.flower_internals import Message
    from ..tell.progress import Standing

FLOOR = 1e-4
"""Arrays with a smaller norm are compared as if they had this one."""

ROUNDS = 3
CLIENTS = 3

BASE: dict[str, Any] = {
    "data.validation": 0.0, "data.augment": [],
    "scenario.tasks": 2,
    "partition.name": "quantity_skew", "partition.skew": 1.0, "partition.min_size": 4,
    "model.name": "mlp", "model.width": 8, "model.depth": 1, "model.norm": "batch", "model.dropout": 0.2,
    "federation.clients": CLIENTS, "federation.rounds": ROUNDS, "federation.epochs": 1, "federation.batch_size": 8,
    "optimiser.lr": 0.05, "optimiser.momentum": 0.9,
    "engine.device": "cpu", "engine.dtype": "float64", "engine.threads": 1, "engine.path": "sequential",
    "checkpoint.every": 1, "evaluate.every": 1, "output.plots": False,
}  # fmt: skip
"""Two tasks of three classes, three clients of unequal size, BatchNorm and dropout, all numbers in float64."""

EDGE: dict[str, Any] = {
    "model.norm": "none", "model.dropout": 0.0, "federation.rounds": 1, "engine.path": "auto", "partition.min_size": 0,
}  # fmt: skip


def write_images(path: Path, classes: int, each: int, side: int = 8) -> str:
    """A data set of grey noise around a shade for each class, as ``.npz``; returns its path.

    Args:
        path: of the file.
        classes: how many.
        each: training images a class; there are two test images a class.
        side: height and width in pixels.
    """

    def part(images: int, name: str) -> tuple[Any, Any]:
        labels = np.repeat(np.arange(classes), images)
        noise = counter.uniform(len(labels) * side * side, 0, "check", name).reshape(-1, side, side)
        shades = (labels * (120 // classes)).astype(np.uint8)[:, None, None]
        return (noise * 130).astype(np.uint8) + shades, labels

    (train_x, train_y), (test_x, test_y) = part(each, "train"), part(2, "test")
    np.savez(path, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
    return str(path)


@dataclass(frozen=True)
class Ended:
    """A run that ended, read back from its folder.

    Attributes:
        folder: the run folder.
        summary: ``summary.json``.
        model: the global model.
        server: server states of the strategies, as ``strategy/NAME/...``.
        clients: each client's newest state.
        sequence: exchanges that the run had.
        departed: where the engine had to give way (clients one by one): its reason.
    """

    folder: Path
    summary: dict[str, Any]
    model: Arrays
    server: Arrays
    clients: dict[int, Arrays]
    sequence: int
    departed: str

    @property
    def hashes(self) -> tuple[str, str]:
        """Of the model, and of the states."""
        return self.summary["model_sha256"], self.summary["state_sha256"]

    def differs(self, other: Ended) -> str:
        """The first array that is not the same in every bit, in words; '' where all are."""
        for name, one, two in self.pairs(other):
            if one is None or two is None or model_sha256({"": one}) != model_sha256({"": two}):
                return f"{name} differs"
        return "" if self.hashes == other.hashes else "a hash differs"

    def distance(self, other: Ended, tolerance: float) -> str:
        """The first array that differs by more than ``tolerance`` of its norm, in words; '' where none does."""
        for name, one, two in self.pairs(other):
            if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
                return f"{name} is in one of the two runs only, or has another shape or type"
            # Below the floor there is nothing but rounding, as in the gradient of a bias before BatchNorm.
            norm = max(float(two.double().norm()), FLOOR)
            off = float((one.double() - two.double()).norm())
            if not off <= tolerance * norm:
                return f"{name} differs by {off / norm:.0e} of its norm"
        return ""

    def pairs(self, other: Ended) -> Iterable[tuple[str, Tensor | None, Tensor | None]]:
        """(name in words, here, there) of all arrays of model and states."""
        groups = [("the global model's ", self.model, other.model), ("the server state ", self.server, other.server)]
        for client in sorted({*self.clients, *other.clients}):
            here, there = self.clients.get(client, {}), other.clients.get(client, {})
            groups.append((f"the state of client {client} ", here, there))
        for words, here, there in groups:
            for name in sorted({*here, *there}):
                shown = name.removeprefix("strategy/") if here is self.server else name
                yield f"{words}{shown!r}", here.get(name), there.get(name)


@dataclass
class Lab:
    """Runs of one strategy class.

    Attributes:
        cls: the strategy.
        settings: of the user, on top of those of every check.
        place: an empty folder for images and run folders.
    """

    cls: type[Strategy]
    settings: Mapping[str, Any]
    place: Path
    _numbers: Any = field(default_factory=count)

    def config(self, changes: Mapping[str, Any], images: tuple[int, int] = (6, 12)) -> Config:
        """Settings of a run in a folder of its own; ``images`` are classes and training images of each."""
        file = self.place / "images-{}-{}.npz".format(*images)
        name = str(file) if file.exists() else write_images(file, *images)
        folder = str(self.place / f"run-{next(self._numbers)}")
        values = {**BASE, **self.settings, **changes, "data.name": name, "output.dir": folder}
        if "model.name" in self.settings:
            own = [key for key in ("model.width", "model.depth") if key not in self.settings]
            values = {key: value for key, value in values.items() if key not in own}
        return load_config({"strategy": [self.cls.name]}, values)

    def run(
        self,
        changes: Mapping[str, Any],
        images: tuple[int, int] = (6, 12),
        cls: type[Strategy] | None = None,
        grid: LocalGrid | None = None,
    ) -> Ended:
        """A whole run.

        Args:
            changes: settings that differ from the usual ones.
            images: classes and training images of each.
            cls: the class to be run, in place of the one that is checked.
            grid: the way to the nodes.

        Raises:
            FedclError: as ``fedcl run``.
        """
        cls = cls or self.cls
        config = self.config({**changes, "strategy": [cls.name]}, images)
        with registry.standing_in("strategies", cls):
            return read(execute(config, progress=QuietProgress(), grid=grid).folder)

    def interrupted(self, task: int, round: int) -> Ended:
        """A run that is stopped while a round is reported, and goes on."""
        from ..errors import Interrupted

        config = self.config({})
        with registry.standing_in("strategies", self.cls):
            try:
                folder = execute(config, progress=Impatient(task, round)).folder
            except Interrupted:
                folder = Path(config.output.dir) / config.name / f"seed-{config.seed}"
                resume(folder, progress=QuietProgress())
            return read(folder)

    def two_nodes(self) -> Ended:
        """A run whose clients live on two nodes, each built from what the server's messages say."""
        grid = LocalGrid(client_app, nodes=2)
        places = [self.place / f"node-{next(self._numbers)}" for _ in grid.contexts]
        for place, context in zip(places, grid.contexts.values(), strict=True):
            context.node_config["state-dir"] = str(place)
        changes = {"engine.runtime": "deploy", "engine.nodes": 2, "evaluate.personal": False}
        ended = self.run(changes, grid=grid)
        stores = [ClientStore(folder, 0) for place in places for folder in place.glob("*/clients")]
        clients = {client: store.get(client, ended.sequence) for store in stores for client in store.clients()}
        return replace(ended, clients=clients)


class Impatient(QuietProgress):
    """Presses Ctrl-C when a round is reported."""

    def __init__(self, task: int, round: int) -> None:
        self.at = (task, round)

    def round(self, task: int, round: int, standing: Standing) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        if (task, round) == self.at:
            raise KeyboardInterrupt


def read(folder: Path) -> Ended:
    """A finished run's arrays."""
    found = load_newest(folder / "checkpoints", lambda text: None)
    assert found is not None, "a finished run has a checkpoint"
    summary = json.loads((folder / "summary.json").read_text())
    store = ClientStore(folder / "clients", 0)
    last = int(found.meta["state"]["sequence"])
    parts: tuple[Arrays, Arrays] = ({}, {})
    for name, array in found.arrays.items():
        if name.startswith("model/"):
            parts[0][name.removeprefix("model/")] = array
        else:
            parts[1][name] = array
    clients = {client: store.get(client, last) for client in store.clients()}
    return Ended(folder, summary, *parts, clients, last, departure(folder))


def departure(folder: Path) -> str:
    """Why clients were trained one by one, by the events; '' where they were not."""
    from ..records.events import read_events

    events = read_events(folder / "events.jsonl")
    return next((str(e["why"]) for e in events if e["event"] == "engine" and "path" in e), "")


class Listening(LocalGrid):
    """The way to the one node, which notes what leaves the clients.

    Attributes:
        uploads: by the function that was called (``train`` or a method's name), the names of the arrays that left,
            without those of the model.
        models: names of the model's arrays that left.
    """

    def __init__(self, strategy: str) -> None:
        super().__init__(client_app)
        self.strategy = strategy
        self.uploads: dict[str, set[str]] = {}
        self.models: set[str] = set()
        self._asked: dict[str, str] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Delivers messages, and remembers which function each of them calls."""
        messages = list(messages)
        names = super().push_messages(messages)
        for name, message in zip(names, messages, strict=True):
            header = str(dict(message.content["call"])["header"])
            if header:
                self._asked[name] = Header.from_json(header).function
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies, read on the way."""
        replies = super().pull_messages(message_ids)
        for reply in replies:
            function = self._asked.get(reply.metadata.reply_to_message_id)
            if function is not None:
                self._note(function, json.loads(str(reply.content["reply"]["facts"]))["entries"])
        return replies

    def _note(self, function: str, names: Iterable[str]) -> None:
        noted = self.uploads.setdefault(function.rpartition(":")[2], set())
        for name in names:
            if function == "train" and name.startswith("model/"):
                self.models.add(name.removeprefix("model/"))
            else:
                noted.add(name.removeprefix(f"{self.strategy}/") if function == "train" else name)
