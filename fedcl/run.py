"""One experiment from its settings to its folder: build, run, evaluate, save, resume."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import app
from . import config as settings
from .build import Experiment, build, build_split
from .checkpoint import load_newest, save_checkpoint, stored_metas
from .environment import environment
from .errors import Interrupted, RunFailed, UsageError
from .evaluation import Evaluator
from .federation.bytes import ByteMeter
from .federation.call import prefixed
from .federation.flower_internals import LocalGrid, make_context, run_server_app
from .federation.server import Callbacks, Federation, State
from .federation.store import ClientStore
from .hashing import model_sha256, state_sha256
from .progress import Progress, QuietProgress
from .quiet import quiet_libraries
from .recorder import Recorder
from .resolve import anchored
from .runfolder import RunFolder

if TYPE_CHECKING:
    from .models.model import FedModel

__all__ = ["RunResult", "build_split", "execute", "load", "resume", "run"]

CLIENT_CACHE = 256 * 2**20
"""Bytes of client state files kept in memory."""


@dataclass(frozen=True)
class RunResult:
    """A run and where it lies.

    Attributes:
        summary: the content of ``summary.json``.
        matrix: accuracy on task j after task i, None where undefined.
        folder: the run folder.
    """

    summary: dict[str, Any]
    matrix: list[list[float | None]]
    folder: Path

    @property
    def model(self) -> FedModel:
        """The final global model as a module, in eval mode, its head as wide as the classes seen.

        Raises:
            RunFailed: the folder has no whole checkpoint.
        """
        from .build import load_model

        return load_model(self.folder)


def run(
    config_or_path: settings.Config | Mapping[str, Any] | str | Path | None = None,
    *,
    progress: Progress | None = None,
    overrides: Mapping[str, Any] | None = None,
    **sections: Any,
) -> RunResult:
    """One experiment from Python.

    Args:
        config_or_path: a :class:`fedcl.config.Config`, a mapping of sections, a YAML file, or a preset's name;
            None is the default stack of ``fedcl demo``.
        progress: who is told; nobody by default.
        overrides: by dotted key, for example ``{"federation.clients": 10}``.
        sections: overrides of whole sections or top-level keys, for example ``seed=1, federation={"clients": 10}``.

    Raises:
        UsageError: wrong settings; nothing has run.
        RunFailed: the run failed; its folder says why.
    """
    config = settings.load_config(config_or_path, {**sections, **(overrides or {})})
    return execute(config, progress=progress or QuietProgress())


def load(run_dir: str | Path) -> RunResult:
    """A finished run's results.

    Raises:
        UsageError: no run there, or it has no summary yet.
    """
    folder = RunFolder.view(Path(run_dir))
    summary = folder.read_summary()
    if summary is None:
        raise UsageError("run_dir", str(run_dir), "a finished run; this one has no summary.json, see `fedcl resume`")
    matrix = folder.read_matrix() if summary.get("status") == "done" else []
    return RunResult(summary, matrix, folder.path)


def execute(config: settings.Config, *, progress: Progress, folder: Path | None = None) -> RunResult:
    """Runs an experiment in a new folder.

    Args:
        config: settings; they are checked and resolved first.
        progress: who is told.
        folder: the output directory, in place of ``output.dir``.

    Raises:
        UsageError, RunFailed, Interrupted: see :mod:`fedcl.errors`.
    """
    if folder is not None:
        config = replace(config, output=replace(config.output, dir=str(folder)))
    logs: list[dict[str, object]] = []
    with quiet_libraries(logs.append):
        experiment = build(anchored(config))
    with RunFolder.create(Path(config.output.dir), config.name, config.seed) as owned:
        stored = store_plugins(experiment.config, owned)
        owned.write_config(settings.to_yaml(stored))
        owned.write_environment(environment())
        for record in logs:
            owned.log(record)
        return conduct(experiment, owned, progress, None)


def resume(folder: Path, *, progress: Progress, data_root: str | None = None) -> RunResult:
    """Continues an interrupted run to the same final hashes; a finished one is returned as it is.

    Args:
        folder: the run folder.
        progress: who is told.
        data_root: where the datasets are now, if they have moved.

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
        return conduct(experiment, owned, progress, start)


