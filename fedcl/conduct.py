"""A built experiment from a state to its end: the way to the nodes, the server's loop, checkpoints, what is told."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import app
from .errors import Interrupted, RunFailed, Stopped
from .federation.bytes import ByteMeter
from .federation.call import prefixed
from .federation.flower_internals import LocalGrid, make_context, run_server_app
from .federation.server import Callbacks, Federation, State
from .federation.store import ClientStore
from .measure.costs import Held, held_at_end
from .measure.evaluation import Evaluator
from .records.checkpoint import save_checkpoint, stored_metas
from .records.environment import usable_cpus
from .records.hashing import model_sha256, state_sha256
from .records.recorder import Recorder
from .runtimes.links import Links, NodeLost
from .runtimes.resources import check_private
from .runtimes.setup import CACHE, Setup
from .tell.callbacks import Observers, Told
from .tell.quiet import quiet_libraries

if TYPE_CHECKING:
    from . import config as settings
    from .build import Experiment
    from .federation.flower_internals import Grid
    from .federation.node import Node
    from .records.runfolder import RunFolder
    from .tell.progress import Progress


def conduct(
    experiment: Experiment,
    folder: RunFolder,
    progress: Progress,
    start: State | None,
    grid: Grid | None = None,
    callbacks: Sequence[tuple[str, Told]] = (),
) -> dict[str, Any]:
    """Runs a built experiment in its folder, from a state or from the start; returns the summary.

    It ends at the end of the stream, or where a callback asks to stop: then the summary's status is ``stopped``.
    """
    check_private(experiment)
    config, node, stream = experiment.config, experiment.node, experiment.stream
    node.clients = ClientStore(folder.clients, CACHE)
    node.clients.discard_after(start.sequence if start else 0)
    evaluator = Evaluator(node, stream, experiment.split, experiment.test)
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
        kept = [int(m["state"]["sequence"]) for m in stored_metas(folder.checkpoints)]
        # A store visits clients that it wrote itself, but for the first time; under Ray the workers write.
        (node.clients if setup is None else ClientStore(folder.clients, 0)).prune(kept)
        links.keep(kept)
        folder.log({"event": "checkpoint", "index": index})

    state = start or initial_state(experiment)
    observers = Observers(callbacks, config, folder.path, folder.log)
    federation = Federation(
        node, stream, experiment.split, lambda call: [],
        Callbacks(
            recorder.round_done, recorder.task_done, checkpoint, lambda kind: observers.told(folder.last[kind])
        ),
    )  # fmt: skip
    token = f"{folder.path}#{folder.attempt}"
    setup = Setup.of(experiment, folder.path) if config.engine.runtime != "local" else None
    links = Links(token, node, setup, folder.log)
    outcome: list[tuple[State, dict[str, str], Held]] = []

    def main(grid: Grid) -> None:
        links.open(grid, state.sequence, progress.message)
        federation.send = links.send
        final = federation.run(state)
        states = links.digests(final.sequence)
        held = held_at_end(node, final, [(size, kept) for _, _, size, kept in states])
        outcome.append((final, hashes(node, final, [(client, digest) for client, digest, *_ in states]), held))

    app.NODES[token], app.MAINS[token] = node, main
    done = state.task * config.federation.rounds + state.round
    progress.start(recorder.title, stream.num_tasks, config.federation.rounds, done)
    folder.log({"event": "run_start", "task": state.task})
    recorder.say_warnings()
    try:
        with quiet_libraries(folder.log), interruptible(node, progress), reached(config, grid) as way:
            if start is None:
                state = recorder.begin(state)
            observers.start(state.task, state.round)
            run_server_app(app.server, way, make_context(1, run_config={app.TOKEN: token}))
            folder.log({"event": "messages", "sent": links.sent})
            summary = recorder.finish(*outcome[0])
            observers.end("done", summary)
    except Stopped as reason:
        summary = recorder.stop("stopped", str(reason))
        progress.message(f"{reason}; go on with: fedcl resume {folder.path}")
        observers.close("stopped", progress.message)
    except (Interrupted, KeyboardInterrupt):
        recorder.stop("interrupted", None)
        observers.close("interrupted", progress.message)
        raise Interrupted(f"interrupted; go on with: fedcl resume {folder.path}") from None
    except Exception as error:
        with contextlib.suppress(RunFailed):  # a full disk: the first cause is worth more
            recorder.stop("failed", f"{type(error).__name__}: {error}")
        observers.close("failed", progress.message)
        if isinstance(error, NodeLost):
            raise RunFailed(f"{error}; go on with: fedcl resume {folder.path}") from error
        raise
    finally:
        progress.finish()
        app.NODES.pop(token, None)
        app.MAINS.pop(token, None)
    return summary


@contextlib.contextmanager
def reached(config: settings.Config, grid: Grid | None) -> Iterator[Grid]:
    """The way to the nodes: the one that was given, Ray's actors, or this process."""
    engine = config.engine
    if grid is not None:
        yield grid
    elif engine.runtime == "ray":
        from .federation.flower_ray import RayGrid

        reserved = (engine.nodes, engine.client_cpus, engine.client_gpus)
        with RayGrid(app.client_app, *reserved, usable_cpus(), engine.address) as actors:
            yield actors
    else:
        yield LocalGrid(app.client)


def initial_state(experiment: Experiment) -> State:
    """The server before the first task."""
    return State(
        task=0, round=0, sequence=0, version=0, model=experiment.initial, evaluated={},
        strategies={s.name: {} for s in experiment.node.stack}, previous={},
        meter=ByteMeter().state(), records={}, wall_seconds=0.0,
    )  # fmt: skip


def hashes(node: Node, state: State, clients: Iterable[tuple[int, bytes]]) -> dict[str, str]:
    """``model_sha256`` over the shared parameters and buffers, ``state_sha256`` over server and client states.

    Args:
        clients: (client, digest of its state) of every client that has a state, ascending.
    """
    shared = {n: a for n, a in state.model.items() if node.sharing[n] != "private"}
    server = prefixed(state.previous, "previous/") | prefixed(state.evaluated, "evaluated/")
    for name, arrays in state.strategies.items():
        server |= prefixed(arrays, f"strategy/{name}/")
    return {"model_sha256": model_sha256(shared), "state_sha256": state_sha256(server, clients)}


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
