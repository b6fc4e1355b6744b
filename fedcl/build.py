"""From settings to everything a run needs: device, data, stream, split, model, stack; checked before anything runs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from . import config as settings
from .checkpoint import load_newest, unpack_tensors
from .data.augment import parse_augmentations
from .data.sources import load_dataset
from .environment import usable_cpus
from .errors import RunFailed, UsageError
from .federation.call import below
from .federation.node import Node
from .federation.store import ClientStore
from .models.arrays import buffer_names, initial_arrays, parameter_names
from .models.model import build_model
from .optim import make_optimiser
from .resolve import Resolved, misspelt, resolve
from .strategy import Arrays, Stack
from .stream import DatasetLabels, Split, Stream, partition_stream

if TYPE_CHECKING:
    from .data.store import Dataset, TensorStore
    from .models.model import FedModel

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
"""Type of the parameters; bf16 is autocast over float32 parameters."""


@dataclass(frozen=True)
class Experiment:
    """A run that is ready to start.

    Attributes:
        config: with the engine's settings resolved.
        test: the test images, labelled by class position.
        initial: parameters and buffers before the first task.
        class_names: by original class id.
        warnings: what the user should know of the split, one line each.
        dataset: name of the images.
        split_sha256: over stream and split, so that a resumed run can tell whether the data changed.
    """

    config: settings.Config
    stream: Stream
    split: Split
    node: Node
    test: TensorStore
    initial: Arrays
    class_names: tuple[str, ...]
    warnings: tuple[str, ...]
    dataset: str
    split_sha256: str


def device_of(name: str) -> torch.device:
    """The device that ``engine.device`` means.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError("engine.device", name, f"this machine has {count} CUDA devices; use cpu or auto")
    return device


def resolve_engine(config: settings.Config) -> settings.Config:
    """The engine's settings without ``auto``; they are written down and used again on resume."""
    engine = config.engine
    device = device_of(engine.device)
    convolutional = not config.model.name.startswith("mlp")
    layout = engine.memory_format
    if layout == "auto":
        layout = "channels_last" if convolutional and device.type == "cpu" else "contiguous"
    # A perceptron's matrix products are too small to share: a second thread made a round six times slower.
    threads = engine.threads or (usable_cpus() if convolutional else 1)
    path = "sequential" if engine.path == "auto" else engine.path
    engine = replace(engine, device=str(device), path=path, memory_format=layout, threads=threads)
    return replace(config, engine=engine)


def apply_engine(engine: settings.Engine) -> None:
    """Sets the process up as the resolved settings say: threads and deterministic kernels."""
    torch.set_num_threads(engine.threads)
    if engine.deterministic and engine.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def load_stream(config: settings.Config, resolved: Resolved, device: str) -> tuple[Dataset, Stream, Split]:
    """The images, the stream of tasks and its split over the clients, as the strategies arrange it."""
    scenario = resolved.scenario()
    own = scenario.dataset(config.scenario, config.seed)
    if own is not None:
        _refuse_unread(config)
    dataset = own or load_dataset(config.data, device)
    labels = DatasetLabels(dataset.train.labels, dataset.test.labels, dataset.num_classes, dataset.class_names)
    stream = scenario.build(labels, config.scenario, config.data.validation, config.seed)
    if config.scenario.first is not None:
        stream = replace(stream, stages=stream.stages[: config.scenario.first])
    split = partition_stream(stream, resolved.partition(), config.partition, config.federation.clients, config.seed)
    rows: list[list[Any]] = [list(task) for task in split.train]
    arranged = rows
    for strategy in resolved.strategies:
        arranged = strategy.arrange(arranged)
    if arranged is not rows:
        clients = len(arranged[0])
        personal = split.test if clients == split.clients else None
        split = replace(
            split,
            clients=clients,
            train=tuple(tuple(np.asarray(ids, dtype=np.int64) for ids in task) for task in arranged),
            test=personal,
            test_store=split.test_store if personal is not None else None,
        )
    return dataset, stream, split


def _refuse_unread(config: settings.Config) -> None:
    """Refuses settings of the data section that a scenario with images of its own does not read."""
    plain = settings.Data()
    for key in ("limit", "size", "domains", "memory_map"):
        if getattr(config.data, key) != getattr(plain, key):
            allowed = f"is not read with scenario.name={config.scenario.name}, which brings its own images"
            raise UsageError(f"data.{key}", getattr(config.data, key), allowed)


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
    from .split import split_warnings

    config = resolve_engine(config)
    apply_engine(config.engine)
    resolved = resolve(config)
    stack = Stack.of(resolved.strategies)
    dataset, stream, split = load_stream(config, resolved, config.engine.device)
    position = np.empty(dataset.num_classes, dtype=np.int64)
    position[list(stream.class_order)] = np.arange(len(stream.class_order))
    store = dataset.train.relabelled(position[dataset.train.labels])
    test = dataset.test.relabelled(position[dataset.test.labels])
    wants_projector = any(s.needs_projector for s in stack)
    if wants_projector and config.model.projector == "none":
        names_ = ", ".join(s.name for s in stack if s.needs_projector)
        raise UsageError("model.projector", "none", f"auto, linear or mlp: {names_} needs a projector")
    model = build_model(config.model, store.shape, projector=wants_projector, seed=config.seed)
    config = settle_batches(config, model)
    for strategy in stack:
        strategy.check(config, stream, split)
    dtype = DTYPES[config.engine.dtype]
    channels_last = config.engine.memory_format == "channels_last"
    initial = initial_arrays(model, dtype)
    if config.init is not None:
        initial = started_from(config.init, initial)
    initial = {n: a.to(store.device).contiguous() for n, a in initial.items()}
    node = Node(
        config=config, model=model.to(store.device), store=store, stack=stack, clients=ClientStore(Path(), 0),
        optimiser=make_optimiser(config.optimiser), class_order=stream.class_order,
        augmentations=parse_augmentations(config.data.augment), dtype=dtype, channels_last=channels_last,
        parameters=tuple(parameter_names(model)), buffers=tuple(buffer_names(model)), initial=initial,
    )  # fmt: skip
    warnings = misspelt(stack)
    if not any(s.centralised for s in stack):
        warnings += split_warnings(split, stream, dataset.class_names)
    return Experiment(
        config, stream, split, node, test, initial, dataset.class_names, tuple(warnings), dataset.name,
        split_hash(stream, split),
    )  # fmt: skip


def settle_batches(config: settings.Config, model: FedModel) -> settings.Config:
    """The settings with ``federation.batch_min`` resolved: a batch of one image has no variance to normalise by."""
    if config.federation.batch_min:
        return config
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    least = 2 if normed and config.model.batch_norm != "frozen" else 1
    return replace(config, federation=replace(config.federation, batch_min=min(least, config.federation.batch_size)))


def split_hash(stream: Stream, split: Split) -> str:
    """SHA-256 over class order, tasks, and each client's training rows."""
    digest = hashlib.sha256(repr((stream.class_order, [s.classes for s in stream.stages])).encode())
    for labels in (stream.train_labels, stream.test_labels):
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    for task in split.train:
        for ids in task:
            digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, dtype="<i8").tobytes())
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
    for name, array in arrays.items():
        owner, _, short = name.rpartition(".")
        module = model.get_submodule(owner)
        if short in module._parameters:
            module._parameters[short] = torch.nn.Parameter(array)
        else:
            module._buffers[short] = array
    return model.eval()
