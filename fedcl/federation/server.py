"""The server half of a run: the loop over tasks and rounds, written with one primitive, the exchange.

Everything the server knows is in :class:`State`; each round makes a new one, so the last complete round can always be
saved, however the next one ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Interrupted, RunFailed, Stopped
from ..local.training import blame
from ..strategy import Arrays, Broadcast, Strategy
from ..streams.arrival import at_hand, unlabelled_at_hand
from ..streams.stragglers import round_pace
from .bytes import ByteMeter, Group, written
from .call import Call, Header, Reply, below, prefixed
from .cohort import cohort_there
from .reduction import Reducer
from .trainer import nothing_trained
from .view import View

if TYPE_CHECKING:
    from ..stream import Ids, Split, Stream
    from .node import Node


@dataclass(frozen=True)
class State:
    """The server between two rounds: what a checkpoint holds.

    Attributes:
        task, round: the next round to run; ``round == rounds`` means that the task's end is next.
        sequence: exchanges so far; client states are stored under it.
        version: changes with the global model, so that its broadcast is charged once a client.
        model: the global model.
        evaluated: the model to be evaluated, where it differs from ``model``.
        strategies: server state by strategy.
        previous: the global model at the end of the previous task.
        records: everything measured so far, JSON-able.
        engine: ``path`` and ``chunk`` where the run had to depart from its settings.
    """

    task: int
    round: int
    sequence: int
    version: int
    model: Arrays
    evaluated: Arrays
    strategies: dict[str, Arrays]
    previous: Arrays
    meter: dict[str, Any]
    records: dict[str, Any]
    wall_seconds: float
    engine: dict[str, Any] = field(default_factory=dict)

    def arrays(self) -> Arrays:
        """All tensors as one flat mapping."""
        flat = prefixed(self.model, "model/") | prefixed(self.evaluated, "evaluated/")
        flat |= prefixed(self.previous, "previous/")
        for name, arrays in self.strategies.items():
            flat |= prefixed(arrays, f"strategy/{name}/")
        return flat

    def meta(self) -> dict[str, Any]:
        """Everything but tensors, JSON-able."""
        return {
            "task": self.task, "round": self.round, "sequence": self.sequence, "version": self.version,
            "meter": written(self.meter), "records": self.records, "wall_seconds": self.wall_seconds,
            "same": self.same(), "engine": self.engine,
        }  # fmt: skip

    def same(self) -> dict[str, str]:
        """Names of arrays that are the very tensor of an earlier name: in one message they are charged once."""
        first: dict[int, str] = {}
        return {n: first[id(a)] for n, a in self.arrays().items() if first.setdefault(id(a), n) != n}

    @classmethod
    def restore(cls, flat: Arrays, meta: dict[str, Any], strategies: Sequence[Strategy]) -> State:
        """The inverse of :meth:`arrays` and :meth:`meta`."""
        plain = {n: v for n, v in meta.items() if n != "same"}
        flat = flat | {n: flat[first] for n, first in meta["same"].items()}
        states = {s.name: below(flat, f"strategy/{s.name}/") for s in strategies}
        return cls(
            model=below(flat, "model/"), evaluated=below(flat, "evaluated/"), previous=below(flat, "previous/"),
            strategies=states, **plain,
        )  # fmt: skip


@dataclass
class Callbacks:
    """What the loop reports; all are called between rounds.

    Attributes:
        round_done: (state, measurements of the round).
        task_done: (state) -> state with the task's evaluation in its records.
        checkpoint: (state, True when a task has just ended).
        told: ("round" or "task") once the state after it is what would be saved; may raise :class:`Stopped`.
    """

    round_done: Callable[[State, dict[str, Any]], State]
    task_done: Callable[[State], State]
    checkpoint: Callable[[State, bool], None]
    told: Callable[[str], None] = lambda kind: None


@dataclass
class Federation:
    """One run at the server.

    Attributes:
        send: hands a call to every node and yields the replies in node order.
        node: the server's own view of model, strategies and settings; it trains nothing.
        counted: FLOPs of a training step by shape of its batch, see :mod:`fedcl.federation.ledger`.
    """

    node: Node
    stream: Stream
    split: Split
    send: Callable[[Call], Iterable[Reply]]
    callbacks: Callbacks
    meter: ByteMeter = field(default_factory=ByteMeter)
    counted: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.node.config
        self.stack = self.node.stack

    @property
    def clients(self) -> int:
        """Clients in the split (one for a centralised bound)."""
        return self.split.clients

    def width(self, task: int) -> int:
        """Classes the head can score in a task."""
        if self.config.model.head_allocate == "all":
            return self.stream.num_classes
        return len(self.stream.known(task))

    def known(self, task: int) -> Sequence[int]:
        """Class positions that have been met up to a task, by all clients in step or by any one by its own clock."""
        clocks = self.split.own_clocks
        return self.stream.known(task) if clocks is None else clocks.server_known(task)

    def new(self, task: int) -> Sequence[int]:
        """Class positions that a task is the first to show, to all clients in step or to any one by its own clock."""
        clocks = self.split.own_clocks
        return self.stream.stages[task].classes if clocks is None else clocks.server_new(task)

    def mask(self, positions: Sequence[int], task: int) -> Tensor:
        """(C,) bool mask of class positions, C the width in ``task``."""
        mask = torch.zeros(self.width(task), dtype=torch.bool, device=self.node.store.device)
        mask[list(positions)] = True
        return mask

    def run(self, state: State) -> State:
        """Runs to the end of the stream.

        Raises:
            Interrupted: the user asked to stop; the last complete round has been saved.
            Stopped: a callback did; the round it was told of has been saved.
        """
        self.meter = ByteMeter.restore(state.meter)
        boundary = state
        started = time.perf_counter()

        def clocked(new: State) -> State:
            elapsed = time.perf_counter() - started
            return replace(new, meter=self.meter.state(), wall_seconds=base + elapsed)

        base = state.wall_seconds
        rounds = self.config.federation.rounds
        try:
            while state.task < self.stream.num_tasks:
                if state.round == 0:
                    state = self.begin_task(state)
                while state.round < rounds:
                    state, measured = self.train_round(state)
                    state = clocked(replace(state, round=state.round + 1))
                    state = self.callbacks.round_done(state, measured)
                    boundary = state
                    self.callbacks.told("round")
                    every = self.config.checkpoint.every
                    if every and state.round % every == 0 and state.round < rounds:
                        self.callbacks.checkpoint(state, False)
                state = self.finish_task(state)
                state = clocked(self.callbacks.task_done(clocked(state)))
                state = replace(state, task=state.task + 1, round=0)
                boundary = state
                self.callbacks.told("task")
                self.callbacks.checkpoint(state, True)
        except (Interrupted, KeyboardInterrupt):
            self.callbacks.checkpoint(boundary, boundary.round == 0)
            raise Interrupted("interrupted") from None
        except Stopped:
            self.callbacks.checkpoint(boundary, boundary.round == 0)
            if boundary.task < self.stream.num_tasks:
                raise
            return boundary
        except Exception:
            # The cause is worth more than a second error while saving; the last regular checkpoint stays valid.
            with contextlib.suppress(Exception):
                self.callbacks.checkpoint(boundary, boundary.round == 0)
            raise
        return state

    def begin_task(self, state: State) -> State:
        """Grows the head and everything shaped like it, then asks the strategies."""
        width = self.width(state.task)
        model = {n: self.node.grown(n, a, width, "initial") for n, a in state.model.items()}
        strategies = {s.name: self.node.grown_state(s, state.strategies.get(s.name, {}), width) for s in self.stack}
        state = replace(state, model=model, strategies=strategies, version=state.version + 1)
        for strategy in self.stack:
            with blame(strategy, "begin_task"):
                view = View(self, state, strategy)
                state = view.done(state.model, strategy.begin_task(view))
        return state

    def train_round(self, state: State) -> tuple[State, dict[str, Any]]:
        """One default round: broadcast, local training, reduction, aggregation."""
        cohort = cohort_there(self.config, self.split, state.task, state.round)
        pace = round_pace(self.config, self.split, cohort, state.task, state.round)
        before = self.meter.state()
        begun = state.model
        owner = self.stack.owners["round"]
        if owner is None:
            reducer, measured, state = self.default_round(state, cohort, pace.limits)
        else:
            reducer, measured, state = self.own_round(state, owner, cohort)
        measured |= {"stragglers": pace.limits, "simulated_seconds": pace.seconds}
        measured |= {"cohort": len(cohort), "counted": self.counted, **self.meter.since(before)}
        state = replace(state, engine=departed(state.engine, measured["engine"]))
        if reducer.weights:
            state = self.aggregate(state, reducer)
            result = reducer.result([n for n in reducer.names() if not n.startswith("model/")])
        else:
            result = {}
        for strategy in self.stack:
            with blame(strategy, "after_aggregate"):
                uploads = below(result, f"{strategy.name}/")
                view = View(self, state, strategy, uploads, begun, cohort)
                model, new = strategy.after_aggregate(view)
                state = view.done(model, new)
        return state, measured

    def default_round(
        self, state: State, cohort: Sequence[int], limits: dict[int, int]
    ) -> tuple[Reducer, dict[str, Any], State]:
        """Broadcast and local training of a cohort."""
        down: dict[str, Broadcast] = {}
        begun = state.model
        for strategy in self.stack:
            with blame(strategy, "broadcast"):
                view = View(self, state, strategy, before=begun, cohort=cohort)
                sent = strategy.broadcast(view)
            state = view.current
            if sent.arrays:
                down[strategy.name] = sent
        previous = any(s.needs_previous for s in self.stack)
        return self.call(state, "train", cohort, down, self.node.train_rules(), previous=previous, limits=limits)

    def own_round(self, state: State, owner: Strategy, cohort: Sequence[int]) -> tuple[Reducer, dict[str, Any], State]:
        """A round that a strategy makes of its own exchanges; nothing is left to be reduced."""
        with blame(owner, "round"):
            view = View(self, state, owner, before=state.model, cohort=cohort, measured=nothing_trained())
            model, new = owner.round(view)
            return Reducer({}), view.measured, view.done(model, new)

    def aggregate(self, state: State, reducer: Reducer) -> State:
        """The new global model from what the cohort sent."""
        owner = self.stack.owners["aggregate"]
        if owner is None or owner.model_reduction != "stack":
            new = below(reducer.result(), "model/")
            if owner is not None and owner.model_reduction == "masked_mean":
                # What nobody sends stays as it was.
                new = {n: torch.where(a.isnan(), state.model[n], a) for n, a in new.items()}
            return self.changed(state, {**state.model, **new})
        names = [n for n in self.node.trainable if self.node.sharing[n] == "shared"]
        columns = {n: reducer.stacked(f"model/{n}") for n in names}
        models = [{n: columns[n][i] for n in names} for i in range(len(reducer.weights))]
        shared = [f"model/{n}" for n in self.node.buffers if self.node.sharing[n] == "shared"]
        buffers = below(reducer.result(shared), "model/")
        with blame(owner, "aggregate"):
            view = View(self, state, owner)
            parameters, new_state = owner.aggregate(view, models, reducer.weights)
            return view.done({**state.model, **parameters, **buffers}, new_state)

    def changed(self, state: State, model: Arrays) -> State:
        """A state with a new global model, checked to be finite and of the same shapes."""
        missing = [n for n in state.model if n not in model]
        if missing:
            raise RunFailed(f"the new global model has no {missing[0]!r}")
        for name, array in model.items():
            if name not in state.model or array.shape != state.model[name].shape:
                raise RunFailed(f"the new global model's {name!r} has another shape or name than before")
        if not all(bool(torch.isfinite(a).all()) for a in model.values() if a.is_floating_point()):
            raise RunFailed(f"the global model is not finite after task {state.task + 1}, round {state.round + 1}")
        model = {n: model[n].to(a.dtype).contiguous() for n, a in state.model.items()}
        return replace(state, model=model, version=state.version + 1)

    def finish_task(self, state: State) -> State:
        """The strategies' ends of task, in the order of the stack; then the model becomes the previous one."""
        evaluated: Arrays = {}
        for strategy in self.stack:
            with blame(strategy, "finish_task"):
                view = View(self, state, strategy, evaluated=evaluated)
                finished, new = strategy.finish_task(view)
                state = view.done(finished.arrays, new)
                if finished.evaluate is not None:
                    evaluated = {n: a.contiguous() for n, a in finished.evaluate.items()}
        keeps = any(s.needs_previous for s in self.stack)
        return replace(state, evaluated=evaluated, previous=dict(state.model) if keeps else {})

    def call(
        self,
        state: State,
        function: str,
        clients: Sequence[int],
        down: dict[str, Broadcast],
        rules: Any,
        *,
        previous: bool,
        limits: dict[int, int] | None = None,
        each: Mapping[int, Arrays] | None = None,
    ) -> tuple[Reducer, dict[str, Any], State]:
        """The exchange: one call at every node that hosts one of ``clients``, one reduction, all bytes counted."""
        sequence = state.sequence + 1
        federation, task = self.config.federation, state.task
        header = Header(
            function, sorted(clients), task, state.round, federation.rounds, self.stream.num_tasks, sequence,
            self.width(task), list(self.known(task)), list(self.new(task)),
            state.engine.get("path", self.config.engine.path), state.engine.get("chunk", self.config.engine.chunk),
            self.stream.heads[: self.width(task)], [key for key in self.counted if key.startswith(f"{task}:")],
            *(self.split.clocks.standings(task, sorted(clients)) if self.split.clocks else ([], [])),
            [[client, most] for client, most in (limits or {}).items()],
        )  # fmt: skip
        old = {n: a for n, a in state.previous.items() if self.node.sharing[n] != "private"} if previous else {}
        rows = {c: torch.from_numpy(self.rows(task, state.round, c)) for c in header.clients}
        shared = {n: a for n, a in state.model.items() if self.node.sharing[n] != "private"}
        sent = {n: b.arrays for n, b in down.items()}
        bare = unlabelled_at_hand(self.config, self.stream, self.split, task, state.round, header.clients)
        without = {c: torch.from_numpy(ids) for c, ids in bare.items()}
        call = Call(header, shared, old, sent, rows, self.own_rows(header), without, each or {})
        groups = [Group("model", f"model:{state.version}", shared)]
        groups += [Group("previous", f"task:{task}", old)] if old else []
        for name, broadcast in down.items():
            scope = {"run": "run", "task": f"task:{task}", "round": f"call:{sequence}"}[broadcast.scope]
            groups.append(Group(name, scope, broadcast.arrays))
        self.meter.charge_down(groups, header.clients)
        for client in header.clients:
            if call.each.get(client):
                self.meter.charge_down([Group("each", f"call:{sequence}", call.each[client])], [client])
        reducer = Reducer(rules)
        measured: dict[str, Any] = {}
        for reply in self.send(call):
            reducer.merge(reply.arrays, reply.facts)
            self.meter.charge_up(reply.measured["bytes_up"], reply.measured["floats_up"])
            merge_measured(measured, reply.measured)
        self.counted |= {key: flops for key, flops, _ in reversed(measured.get("flops", []))}
        if function != "train":
            self.meter.asked += sum(seconds for _, seconds, _ in measured.get("work", []))
        return reducer, measured, replace(state, sequence=sequence)

    def rows(self, task: int, round_: int, client: int) -> Ids:
        """(n,) int64: the training rows that a client has at hand in a round."""
        return np.asarray(at_hand(self.config, self.stream, self.split, task, round_, client))

    def own_rows(self, header: Header) -> dict[int, Tensor]:
        """Each client's own test rows of the task in its last round of training, where clients have such rows."""
        tests = self.split.test
        last = header.function == "train" and header.round == header.rounds - 1
        judged = self.config.evaluate.predict in ("auto", "head")  # clients' own models are judged by their heads
        if tests is None or not last or not self.config.evaluate.personal or not judged:
            return {}
        return {c: torch.from_numpy(np.asarray(tests[header.task][c])) for c in header.clients}


def departed(engine: dict[str, Any], changes: list[dict[str, Any]]) -> dict[str, Any]:
    """The engine's departures from its settings with those that nodes report: the smallest chunk, any other path."""
    engine = dict(engine)
    for change in changes:
        if "path" in change:
            engine["path"] = change["path"]
        else:
            engine["chunk"] = min(change["chunk"], engine.get("chunk", change["chunk"]))
    return engine


def merge_measured(total: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds one node's measurements: numbers and lists add up, mappings by key."""
    for name, value in part.items():
        if isinstance(value, dict):
            merge_measured(total.setdefault(name, {}), value)
        else:
            total[name] = total[name] + value if name in total else value
