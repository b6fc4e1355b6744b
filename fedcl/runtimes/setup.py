"""What a node outside the server's process is built from, and the node itself.

Every message to such a node carries a :class:`Setup`, so that any process can answer it: under Ray a worker builds its
node once and keeps it, under ``deploy`` each message meets a fresh process. Streams and splits are not built there:
sample ids travel in the messages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from .. import __version__
from .. import config as settings
from ..errors import RunFailed, UsageError

if TYPE_CHECKING:
    from ..build import Experiment
    from ..data.store import TensorStore
    from ..federation.node import Node

NodeConfig = Mapping[str, str | int | float | bool]

PARTITION, DATA_ROOT, STATE_DIR, DEVICE = "partition-id", "data-root", "state-dir", "device"
"""Keys of a node's own configuration, ``flower-supernode --node-config``."""

PLACE = "node.json"
CACHE = 256 * 2**20
"""Bytes of client state files that a process keeps in memory."""


@dataclass(frozen=True)
class Setup:
    """What a node needs to build itself; JSON on the wire.

    Attributes:
        run: tells the states of this run from those of others.
        config: all settings, the engine's resolved.
        class_order: original class ids in the order of positions.
        own_test: the store that clients' own test rows are of.
        states: folder of the client states, where nodes share it with the server; None: the node's own ``state-dir``.
        kept: exchanges whose client states a checkpoint may need, right after they changed; None: discard nothing.
        hidden: rows of the training store whose labels no client may see, see :func:`fedcl.streams.labels.to_text`.
    """

    run: str
    config: dict[str, Any]
    class_order: list[int]
    own_test: Literal["train", "test"] | None
    states: str | None
    kept: list[int] | None = None
    hidden: str = ""

    @classmethod
    def of(cls, experiment: Experiment, folder: Path) -> Setup:
        """The setup of a run in its folder."""
        from ..streams.labels import to_text

        config = experiment.config
        shared = config.engine.runtime == "ray"
        if shared:
            config = _shared(config, folder)
        run = hashlib.sha256(f"{folder.absolute()}\n{experiment.split_sha256}".encode()).hexdigest()[:16]
        return cls(
            run=f"{config.name}-{config.seed}-{run}",
            # A node gets the arrays of the model in each message; files that the server starts from are not its own.
            config=asdict(replace(config, init=None, model=replace(config.model, checkpoint=None))),
            class_order=[int(label) for label in experiment.stream.class_order],
            own_test=experiment.split.test_store,
            states=str((folder / "clients").absolute()) if shared else None,
            hidden=to_text(experiment.split.hidden),
        )

    def to_json(self) -> str:
        """The wire form."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """The inverse of :meth:`to_json`."""
        return cls(**json.loads(text))

    def with_kept(self, kept: list[int] | None) -> Setup:
        """The same setup once other checkpoints are kept."""
        return replace(self, kept=kept)

    def state_dir(self, own: NodeConfig) -> Path:
        """Where a node keeps the states of its clients.

        Raises:
            UsageError: it was not told where.
        """
        if self.states is not None:
            return Path(self.states)
        if STATE_DIR not in own:
            allowed = "a SuperNode needs a folder for its clients' states: --node-config 'state-dir=\"FOLDER\"'"
            raise UsageError(STATE_DIR, None, allowed)
        return Path(str(own[STATE_DIR])).expanduser() / self.run / "clients"


def _shared(config: settings.Config, folder: Path) -> settings.Config:
    """The settings for workers that see the server's files, from any working directory."""
    from ..data.catalog import data_root

    stored = [str((folder / f"plugins/{n}/{Path(p).name}").absolute()) for n, p in enumerate(config.plugins)]
    data = replace(config.data, root=config.data.root or _existing(data_root(None)))
    return replace(config, plugins=stored, data=data)


def _existing(folder: Path) -> str | None:
    return str(folder.absolute()) if folder.is_dir() else None


def build_node(setup: Setup, own: NodeConfig) -> Node:
    """A node as the server's settings and the node's own say, without Avalanche unless the images come from there.

    Raises:
        UsageError: the node lacks the data, a strategy, a device or a folder for states.
    """
    from ..build import make_node
    from ..federation.store import ClientStore
    from ..local.engine import apply_engine, device_of
    from ..settings.resolve import resolve
    from ..stack import Stack
    from ..streams.labels import from_text
    from ..streams.loading import load_images

    config = settings.load_config(setup.config)
    # Each worker sees its own GPUs, counted from 0; a SuperNode may have another device than the server.
    device = str(own.get(DEVICE, "cuda" if config.engine.device.startswith("cuda") else config.engine.device))
    config = replace(config, engine=replace(config.engine, device=str(device_of(device))))
    if setup.states is None:
        config = replace(config, data=replace(config.data, root=cast("str | None", own.get(DATA_ROOT))))
    apply_engine(config.engine)
    resolved = resolve(config)
    dataset = load_images(config, resolved.scenario(), config.engine.device)
    node = make_node(
        config, Stack.of(resolved.strategies), dataset, setup.class_order, setup.own_test, from_text(setup.hidden)
    )
    node.clients = ClientStore(setup.state_dir(own), CACHE)
    return node


def images_digest(store: TensorStore) -> str:
    """SHA-256 over shape and labels: two nodes that disagree here hold different images."""
    head = repr((len(store), store.shape)).encode()
    return hashlib.sha256(head + store.labels.astype("<i8").tobytes()).hexdigest()


def introduce(node: Node, setup: Setup, own: NodeConfig, sequence: int) -> dict[str, Any]:
    """What a node tells of itself at the start; client states newer than ``sequence`` are discarded where it owns them.

    Returns:
        ``partition``: its ``partition-id`` or None; ``place``: its [number, of] in this run if it has served it
        before; ``images``: digest of what it holds; ``version``, ``pid``.
    """
    place = None
    if setup.states is None:
        node.clients.discard_after(sequence)
        file = node.clients.folder.parent / PLACE
        place = json.loads(file.read_text()) if file.is_file() else None
    images = [images_digest(node.store), images_digest(node.test)]
    partition = own.get(PARTITION)
    return {"partition": partition, "place": place, "images": images, "version": __version__, "pid": os.getpid()}


def take_place(node: Node, setup: Setup, place: list[int]) -> None:
    """Remembers beside the client states which [number, of] nodes this one is, for a run that goes on later."""
    file = node.clients.folder.parent / PLACE
    data = json.dumps(place).encode()
    if setup.states is None and not (file.is_file() and file.read_bytes() == data):
        from ..records import files

        with files.writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(file, data)


def check_places(nodes: list[dict[str, Any]], sequence: int) -> None:
    """Checks that the nodes of a run that goes on are those that hold its clients' states.

    Args:
        nodes: introductions in the order of the nodes' numbers.
        sequence: exchanges the run has had.

    Raises:
        RunFailed: a node holds the states of other clients, or none.
    """
    for number, node in enumerate(nodes):
        if sequence and node["place"] != [number, len(nodes)]:
            has = "no state of this run" if node["place"] is None else "node {} of {} of it".format(*node["place"])
            raise RunFailed(
                f"the run cannot go on: node {number} of {len(nodes)} has {has} in its state-dir; start the SuperNodes "
                f"with the partition-id and state-dir they had"
            )
