"""What this machine has for a sweep: processors, memory and GPUs, read without importing torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..records.environment import SHARE, usable_cpus

ESTIMATE = 1500 * 2**20
"""Bytes that a run is taken to need before one has ended; a small one with torch and Avalanche holds about 1 GB."""

KEPT_FREE = 0.1
"""Share of the free memory that a sweep leaves alone."""


@dataclass(frozen=True)
class Room:
    """How many runs at a time, and what each may use.

    Attributes:
        workers: processes.
        cpus: processors of each.
        memory: bytes that all may hold together; None where the system does not tell.
        gpus: of which each worker sees one, in turn; empty without.
    """

    workers: int
    cpus: int
    memory: int | None
    gpus: tuple[str, ...] = ()

    def fitting(self, peak: int) -> int:
        """How many runs of a peak memory fit, at least 1 and at most ``workers``."""
        if self.memory is None or peak <= 0:
            return self.workers
        return max(1, min(self.workers, self.memory // peak))

    @property
    def words(self) -> str:
        """For a person."""
        at = f"{self.workers} {'run' if self.workers == 1 else 'runs'} at a time"
        cpus = f"{self.cpus} {'processor' if self.cpus == 1 else 'processors'}"
        gpus = f", {len(self.gpus)} GPU{'s' * (len(self.gpus) > 1)} for all" if self.gpus else ""
        if self.memory is None:
            return f"{at} with {cpus} each{gpus}"
        fit = max(1, self.memory // ESTIMATE)
        return f"{at} with {cpus} each{gpus}; memory for {fit}, by an estimate of {ESTIMATE / 2**30:.1f} GB a run"

    def environment(self, number: int) -> dict[str, str]:
        """Environment variables of a worker; torch reads some when it is imported."""
        share = str(self.cpus)
        shares = {SHARE: share, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, "OPENBLAS_NUM_THREADS": share}
        if self.gpus:
            shares["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
        return shares


def make_room(workers: int | None, runs: int, config: Config) -> Room:
    """How many workers, from the processors, the GPUs and the memory that are free now.

    A run of ``engine.threads`` processors counts as that many, one of the runtime ``ray`` as all. With GPUs there is a
    worker for each, unless the user asks for more.

    Args:
        workers: as asked for, at least 1, or None.
        runs: how many there are to do.
        config: of the first run; the others are taken to be alike.
    """
    cpus, engine = usable_cpus(), config.engine
    gpus = visible_gpus() if engine.device in ("auto", "cuda") else ()
    if workers is None:
        each = cpus if engine.runtime == "ray" else engine.threads or 1
        workers = max(1, cpus // each)
        if gpus:
            workers = min(workers, len(gpus))
        elif engine.device.startswith("cuda"):
            workers = 1
    workers = max(1, min(workers, runs))
    free = available_memory()
    memory = None if free is None else int(free * (1 - KEPT_FREE))
    room = Room(workers, max(1, cpus // workers), memory, gpus)
    return Room(room.fitting(ESTIMATE), room.cpus, memory, gpus)


def visible_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs that CUDA would use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name for name in given.split(",") if name and name != "-1")
    devices = Path("/dev").glob("nvidia[0-9]*")
    return tuple(sorted(name for d in devices if (name := d.name.removeprefix("nvidia")).isdigit()))


def available_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that processes may still take, by the system and by the limit of a container; None where neither tells."""
    found = []
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match:
            found.append(int(match[1]) * 1024)
    except OSError:
        pass
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
        # What files are cached counts as used, but is given up when it is needed.
        cached = _pairs((group / "memory.stat").read_text()).get("inactive_file", 0)
        if limit != "max":
            found.append(max(0, int(limit) - int(used) + cached))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _pairs(text: str) -> Mapping[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}
