"""From settings to everything a run needs: device, data, stream, split, model, stack; checked before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from . import config as settings
from .data.augment import parse_augmentations
from .errors import RunFailed, UsageError
from .federation.call import below
from .federation.cohort import cohort_there, reach_note
from .federation.node import Node
from .federation.store import ClientStore
from .local.engine import DTYPES, apply_engine, device_of, resolve_engine
from .local.optim import Group, make_optimiser
from .local.training import blame
from .measure.judging import settle_evaluation
from .measure.on_validation import on_validation
from .models.arrays import buffer_names, initial_arrays, parameter_names
from .models.model import add_modules, build_model
from .records.checkpoint import load_newest, unpack_tensors
from .settings.resolve import misspelt, resolve
from .stack import Stack
from .strategy import Arrays
from .stream import Ids, Split, Stream
from .streams.arrival import check_once, once_notes, size_at_hand
from .streams.clocks import with_whole_head
from .streams.labels import as_strategies_see, check_learners, masked
from .streams.loading import load_stream

if TYPE_CHECKING:
    from .data.store import Dataset, TensorStore
    from .models.model import FedModel


@dataclass(frozen=True)
class Experiment:
    """A run that is ready to start.

    Attributes:
        config: with the engine's settings resolved.
        class_names: by original class id.
        warnings: what is odd about the split, one line each.
        notes: the same in short.
        dataset: name of the images.
        split_sha256: over stream and split, so that a resumed run can tell whether the data changed.
    """

    config: settings.Config
    stream: Stream
    split: Split
    node: Node
    class_names: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    dataset: str
    split_sha256: str

    @property
    def test(self) -> TensorStore:
        """The test images, labelled by class position."""
        return self.node.test

    @property
    def classes(self) -> list[str]:
        """Names of the classes by position; their original ids where they have no names."""
        order = self.stream.class_order
        return [self.class_names[c] if self.class_names else str(c) for c in order]

    @property
    def initial(self) -> Arrays:
        """Parameters and buffers before the first task."""
        return self.node.initial


def build_split(config: settings.Config) -> tuple[Stream, Split, tuple[str, ...]]:
    """Stream, split and class names by original class id, for `fedcl split`.

    Raises:
        UsageError: settings that do not fit the data.
    """
    dataset, stream, split = load_stream(config, resolve(config), "cpu")
    return stream, split, dataset.class_names


def build(config: settings.Config) -> Experiment:
    """Everything a run needs.

    Raises:
        UsageError: settings that are wrong, or do not fit the data or one another.
    """
    from .runtimes.resources import check_runtime, settle_resources
    from .streams.split_notes import split_notes, split_warnings

    check_runtime(config)
    resolved = resolve(config)
    stack = Stack.of(resolved.strategies)
    config = settle_resources(config)
    dataset, stream, split = load_stream(config, resolved, str(device_of(config.engine.device)))
    if config.evaluate.on == "validation":
        dataset, stream, split = on_validation(dataset, stream, split)
    config = resolve_engine(with_whole_head(config, split), dataset.train.shape, first_sizes(config, split))
    apply_engine(config.engine)
    check_learners(split, resolved.strategies)
    config = settle_evaluation(config, resolved.scenario, split)
    node = make_node(config, stack, dataset, stream.class_order, split.test_store, split.hidden)
    seen = as_strategies_see(stream, split)
    for strategy in stack:
        with blame(strategy, "check"):
            strategy.check(node.config, *seen)
    check_once(config, stack, stream)
    common, warned, noted = misspelt(stack) + once_notes(config, split), [], []
    if not any(s.centralised for s in stack):
        reach = reach_note(config, split)
        warned = split_warnings(split, stream, dataset.class_names) + reach
        noted = split_notes(split, stream, dataset.class_names) + reach
    return Experiment(
        node.config, stream, split, node, dataset.class_names, (*common, *warned), (*common, *noted), dataset.name,
        split_hash(stream, split),
    )  # fmt: skip


def first_sizes(config: settings.Config, split: Split) -> list[int]:
    """Training images of the clients that one node trains in the first round; of 500 of them where they are more."""
    hosted = [c for c in cohort_there(config, split, 0, 0) if c % max(1, config.engine.nodes) == 0]
    return [size_at_hand(config, split, 0, 0, c) for c in hosted[:500]]


def make_node(
    config: settings.Config,
    stack: Stack,
    dataset: Dataset,
    class_order: Sequence[int],
    own_test: Literal["train", "test"] | None,
    hidden: Ids | None = None,
) -> Node:
    """A node, from settings whose engine is resolved; it knows images and labels, but no stream and no split.

    Args:
        class_order: original class ids in the order of positions.
        own_test: the store that clients' own test rows are of.
        hidden: rows of the training store whose labels nobody sees; None: there are none.

    Raises:
        UsageError: settings that do not fit the data or one another.
    """
    position = np.empty(dataset.num_classes, dtype=np.int64)
    position[list(class_order)] = np.arange(len(class_order))
    labels = position[dataset.train.labels]
    store = dataset.train.relabelled(labels if hidden is None else masked(labels, hidden))
    test = dataset.test.relabelled(position[dataset.test.labels])
    wants_projector = any(s.needs_projector for s in stack)
    if wants_projector and config.model.projector == "none":
        names_ = ", ".join(s.name for s in stack if s.needs_projector)
        raise UsageError("model.projector", "none", f"auto, linear or mlp: {names_} needs a projector")
    model = build_model(config.model, store.shape, projector=wants_projector, seed=config.seed)
    with_modules(model, stack, config.seed)
    config = settle_batches(config, model)
    dtype = DTYPES[config.engine.dtype]
    initial = initial_arrays(model, dtype)
    if config.init is not None:
        initial = started_from(config.init, initial)
    initial = {n: a.to(store.device).contiguous() for n, a in initial.items()}
    return Node(
        config=config, model=model.to(store.device), store=store, test=test, stack=stack,
        clients=ClientStore(Path(), 0), optimiser=make_optimiser(config.optimiser, groups_of(stack)),
        class_order=tuple(class_order), augmentations=parse_augmentations(config.data.augment), dtype=dtype,
        channels_last=config.engine.memory_format == "channels_last",
        parameters=tuple(parameter_names(model)), buffers=tuple(buffer_names(model)), initial=initial,
        own_test={"train": store, "test": test, None: None}[own_test],
    )  # fmt: skip


def with_modules(model: FedModel, stack: Stack, seed: int) -> FedModel:
    """The model, with the modules that strategies add to it."""
    for strategy in stack.having("modules"):
        with blame(strategy, "modules"):
            add_modules(model, strategy.name, seed, partial(strategy.modules, model))
    return model


def groups_of(stack: Stack) -> list[Group]:
    """The optimiser settings that strategies ask for."""
    found: list[Group] = []
    for strategy in stack.having("groups"):
        with blame(strategy, "groups"):
            found += strategy.groups()
    return found


def settle_batches(config: settings.Config, model: FedModel) -> settings.Config:
    """The settings with ``federation.batch_min`` resolved: a batch of one image has no variance to normalise by."""
    if config.federation.batch_min:
        return config
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    least = 2 if normed and config.model.batch_norm != "frozen" else 1
    return replace(config, federation=replace(config.federation, batch_min=min(least, config.federation.batch_size)))


HASHED = 8
"""Clients of a drawn population whose rows go into the hash of the split."""


def split_hash(stream: Stream, split: Split) -> str:
    """SHA-256 over class order, tasks, and each client's training rows.

    A drawn population is told by its rule and the rows it draws from; a few clients stand for the rule's code.
    """
    digest = hashlib.sha256(repr((stream.class_order, [s.classes for s in stream.stages])).encode())
    for labels in (stream.train_labels, stream.test_labels):
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    if split.clocks is not None:
        digest.update(repr(split.clocks).encode())
    if split.rule:
        digest.update(split.rule.encode())
        for stage in stream.stages:
            digest.update(np.ascontiguousarray(stage.train_ids, dtype="<i8").tobytes())
        split = split.only(split.some(HASHED))
    for task in (*split.rows, *(split.held_out.rows if split.held_out else ())):
        for ids in task:
            digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, dtype="<i8").tobytes())
    if split.unlabelled is not None:
        digest.update(b"unlabelled" + np.ascontiguousarray(split.hidden, dtype="<i8").tobytes())
        for task in replace(split, train=split.unlabelled).rows:
            for ids in task:
                digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, dtype="<i8").tobytes())
    for ids in split.public or ():
        digest.update(b"public" + np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


BASE = "base.safetensors"
"""The model after the first task, kept in every run folder for ``init=RUN@task0``."""


def started_from(source: str, initial: Arrays) -> Arrays:
    """Initial arrays with the encoder (and projector) of a file or of another run.

    Args:
        source: ``RUN@task0`` (the model after another run's first task), a run folder (its newest checkpoint), or a
            ``.safetensors`` file with names ``encoder.*``.

    Raises:
        UsageError: nothing there, or it does not fit the model.
    """
    folder, at, task = source.rpartition("@")
    if at and task != "task0":
        raise UsageError("init", source, "RUN@task0, a run folder, or a .safetensors file", ["RUN@task0"])
    path = Path(folder) / BASE if at else Path(source)
    if path.is_dir():
        found = load_newest(path / "checkpoints", lambda text: None)
        if found is None:
            raise UsageError("init", source, "a run folder with a checkpoint")
        given = below(found.arrays, "model/")
    elif path.is_file():
        try:
            given = unpack_tensors(path.read_bytes())
        except Exception as error:
            raise UsageError("init", source, f"a .safetensors file: {error}") from error
    else:
        raise UsageError("init", source, f"RUN@task0, a run folder, or a .safetensors file; {path} does not exist")
    wanted = [n for n in initial if n.startswith("encoder.")]
    missing = [n for n in wanted if n not in given]
    if missing:
        raise UsageError("init", source, f"arrays of this encoder; it has no {missing[0]!r}")
    taken = wanted + [n for n in initial if n.startswith("projector.") and n in given]
    for name in taken:
        if given[name].shape != initial[name].shape:
            here, there = tuple(initial[name].shape), tuple(given[name].shape)
            raise UsageError("init", source, f"{name!r} of shape {here}, not {there}")
    return initial | {n: given[n].to(initial[n].dtype) for n in taken}


def load_model(folder: Path) -> FedModel:
    """The global model of a run's newest checkpoint as a module in eval mode.

    Raises:
        RunFailed: the run has no whole checkpoint.
    """
    found = load_newest(folder / "checkpoints", lambda text: None)
    if found is None:
        raise RunFailed(f"{folder} has no checkpoint to load a model from")
    config = settings.load_config(folder / "config.yaml", [])
    arrays = below(found.arrays, "evaluated/") or below(found.arrays, "model/")
    shape = tuple(found.meta["image_shape"])
    projector = any(n.startswith("projector.") for n in arrays)
    model = build_model(replace(config.model, checkpoint=None), shape, projector=projector, seed=config.seed)
    if any(n.startswith("extra.") for n in arrays):
        with_modules(model, Stack.of(resolve(config).strategies), config.seed)
    for name, array in arrays.items():
        owner, _, short = name.rpartition(".")
        module = model.get_submodule(owner)
        if short in module._parameters:
            module._parameters[short] = torch.nn.Parameter(array)
        else:
            module._buffers[short] = array
    return model.eval()