def conduct(experiment: Experiment, folder: RunFolder, progress: Progress, start: State | None) -> RunResult:
    """Runs a built experiment in its folder to the end, from a state or from the start."""
    config, node, stream = experiment.config, experiment.node, experiment.stream
    node.clients = ClientStore(folder.clients, CLIENT_CACHE)
    node.clients.discard_after(start.sequence if start else 0)
    evaluator = Evaluator(node, stream, experiment.split, experiment.test)
    node.probe = lambda task, client, arrays: evaluator.by_head(arrays, evaluator.known(task), task, client)
    recorder = Recorder(experiment, folder, progress, evaluator)

    def checkpoint(state: State, task_ended: bool) -> None:
        node.clients.sync()
        folder.sync_events()
        index = state.task * (config.federation.rounds + 1) + state.round
        meta = {
            "state": state.meta(),
            "split_sha256": experiment.split_sha256,
            "image_shape": list(node.store.shape),
        }
        save_checkpoint(folder.checkpoints, index, state.arrays(), meta, config.checkpoint.keep)
        # States that an older checkpoint refers to stay: a run may have to fall back to it.
        node.clients.prune(m["state"]["sequence"] for m in stored_metas(folder.checkpoints))
        folder.log({"event": "checkpoint", "index": index})

    state = start or initial_state(experiment)
    federation = Federation(
        node, stream, experiment.split, lambda call: [],
        Callbacks(recorder.round_done, recorder.task_done, checkpoint),
    )  # fmt: skip
    token = f"{folder.path}#{folder.attempt}"
    outcome: list[State] = []

    def main(grid: Any) -> None:
        federation.send = app.sender(grid, token, node.store.device, config.engine.timeout)
        outcome.append(federation.run(state))

    app.NODES[token], app.MAINS[token] = node, main
    done = state.task * config.federation.rounds + state.round
    progress.start(recorder.title, stream.num_tasks, config.federation.rounds, done)
    folder.log({"event": "run_start", "task": state.task})
    recorder.say_warnings()
    try:
        with quiet_libraries(folder.log), interruptible(node, progress):
            if start is None:
                state = recorder.begin(state)
            run_server_app(app.server, LocalGrid(app.client), make_context(1, run_config={app.TOKEN: token}))
            summary = recorder.finish(outcome[0], hashes(node, outcome[0]))
    except (Interrupted, KeyboardInterrupt):
        recorder.stop("interrupted", None)
        raise Interrupted(f"interrupted; go on with: fedcl resume {folder.path}") from None
    except Exception as error:
        with contextlib.suppress(RunFailed):  # a full disk: the first cause is worth more
            recorder.stop("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        progress.finish()
        app.NODES.pop(token, None)
        app.MAINS.pop(token, None)
    return RunResult(summary, folder.read_matrix(), folder.path)


def initial_state(experiment: Experiment) -> State:
    """The server before the first task."""
    return State(
        task=0, round=0, sequence=0, version=0, model=experiment.initial, evaluated={},
        strategies={s.name: {} for s in experiment.node.stack}, previous={},
        meter=ByteMeter().state(), records={}, wall_seconds=0.0,
    )  # fmt: skip


def hashes(node: Any, state: State) -> dict[str, str]:
    """``model_sha256`` over the shared parameters and buffers, ``state_sha256`` over server and client states."""
    shared = {n: a for n, a in state.model.items() if node.sharing[n] != "private"}
    server = prefixed(state.previous, "previous/") | prefixed(state.evaluated, "evaluated/")
    for name, arrays in state.strategies.items():
        server |= prefixed(arrays, f"strategy/{name}/")
    clients = ((c, node.clients.get(c, state.sequence)) for c in node.clients.clients())
    return {"model_sha256": model_sha256(shared), "state_sha256": state_sha256(server, clients)}


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


@contextlib.contextmanager
def interruptible(node: Any, progress: Progress) -> Iterator[None]:
    """First Ctrl-C: the step in progress ends and the run stops; second: it stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    flag = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt
        flag.set()
        progress.message("stopping after this step; Ctrl-C again stops at once")

    node.stop = flag.is_set
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        node.stop = lambda: False
