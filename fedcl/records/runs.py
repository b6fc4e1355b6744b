"""Finished runs on disk: found, read and checked, for whatever compares, draws or reports them.

A folder with a ``config.yaml`` or a ``summary.json`` is a run's folder. One that is not whole (still running, failed,
cut short, damaged) is a :class:`Broken` with the reason in one line; it never stops the others from being read.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RunFailed, UsageError
from ..settings.values import one_line
from .events import read_events
from .runfolder import CONFIG, EVENTS, MATRIX, ROUNDS, SUMMARY

INSIDE = {"checkpoints", "clients", "plots", "plugins", "tensorboard", "wandb"}
"""Folders of a run that hold no runs."""

SAME_RUN = (
    "name", "seed", "output", "engine", "checkpoint", "protocol", "data.root", "data.download", "data.memory_map",
    "evaluate.every", "evaluate.batch_size", "evaluate.personal", "evaluate.probes", "evaluate.probe_samples",
    "evaluate.features",
)  # fmt: skip
"""Sections and keys that change neither the method nor the task: where a run lies, how fast it is, what is noted."""

METHOD = (
    "strategy", "options", "plugins", "init", "model", "optimiser", "data.augment", "federation.weighting",
    "federation.exchange", "federation.batch_size", "federation.drop_last", "federation.batch_min", "labels.batch_size",
)  # fmt: skip
"""Sections and keys that belong to a method. All others are the protocol: images, labels, tasks, who holds what, who
trains when and for how long, what is tested."""


def within(key: str, places: Sequence[str]) -> bool:
    """Whether a dotted key is one of ``places`` or lies in one.

    >>> within("engine.device", SAME_RUN), within("data.rooted", SAME_RUN)
    (True, False)
    """
    return any(key == place or key.startswith(f"{place}.") for place in places)


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Attributes:
        folder: of the run.
        summary: the content of ``summary.json``; its status is "done".
        config: ``config.yaml`` as a plain mapping.
        matrix: accuracy on task j after task i, (T, T), in [0, 1]; None where undefined.
    """

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    matrix: list[list[float | None]]

    @property
    def name(self) -> str:
        """The run's own name."""
        return str(self.summary["name"])

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return int(self.summary["seed"])

    @property
    def strategy(self) -> tuple[str, ...]:
        """The names in the stack."""
        return tuple(self.summary["strategy"])

    @property
    def label(self) -> str:
        """The stack in words, "a + b"."""
        return " + ".join(self.strategy)

    @property
    def num_tasks(self) -> int:
        """T."""
        return int(self.summary["num_tasks"])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting by dotted key; today's default where the run is older than the key."""
        from ..config import Config

        return {**flat(asdict(Config())), **flat(self.config)}

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """The settings that runs must share to be comparable, by dotted key; see :data:`METHOD`."""
        apart = (*SAME_RUN, *METHOD)
        return {key: value for key, value in self.settings.items() if not within(key, apart)}

    @cached_property
    def protocol_key(self) -> str:
        """:attr:`protocol` as one text: equal for comparable runs."""
        return json.dumps(self.protocol, sort_keys=True, default=str)

    @cached_property
    def method(self) -> dict[str, Any]:
        """The settings that belong to the method, by dotted key; see :data:`METHOD`."""
        return {key: value for key, value in self.settings.items() if within(key, METHOD)}

    def metric(self, key: str) -> Any:
        """A value of ``summary.json`` by dotted key, for example ``probes.linear.accuracy``; None if there is none."""
        found: Any = self.summary
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return None
            found = found[part]
        return found

    def events(self) -> list[dict[str, Any]]:
        """The events, each (task, round) as its last attempt told it; [] without ``events.jsonl``."""
        return read_events(self.folder / EVENTS)

    def rounds(self) -> list[dict[str, float | None]]:
        """The rows of ``rounds.csv`` by column name; empty cells are None, [] without the file.

        Raises:
            RunFailed: the file is damaged.
        """
        path = self.folder / ROUNDS
        if not path.exists():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as lines:
                rows = csv.DictReader(lines, strict=True)
                return [{name: float(cell) if cell else None for name, cell in row.items()} for row in rows]
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise RunFailed(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Broken:
    """A run's folder that cannot be used.

    Attributes:
        folder: of the run.
        why: one line.
    """

    folder: Path
    why: str


@dataclass(frozen=True)
class Found:
    """What lies under some paths, each sorted by folder."""

    runs: tuple[Run, ...]
    broken: tuple[Broken, ...]


def find_runs(paths: Sequence[Path]) -> Found:
    """The runs under some paths, each once.

    Args:
        paths: run folders, or folders that are searched for run folders at any depth.

    Raises:
        UsageError: a path is no folder, or has no run's folder in it.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        below = list(_run_folders(Path(path)))
        if not below:
            allowed = f"must be a run's folder, or hold such folders (with a {CONFIG})"
            raise UsageError("DIR", str(path), allowed if Path(path).is_dir() else f"is no folder; it {allowed}")
        for folder in below:
            folders.setdefault(folder.resolve(), folder)
    runs: list[Run] = []
    broken: list[Broken] = []
    for folder in sorted(folders.values()):
        try:
            runs.append(as_run(folder))
        except RunFailed as error:
            broken.append(Broken(folder, str(error)))
    return Found(tuple(runs), tuple(broken))


def as_run(path: Path) -> Run:
    """The one finished run of a folder.

    Raises:
        RunFailed: it is not there or not whole; the reason in one line, without the folder's name.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise RunFailed(f"there is no {CONFIG}")
    summary = _summary(folder)
    try:
        from ..metrics.io import read_matrix

        config = _config(folder / CONFIG)
        if not (folder / MATRIX).is_file():
            raise RunFailed(f"there is no {MATRIX}")
        cells = read_matrix(folder / MATRIX).tolist()
    except RunFailed:
        raise
    except UsageError as error:
        raise RunFailed(f"{MATRIX} is damaged: {one_line(RunFailed(error.allowed))}") from error
    if config.get("seed", summary["seed"]) != summary["seed"]:
        raise RunFailed(f"{CONFIG} has seed {config['seed']}, {SUMMARY} has {summary['seed']}")
    if len(cells) != summary["num_tasks"]:
        raise RunFailed(f"{MATRIX} has {len(cells)} tasks, {SUMMARY} has {summary['num_tasks']}")
    matrix = [[None if cell != cell else cell for cell in row] for row in cells]
    return Run(folder, summary, config, matrix)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; mappings that are values themselves stay whole.

    >>> flat({"options": {"fedprox": {"mu": 0.1}}, "scenario": {"arguments": {"a": 1}}})
    {'options.fedprox.mu': 0.1, 'scenario.arguments': {'a': 1}}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in ("scenario.arguments", "protocol"):
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def _run_folders(path: Path) -> Iterator[Path]:
    for place, inside, files in os.walk(path):
        if CONFIG in files or SUMMARY in files:
            inside.clear()
            yield Path(place)
        inside[:] = sorted(name for name in inside if name not in INSIDE and not name.startswith("."))


def _config(path: Path) -> dict[str, Any]:
    """The settings of a run. OmegaConf's own reader takes ten times as long, and there may be hundreds of runs."""
    import yaml  # type: ignore[import-untyped]  # ships no types

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_bytes())
        found = loader.get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFailed(f"{CONFIG} is damaged: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise RunFailed(f"{CONFIG} is damaged: it holds no settings")
    if not isinstance(found.get("plugins") or [], list):
        raise RunFailed(f"{CONFIG} is damaged: plugins is no list")
    return found


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    if not path.is_file():
        raise RunFailed(f"is not finished (no {SUMMARY}): it still runs, or `fedcl resume {folder}` goes on with it")
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunFailed(f"{SUMMARY} is damaged ({one_line(error)}); `fedcl resume {folder}` writes it again") from error
    status = summary.get("status") if isinstance(summary, dict) else None
    if status != "done":
        cause = f": {' '.join(str(summary['cause']).split())}" if status and summary.get("cause") else ""
        raise RunFailed(f"its status is {status or 'not said'}{cause}")
    kinds = {"name": str, "seed": int, "strategy": list, "num_tasks": int}
    wrong = [key for key, kind in kinds.items() if type(summary.get(key)) is not kind]
    if not wrong and not all(isinstance(name, str) for name in summary["strategy"]):
        wrong = ["strategy"]
    if wrong:
        raise RunFailed(f"{SUMMARY} has no {', '.join(wrong)}")
    return dict(summary)
