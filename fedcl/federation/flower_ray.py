"""Flower's simulation engine under fedcl's loop: its Ray actors, one a node, behind Flower's ``Grid``.

Flower's ``run_simulation`` is to go, hands messages to any free actor, polls in steps of a tenth of a second, and
waits for busy actors before it stops. Here its backend starts Ray and its actor class runs the ClientApp; node i is
always actor i, a reply is taken when it is there, and closing the grid ends the actors at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from fedcl.errors import RunFailed
from fedcl.federation.flower_internals import ClientApp, LocalGrid, Message, make_error, number_message

# Ray reads it when it is first imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from flwr.common.constant import ErrorCode
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.simulation.ray_transport.ray_actor import BasicActorPool, ClientAppActor


class RayGrid(LocalGrid):
    """A Flower grid whose nodes are Ray actors, each in a process of its own.

    Use as a context manager: leaving it ends the actors, and Ray where it was started here.

    Args:
        load: a function of an importable module that returns the ClientApp; the workers call it.
        nodes: how many actors.
        cpus, gpus: what an actor reserves; fractions share a device.
        total_cpus: processors of this machine for Ray to hand out; not read with ``address``.
        address: a running cluster, or None to start Ray here.

    Raises:
        RunFailed: Ray does not start, or has no room for the actors.
    """

    pause = 0.0  # a pull waits for replies itself

    def __init__(
        self,
        load: Callable[[], ClientApp],
        nodes: int,
        cpus: float,
        gpus: float,
        total_cpus: int,
        address: str | None = None,
    ) -> None:
        super().__init__(load(), nodes)
        self._load = load
        self._running: dict[str, tuple[Any, Message]] = {}
        self._ours = not ray.is_initialized()
        self._actors: list[Any] = []
        resources: dict[str, float] = {"num_cpus": cpus, "num_gpus": gpus}
        place: dict[str, Any] = {"address": address} if address else {"num_cpus": total_cpus}
        start = {"logging_level": logging.CRITICAL, "log_to_driver": False, **place}
        try:
            with _own_settings():
                RayBackend({"init_args": start, "client_resources": resources, "actor": {}})
            pool = BasicActorPool(ClientAppActor, resources, {})
            if pool.actors_capacity < nodes:
                raise RunFailed(f"Ray has room for {pool.actors_capacity} actors of {resources}, not for {nodes}")
            pool.add_actors_to_pool(nodes)
            self._actors = list(pool.pool)
        except BaseException as error:
            self.close()
            if isinstance(error, RunFailed) or not isinstance(error, Exception):
                raise
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RunFailed(f"Ray cannot be used: {first}") from error

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hands each message to the actor of its node."""
        pushed = []
        for message in messages:
            name = number_message(message)
            context = self.contexts[message.metadata.dst_node_id]
            number = int(context.node_config["partition-id"])
            future = self._actors[number].run.remote(self._load, message, str(number), context)
            self._running[name] = (future, message)
            pushed.append(name)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there, each handed out once; waits a tenth of a second for the first."""
        asked = {self._running[name][0]: name for name in message_ids if name in self._running}
        if not asked:
            return []
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=0.1)
        if len(asked) > 1 and ready:
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        return [self._taken(asked[future]) for future in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies that came within ``timeout`` seconds, in the order in which they came."""
        end = None if timeout is None else time.monotonic() + timeout
        waiting, found = set(self.push_messages(messages)), []
        while waiting and (end is None or time.monotonic() < end):
            for message in self.pull_messages(waiting):
                waiting.discard(message.metadata.reply_to_message_id)
                found.append(message)
        return found

    def _taken(self, name: str) -> Message:
        future, message = self._running.pop(name)
        try:
            _, answer, context = ray.get(future)
        except ray.exceptions.RayActorError:
            return make_error(ErrorCode.CLIENT_APP_CRASHED, "a worker of Ray ended or was killed", message)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            return make_error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(cause), message)
        self.contexts[message.metadata.dst_node_id] = context
        found: Message = answer
        return found

    def close(self) -> None:
        """Ends the actors, whatever they do, and Ray where it was started here."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self._actors, self._running = [], {}
        if self._ours:
            ray.shutdown()

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """What starting Ray changes in this process is as before afterwards: PYTHONPATH and the handler of SIGTERM."""
    path = os.environ.get("PYTHONPATH")
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
