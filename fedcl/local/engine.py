"""How a run computes: device, path, chunk, threads and memory format, chosen once before the first round.

The choice is by a table of models, which ``fedcl tune`` replaces by what it measured on this machine. It is written
into the run's settings, and resuming uses it again: the bits of a result depend on it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import config as settings
from ..errors import UsageError
from ..records.environment import cpu_model, usable_cpus
from ..records.files import to_json, write_atomic, writing
from .batching import sharing

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
"""Type of the parameters; bf16 is autocast over float32 parameters."""


@dataclass(frozen=True)
class Choice:
    """Settings of the engine that change the speed, and the last bits of a result.

    Attributes:
        path: ``stacked`` or ``sequential``.
        chunk: clients in a stack; 0: the whole cohort of a node.
        threads: 0: one for each processor that may be used.
        memory_format: of images and convolutions.
    """

    path: str
    chunk: int = 0
    threads: int = 0
    memory_format: str = "contiguous"

    def __post_init__(self) -> None:
        known = self.path in ("stacked", "sequential") and self.memory_format in ("contiguous", "channels_last")
        if not known or any(type(count) is not int or count < 0 for count in (self.chunk, self.threads)):
            raise ValueError(f"{self} is no choice of settings")


ONE_BY_ONE = Choice("sequential", memory_format="channels_last")

ON_CPU: Mapping[str, Choice] = {
    "mlp": Choice("stacked", chunk=100),
    "lenet": Choice("stacked", chunk=50),
    "simple_cnn": Choice("stacked", chunk=25),
    "tiny_vit": Choice("stacked", chunk=10),
}
"""What was fastest on two processors; all other networks train one by one there."""

ALONE: Mapping[str, Choice] = {"mlp": Choice("sequential", threads=1)}
"""One by one, where that is not :data:`ONE_BY_ONE`: a second thread slows the products of one perceptron down."""

WORTH_STACKING = 2.0
"""Clients' steps a stacked call must do on average. Below, one by one was up to 1.7 times faster: clients of few images
and unequal sizes, whose batches differ at most steps. Above, stacking was faster (perceptrons, digits, 5 to 40
clients)."""

WORTH_THREADS = 2**20
"""Numbers in the first layers of a stack of perceptrons from which on more than one thread pays."""


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


def choose(
    config: settings.Config, device: torch.device, sizes: Sequence[int], inputs: int, table: Mapping[str, Any]
) -> Choice:
    """The engine for a model, a device and a cohort.

    Args:
        sizes: training images of each client of the cohort.
        inputs: numbers in an image.
        table: what was measured on this machine, see :func:`measured`.
    """
    path, cohort = config.engine.path, len(sizes)
    if cohort == 1 and path != "stacked":
        return ALONE.get(config.model.name, ONE_BY_ONE if device.type == "cpu" else Choice("sequential"))
    found = table.get(key(config, device))
    if found is not None and path in ("auto", found["path"]):
        return Choice(**found)
    if device.type != "cpu":
        return Choice("stacked" if path == "auto" else path)
    if path == "auto" and sharing(sizes, config) < WORTH_STACKING:
        path = "sequential"
    choice = ON_CPU.get(config.model.name, ONE_BY_ONE)
    if path == "auto" or path == choice.path:
        stack = min(cohort, choice.chunk or cohort)
        small = config.model.name == "mlp" and stack * inputs * (config.model.width or 128) < WORTH_THREADS
        return replace(choice, threads=1) if small else choice
    if path == "sequential":
        return ALONE.get(config.model.name, ONE_BY_ONE)
    return Choice("stacked")


def resolve_engine(config: settings.Config, shape: tuple[int, int, int], sizes: Sequence[int]) -> settings.Config:
    """The settings with nothing in ``engine`` left to be chosen.

    Args:
        shape: (C, H, W) of an image.
        sizes: training images of each client that one node trains in the first round.

    Raises:
        UsageError: a device that is not there.
    """
    engine = config.engine
    device = device_of(engine.device)
    choice = choose(config, device, sizes, math.prod(shape), measured())
    here = engine.runtime == "ray" and engine.nodes > 0
    layout = choice.memory_format if engine.memory_format == "auto" else engine.memory_format
    engine = replace(
        engine, device=str(device), path=choice.path, chunk=engine.chunk or choice.chunk, memory_format=layout,
        threads=engine.threads or choice.threads or max(1, usable_cpus() // (engine.nodes if here else 1)),
    )  # fmt: skip
    return replace(config, engine=engine)


def apply_engine(engine: settings.Engine) -> None:
    """Sets the process up as the resolved settings say: threads, memory and deterministic kernels."""
    torch.set_num_threads(engine.threads)
    keep_memory()
    if engine.deterministic and engine.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def keep_memory() -> None:
    """Lets the process keep the memory of large tensors that it has freed, for the next ones.

    By default the C library of Linux gives each back to the system and has it zeroed when it is asked for again, which
    took half of a round of a stack of perceptrons. Elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def key(config: settings.Config, device: torch.device) -> str:
    """Names what a measured choice is good for: processor or GPU, model and number type."""
    machine = cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)
    model = config.model
    parts = [machine, str(usable_cpus()), model.name, str(model.width), str(model.depth), model.norm]
    return " | ".join([*parts, config.engine.dtype])


def table_path() -> Path:
    """Where ``fedcl tune`` keeps its table: ``engine.json`` in FEDCL_CACHE, or in the user's cache folder."""
    own = os.environ.get("FEDCL_CACHE")
    if own:
        return Path(own) / "engine.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedcl" / "engine.json"


def measured() -> dict[str, Any]:
    """What ``fedcl tune`` has measured on this machine, by :func:`key`; {} without a table.

    Raises:
        UsageError: the table is damaged.
    """
    path = table_path()
    try:
        table = json.loads(path.read_text())
        return {name: asdict(Choice(**choice)) for name, choice in table.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        allowed = f"cannot be read ({error}); remove it, `fedcl tune` makes a new one"
        raise UsageError("the table of measured settings", str(path), allowed) from error


def prepare_table() -> None:
    """Makes sure, before anything is measured, that what will be measured can be kept.

    Raises:
        UsageError: the table is damaged.
        RunFailed: it cannot be written.
    """
    write_table(measured())


def write_table(table: Mapping[str, Any]) -> Path:
    """Replaces the table of this machine; returns its path."""
    path = table_path()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_json(table, indent=1).encode())
    return path


def remember(name: str, choice: Choice) -> Path:
    """Adds a measured choice to the table of this machine; raises as :func:`prepare_table`."""
    return write_table({**measured(), name: asdict(choice)})
