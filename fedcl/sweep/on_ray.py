"""Points of a sweep as tasks on a Ray cluster, or on Ray started here."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from types import FrameType
from typing import Any

from ..errors import Interrupted, RunFailed, UsageError
from ..records.environment import SHARE, usable_cpus
from ..settings.schema import Engine
from .board import Board
from .job import Job, Outcome, perform
from .plan import Point


class Cluster:
    """Ray as what runs points. Use from the main thread.

    Each point is a task that reserves ``engine.threads`` (else 1) processors, and where ``engine.device`` is cuda
    ``engine.client_gpus`` (else 1) GPUs. The sweep's folder must be the same on all machines of the cluster.

    Args:
        engine: of the first run; ``address`` is the cluster, None starts Ray here.
        workers: runs at a time, at most; None: as many as the cluster has room for.

    Raises:
        UsageError: Ray is not installed.
        RunFailed: it cannot be reached.
    """

    def __init__(self, engine: Engine, workers: int | None) -> None:
        if find_spec("ray") is None:
            allowed = "Ray is not installed; it comes with the extra: pip install 'fedcl-sim[ray]'"
            raise UsageError("--scheduler", "ray", allowed)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        self._stops = 0
        self.cpus = engine.threads or 1
        gpus = (engine.client_gpus or 1) if engine.device.startswith("cuda") else engine.client_gpus
        place: dict[str, Any] = {"address": engine.address} if engine.address else {"num_cpus": usable_cpus()}
        try:
            if self._ours:
                # It announces there a change that no task here would notice.
                warnings.simplefilter("ignore", FutureWarning)
                ray.init(**place, logging_level=logging.CRITICAL, log_to_driver=False, include_dashboard=False)
            room = int(ray.cluster_resources().get("CPU", 0) // self.cpus)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RunFailed(f"Ray cannot be used: {first}") from error
        if not room:
            self.close()
            raise UsageError("engine.threads", engine.threads, "is more than the Ray cluster has processors")
        self.workers = min(workers or room, room)
        # A run that failed is told so; starting it again is the user's choice.
        options = {"num_cpus": self.cpus, "num_gpus": gpus, "max_retries": 0}
        self._task = ray.remote(**options)(perform_there)

    @property
    def title(self) -> str:
        """See :class:`fedcl.sweep.pool.Scheduler`."""
        cpus = f"{self.cpus} {'processor' if self.cpus == 1 else 'processors'}"
        return f"{self.workers} at a time on Ray with {cpus} each"

    def run(self, points: Sequence[Point], board: Board) -> list[Outcome]:
        """See :class:`fedcl.sweep.pool.Scheduler`."""
        outcomes = [Outcome("waiting") for _ in points]
        todo, running = list(range(len(points))), dict[Any, int]()
        asked = 0
        with self._stopping():
            while todo or running:
                while todo and len(running) < self.workers:
                    place = todo.pop(0)
                    running[self._task.remote(asdict(Job.of(points[place])), self.cpus)] = place
                    board.started(place)
                ready, _ = self._ray.wait(list(running), num_returns=1, timeout=0.5)
                for reference in ready:
                    place = running.pop(reference)
                    outcomes[place] = self._outcome(reference)
                    board.ended(place, outcomes[place])
                if self._stops > asked:
                    asked = self._stops
                    todo.clear()
                    if asked > 1:
                        raise Interrupted("stopped at once; the last checkpoints are whole")
                    board.message("stopping: every run saves a checkpoint; Ctrl-C again stops at once")
                    for reference in running:
                        self._ray.cancel(reference)
        return outcomes

    def _outcome(self, reference: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            return Outcome.of(self._ray.get(reference))
        except errors.TaskCancelledError:
            return Outcome("interrupted")
        except errors.WorkerCrashedError:
            return Outcome("failed", "its worker of Ray ended or was killed")
        except errors.OutOfMemoryError:
            return Outcome("failed", "Ray killed its worker: the machine ran out of memory")
        except errors.RayError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, KeyboardInterrupt):
                return Outcome("interrupted")
            return Outcome("failed", next(iter(str(cause).strip().splitlines()), type(cause).__name__))

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self._stops += 1

        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def close(self) -> None:
        """Ends Ray where it was started here."""
        if self._ours:
            self._ray.shutdown()


def perform_there(job: dict[str, Any], cpus: int) -> dict[str, Any]:
    """Runs one point in a worker of Ray; arguments and result are plain JSON values."""
    os.environ[SHARE] = os.environ["OMP_NUM_THREADS"] = str(cpus)
    return asdict(perform(Job(**job), lambda message: None))
