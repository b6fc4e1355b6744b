"""One experiment from its settings to its folder: build, run, evaluate, save, resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config as settings
from .build import build, build_split
from .conduct import conduct
from .errors import RunFailed, UsageError
from .federation.server import State
from .records.checkpoint import load_newest
from .records.environment import environment
from .records.result import RunResult
from .records.runfolder import RunFolder
from .runtimes import deploy
from .runtimes.links import count_nodes
from .runtimes.resources import check_runtime
from .settings.resolve import anchored
from .tell.callbacks import Told, load_callbacks
from .tell.notebook import notebook_progress
from .tell.progress import Progress
from .tell.quiet import quiet_libraries

if TYPE_CHECKING:
    from .federation.flower_internals import Grid

__all__ = ["RunResult", "build_split", "execute", "load", "resume", "run"]


def run(
    config_or_path: settings.Config | Mapping[str, Any] | str | Path | None = None,
    *,
    progress: Progress | None = None,
    overrides: Mapping[str, Any] | None = None,
    callbacks: Sequence[Told] = (),
    **sections: Any,
) -> RunResult:
    """One experiment from Python.

    Args:
        config_or_path: a :class:`fedcl.config.Config`, a mapping of sections, a YAML file, or a preset's name;
            None is the default stack of ``fedcl demo``.
        progress: who is told; by default a line below the cell of a Jupyter notebook, elsewhere nobody.
        overrides: by dotted key, for example ``{"federation.clients": 10}``.
        callbacks: functions of a :class:`fedcl.tell.callbacks.Event` that may ask to stop, told of each round and task.
        sections: overrides of whole sections or top-level keys, for example ``seed=1, federation={"clients": 10}``.

    Raises:
        UsageError: wrong settings; nothing has run.
        RunFailed: the run failed; its folder says why.
    """
    config = settings.load_config(config_or_path, {**sections, **(overrides or {})})
    return execute(config, progress=progress or notebook_progress(), callbacks=callbacks)


def load(run_dir: str | Path) -> RunResult:
    """A finished run's results.

    Raises:
        UsageError: no run there, or it has no summary yet.
    """
    folder = RunFolder.view(Path(run_dir))
    summary = folder.read_summary()
    if summary is None:
        raise UsageError("run_dir", str(run_dir), "a finished run; this one has no summary.json, see `fedcl resume`")
    matrix = folder.read_matrix() if summary.get("status") in ("done", "stopped") else []
    return RunResult(summary, matrix, folder.path)


def execute(
    config: settings.Config,
    *,
    progress: Progress,
    folder: Path | None = None,
    grid: Grid | None = None,
    callbacks: Sequence[Told] = (),
) -> RunResult:
    """Runs an experiment in a new folder.

    Args:
        config: settings; they are checked and resolved first.
        progress: who is told.
        folder: the output directory, in place of ``output.dir``.
        grid: the way to the nodes, in the ServerApp that a SuperLink started for ``engine.runtime=deploy``.
        callbacks: told of each round and task, beside those of the settings; see :mod:`fedcl.tell.callbacks`.

    Raises:
        UsageError, RunFailed, Interrupted: see :mod:`fedcl.errors`.
    """
    if folder is not None:
        config = replace(config, output=replace(config.output, dir=str(folder)))
    check_runtime(config)
    if config.engine.runtime == "deploy" and grid is None:
        refuse_here(callbacks)
        return deploy.drive(anchored(config), deploy.folder_of(config), progress)
    if grid is not None and not config.engine.nodes:
        config = replace(config, engine=replace(config.engine, nodes=count_nodes(grid, config.engine.timeout)))
    told = load_callbacks(config.output, callbacks)
    logs: list[dict[str, object]] = []
    with quiet_libraries(logs.append):
        experiment = build(anchored(config))
    with RunFolder.create(Path(config.output.dir), config.name, config.seed) as owned:
        stored = store_plugins(experiment.config, owned)
        owned.write_config(settings.to_yaml(stored))
        owned.write_environment(environment())
        for record in logs:
            owned.log(record)
        return RunResult(conduct(experiment, owned, progress, None, grid, told), owned.read_matrix(), owned.path)


def resume(
    folder: Path,
    *,
    progress: Progress,
    data_root: str | None = None,
    grid: Grid | None = None,
    callbacks: Sequence[Told] = (),
) -> RunResult:
    """Continues an interrupted run to the same final hashes; a finished one is returned as it is.

    Args:
        folder: the run folder.
        progress: who is told.
        data_root: where the datasets are now, if they have moved.
        grid, callbacks: see :func:`execute`.

    Raises:
        UsageError: no run there, or another process works on it.
        RunFailed: the data or the split are not those the run began with.
    """
    with RunFolder.open(folder) as owned:
        try:
            summary = owned.read_summary()
        except RunFailed as damage:
            summary = None
            progress.message(str(damage))
        whole = (owned.path / "accuracy_matrix.csv").is_file() and owned.checkpoints.is_dir()
        if summary is not None and summary.get("status") == "done" and whole:
            progress.message(f"{owned.path} is finished already")
            return load(owned.path)
        moved = [] if data_root is None else [("data.root", str(Path(data_root).absolute()))]
        config = settings.load_config(owned.path / "config.yaml", moved)
        if config.engine.runtime != "deploy" or grid is not None:
            return go_on(owned, config, progress, grid, callbacks)
    refuse_here(callbacks)
    return deploy.drive(config, folder.absolute(), progress)


def go_on(
    owned: RunFolder,
    config: settings.Config,
    progress: Progress,
    grid: Grid | None,
    callbacks: Sequence[Told] = (),
) -> RunResult:
    """Continues the run of a folder from its newest whole checkpoint."""
    told = load_callbacks(config.output, callbacks)
    logs: list[dict[str, object]] = []
    with quiet_libraries(logs.append):
        experiment = build(config)
    for record in logs:
        owned.log(record)

    def skipped(text: str) -> None:
        progress.message(text)
        owned.log({"event": "warning", "message": text})

    found = load_newest(owned.checkpoints, skipped)
    start = None
    if found is not None:
        if found.meta["split_sha256"] != experiment.split_sha256:
            raise RunFailed("the data or its split are not those this run began with")
        device = experiment.node.store.device
        arrays = {n: a.to(device) for n, a in found.arrays.items()}
        start = State.restore(arrays, found.meta["state"], experiment.node.stack.strategies)
        where = f"task {start.task + 1}, round {start.round + 1}"
        progress.message(f"resuming {owned.path} at {where}")
    else:
        progress.message(f"resuming {owned.path} from the start: it has no checkpoint")
    return RunResult(conduct(experiment, owned, progress, start, grid, told), owned.read_matrix(), owned.path)


def refuse_here(callbacks: Sequence[Told]) -> None:
    """Refuses callbacks that are objects of this process, where another one conducts the run."""
    if callbacks:
        allowed = "cannot be sent to a SuperLink; name it in output.callbacks, as package.module:function"
        raise UsageError("callbacks", repr(callbacks[0]), allowed)


def store_plugins(config: settings.Config, folder: RunFolder) -> settings.Config:
    """Copies plugin files into the run folder, so that the run can be repeated; says their SHA-256 in the events."""
    stored = []
    for number, plugin in enumerate(config.plugins):
        source = Path(plugin)
        data = source.read_bytes()
        name = f"plugins/{number}/{source.name}"
        folder.write(name, data)
        folder.log({"event": "plugin", "file": source.name, "sha256": hashlib.sha256(data).hexdigest()})
        stored.append(name)
    return replace(config, plugins=stored)
