"""The server as one strategy sees it, and the exchanges that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..errors import RunFailed
from ..strategy import Arrays, Broadcast, ClientContext, Strategy
from ..streams.arrival import of_use
from ..streams.public import Public, public_of
from .cohort import reached

if TYPE_CHECKING:
    from ..models.model import FedModel
    from .server import Federation, State


@dataclass
class View:
    """The server as one strategy sees it; see :class:`fedcl.strategy.Server`."""

    federation: Federation
    current: State
    strategy: Strategy
    uploads: Arrays = field(default_factory=dict)
    before: Arrays = field(default_factory=dict)
    cohort: Sequence[int] = ()
    measured: dict[str, Any] = field(default_factory=dict)
    evaluated: Arrays = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = self.before or self.current.model
        self.evaluated = self.evaluated or self.current.model

    @property
    def arrays(self) -> Arrays:
        return self.current.model

    @property
    def state(self) -> Arrays:
        return self.current.strategies.get(self.strategy.name, {})

    @property
    def task(self) -> int:
        return self.current.task

    @property
    def round(self) -> int:
        return self.current.round

    @property
    def key(self) -> tuple[object, ...]:
        return (self.federation.config.seed, "server", self.task, self.round)

    @property
    def shared(self) -> tuple[str, ...]:
        return self.federation.node.shared

    @property
    def rounds(self) -> int:
        return self.federation.config.federation.rounds

    @property
    def rounds_done(self) -> int:
        return self.task * self.federation.config.federation.rounds + self.round

    @property
    def num_clients(self) -> int:
        return self.federation.clients

    @property
    def known(self) -> Tensor:
        return self.federation.mask(self.federation.known(self.task), self.task)

    @property
    def new(self) -> Tensor:
        return self.federation.mask(self.federation.new(self.task), self.task)

    @property
    def previous(self) -> Arrays | None:
        return self.current.previous or None

    @property
    def repeats(self) -> bool:
        return any(s.repeats for s in self.federation.stack) or self.federation.stream.repeats

    @property
    def task_known(self) -> bool:
        return self.federation.stream.task_known

    @property
    def public(self) -> Public | None:
        federation = self.federation
        node = federation.node
        return public_of(federation.split, federation.stream, self.task, node.store, node.config, node.dtype)

    @property
    def online(self) -> bool:
        return self.federation.config.federation.passes == "once"

    @property
    def model(self) -> FedModel:
        return self.federation.node.model

    def exchange(
        self,
        function: Callable[[ClientContext], tuple[Arrays, Arrays]],
        clients: Literal["holders", "all"] | Sequence[int] = "holders",
        down: Arrays | None = None,
        each: Mapping[int, Arrays] | None = None,
    ) -> Arrays:
        """See :meth:`fedcl.strategy.Server.exchange`."""
        federation = self.federation
        split, state = federation.split, self.current
        if self.online and state.round >= federation.config.federation.rounds:
            raise RunFailed(
                f"strategy {self.strategy.name!r} asks clients after the last round of task {state.task + 1}; with "
                "federation.passes=once the task's images have passed by then"
            )
        if isinstance(clients, str):
            chosen = reached(federation.config, split, state.task, state.round, state.sequence)
            if clients == "holders":
                place = state.task, state.round
                chosen = [c for c in chosen if of_use(federation.config, split, self.strategy, *place, c)]
        else:
            there = split.present(state.task)
            chosen = [c for c in clients if c in there]
        sent = {self.strategy.name: Broadcast(down)} if down else {}
        reducer, measured, self.current = federation.call(
            self.current, f"{self.strategy.name}:{function.__name__}", chosen, sent, self.strategy.reductions,
            previous=self.strategy.needs_previous, each=each,
        )  # fmt: skip
        if self.measured:
            # Server and view need one another; the server is there by the time a view is made.
            from .server import merge_measured

            merge_measured(self.measured, measured)
        return reducer.result()

    def done(self, model: Arrays, state: Arrays) -> State:
        """The server's state after a hook that returned a model and the strategy's state."""
        new = self.current if model is self.current.model else self.federation.changed(self.current, model)
        # Contiguous, as a checkpoint gives it back: the order of a sum depends on the layout.
        own = {n: a.contiguous() for n, a in state.items()}
        return replace(new, strategies={**new.strategies, self.strategy.name: own})
