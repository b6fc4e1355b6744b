"""Two clocks: the server counts stages, each client counts the tasks that it has met itself.

Usually all clients are in step: task t of everybody is stage t of the server. Here a split is rewritten so that it says
what each client holds at each stage, when clients have orders or classes of their own, come late, leave, or sit a task
out. Everything is a pure function of the seed; nodes need none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from .. import random as counter
from ..errors import UsageError
from ..settings import schema as settings
from ..stream import Ids, Split, Stage, Stream

if TYPE_CHECKING:
    from ..strategy import Strategy

Classes = tuple[int, ...]
"""Label positions, ascending."""

There = list[list[bool]]
"""``there[stage][client]``: who is present."""


@dataclass(frozen=True)
class Clocks:
    """Where each client stands at each stage of the server.

    Attributes:
        own: ``own[stage][client]`` how many tasks the client has met before, its own task index; -1: absent. In step it
            is the stage itself.
        classes: ``classes[client][i]`` the label positions of the client's i-th own task; empty where all are in step.
        tasks: ``tasks[client][i]`` the task of the stream that is the client's i-th own one; empty where clients have
            classes of their own.
        tested: what an own task is tested on: the classes that it is the first to show its client, or the test set of
            its task of the stream.
    """

    own: tuple[tuple[int, ...], ...]
    classes: tuple[tuple[Classes, ...], ...] = ()
    tasks: tuple[tuple[int, ...], ...] = ()
    tested: Literal["classes", "tasks"] = "classes"

    @property
    def in_step(self) -> bool:
        """Whether all clients that are there have the task of the stage."""
        return not self.classes

    def present(self, stage: int) -> list[int]:
        """The clients that are there, ascending."""
        return [client for client, own in enumerate(self.own[stage]) if own >= 0]

    @cached_property
    def _known(self) -> list[list[Classes]]:
        """By client, what it knows after its first, second, ... own task."""
        found = []
        for tasks in self.classes:
            seen: set[int] = set()
            found.append([tuple(sorted(seen := seen | set(task))) for task in tasks])
        return found

    def known(self, stage: int, client: int) -> Classes:
        """What a client knows at a stage: the classes of its own tasks so far; before its first one, none."""
        met = self.met(stage, client)
        return self._known[client][met - 1] if met else ()

    def new(self, stage: int, client: int) -> Classes:
        """Classes of a client's present task that it has not met before."""
        met = self.met(stage, client)
        if not met:
            return ()
        before = self._known[client][met - 2] if met > 1 else ()
        return tuple(label for label in self._known[client][met - 1] if label not in before)

    def met(self, stage: int, client: int) -> int:
        """Own tasks of a client up to a stage."""
        return 1 + max(own[client] for own in self.own[: stage + 1])

    @cached_property
    def _server(self) -> list[Classes]:
        clients = range(len(self.own[0]))
        return [tuple(sorted({label for k in clients for label in self.known(s, k)})) for s in range(len(self.own))]

    def server_known(self, stage: int) -> Classes:
        """What some client has met up to a stage."""
        return self._server[stage]

    def server_new(self, stage: int) -> Classes:
        """What no client has met before a stage."""
        before = self._server[stage - 1] if stage else ()
        return tuple(label for label in self._server[stage] if label not in before)

    def standings(self, stage: int, clients: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """What a message says of clients: rows (client, own task index, known, new), the last two as places in sets of
        label positions, and these sets. Both empty where all are in step."""
        if self.in_step:
            return [], []
        places: dict[Classes, int] = {}
        rows = []
        for k in clients:
            known, new = (places.setdefault(c, len(places)) for c in (self.known(stage, k), self.new(stage, k)))
            rows.append([k, self.own[stage][k], known, new])
        return rows, [list(classes) for classes in places]

    def only(self, clients: Sequence[int]) -> Clocks:
        """The clocks of some clients alone."""
        return Clocks(
            tuple(tuple(stage[k] for k in clients) for stage in self.own),
            tuple(self.classes[k] for k in clients) if self.classes else (),
            tuple(self.tasks[k] for k in clients) if self.tasks else (),
            self.tested,
        )

    def columns(self, client: int) -> list[tuple[int, ...]]:
        """What each own task of a client is tested on: class positions, or tasks of the stream."""
        if self.tested == "tasks":
            return [(task,) for task in self.tasks[client]]
        known = self._known[client]
        before = [(), *known[:-1]]
        return [tuple(c for c in now if c not in old) for now, old in zip(known, before, strict=False)]


def nearest(share: float, count: int) -> int:
    """``share`` of ``count``, to the nearest whole number, halves up; the share is taken as it is written.

    >>> nearest(0.29, 100), nearest(0.5, 5)
    (29, 3)
    """
    return int(Fraction(str(share)) * count + Fraction(1, 2))


def presence(time: settings.Time, tasks: int, clients: int, seed: int) -> There | None:
    """Who is there at each stage; None: everybody always.

    A client that comes late is there from a stage drawn from the second to the last on, one that leaves early up to a
    stage drawn from the first to the last but one; nobody does both. Of a growing federation ``time.start`` clients
    are there first and ``time.growth`` more come with each further task.

    Raises:
        UsageError: a setting does not fit the number of tasks or clients, or a stage is left without a client.
    """
    order = counter.permutation(clients, seed, "time", "presence").tolist()
    first, last = [0] * clients, [tasks - 1] * clients
    late, early = nearest(time.joining, clients), nearest(time.leaving, clients)
    for key, count in (("joining", late), ("leaving", early)):
        if count and tasks == 1:
            raise UsageError(f"time.{key}", getattr(time, key), "must be 0 in a stream of one task")
    for client in order[:late]:
        first[client] = 1 + counter.sample(tasks - 1, 1, seed, "time", "joins", client)[0]
    for client in order[late : late + early]:
        last[client] = counter.sample(tasks - 1, 1, seed, "time", "leaves", client)[0]
    if time.start:
        reached = time.start + time.growth * (tasks - 1)
        if reached > clients:
            allowed = f"must not lead to {reached} clients in task {tasks}: {clients} of federation.clients can train"
            raise UsageError("time.growth", time.growth, allowed)
        for place, client in enumerate(order):
            waits = max(0, place - time.start + 1)
            first[client] = -(-waits // time.growth) if time.growth else tasks * (waits > 0)
    there = [[first[k] <= stage <= last[k] for k in range(clients)] for stage in range(tasks)]
    for stage, row in enumerate(there):
        here = [client for client, is_here in enumerate(row) if is_here]
        if not here:
            given = (time.joining, time.leaving)
            allowed = f"must leave a client in each task: nobody is there in task {stage + 1}"
            allowed += "" if clients in (late, early) else "; another seed draws anew"
            raise UsageError("time.joining, time.leaving", given, allowed)
        taking = counter.sample(len(here), max(1, nearest(time.participation, len(here))), seed, "time", "takes", stage)
        chosen = {here[place] for place in taking}
        there[stage] = [client in chosen for client in range(clients)]
    return None if all(map(all, there)) else there


def own_order(time: settings.Time, tasks: int, client: int, seed: int) -> list[int]:
    """The tasks of the stream in the order in which a client meets them under ``time.order=asynchronous``.

    ``lagged`` is the common order, begun at a task drawn for the client and taken up again from the first task after
    the last.
    """
    if time.sequence == "lagged":
        lag = counter.sample(tasks, 1, seed, "time", "lag", client)[0]
        return [(lag + i) % tasks for i in range(tasks)]
    return [int(task) for task in counter.permutation(tasks, seed, "time", "order", client)]


def counted(there: There) -> tuple[tuple[int, ...], ...]:
    """Own task indices: a client's clock goes on only while it is there.

    >>> counted([[True, False], [True, True]])
    ((0, -1), (1, 0))
    """
    met = [0] * len(there[0])
    own = []
    for row in there:
        own.append(tuple(met[k] if here else -1 for k, here in enumerate(row)))
        met = [count + here for count, here in zip(met, row, strict=True)]
    return tuple(own)


def clocked(split: Split, stream: Stream, time: settings.Time, seed: int) -> Split:
    """A split in step as ``time.order`` common or asynchronous and presence make it.

    In step, whoever is absent misses the task of that stage; a client with an order of its own goes on where it was.

    Raises:
        UsageError: settings that do not fit stream or clients.
    """
    refuse_stream(time, stream)
    tasks, clients = stream.num_tasks, split.clients
    there = presence(time, tasks, clients, seed)
    if time.order == "common":
        if there is None:
            return split
        own = tuple(tuple(s if here else -1 for here in row) for s, row in enumerate(there))
        return rearranged(split, Clocks(own), lambda stage, client: stage)
    own = counted(there or [[True] * clients] * tasks)
    orders = [own_order(time, tasks, client, seed) for client in range(clients)]
    occurring = [occurring_classes(stream, stage) for stage in stream.stages]
    met = [sum(stage[k] >= 0 for stage in own) for k in range(clients)]
    classes = tuple(tuple(occurring[t] for t in orders[k][: met[k]]) for k in range(clients))
    mine = tuple(tuple(orders[k][: met[k]]) for k in range(clients))
    clocks = Clocks(own, classes, mine, "classes" if by_class(stream) else "tasks")
    return rearranged(split, clocks, lambda stage, client: orders[client][own[stage][client]])


def rearranged(split: Split, clocks: Clocks, task: Callable[[int, int], int]) -> Split:
    """The split whose client k holds at a stage the rows of ``task(stage, k)``, and none while it is absent."""
    nothing = np.empty(0, dtype=np.int64)

    def moved(rows: Sequence[Sequence[Ids]]) -> tuple[tuple[Ids, ...], ...]:
        return tuple(
            tuple(rows[task(stage, k)][k] if own[k] >= 0 else nothing for k in range(split.clients))
            for stage, own in enumerate(clocks.own)
        )

    test = None if split.test is None else moved(split.test)
    return replace(split, train=moved(split.rows), test=test, clocks=clocks)


def without_absent(rows: Sequence[Sequence[Ids]], split: Split) -> list[list[Ids]]:
    """Training rows by stage and client, with none at whoever is absent: a bound must not bring them back."""
    if split.clocks is None or len(rows[0]) != split.clients:
        return [list(stage) for stage in rows]
    nothing = np.empty(0, dtype=np.int64)
    return [
        [ids if own[k] >= 0 else nothing for k, ids in enumerate(stage)]
        for stage, own in zip(rows, split.clocks.own, strict=True)
    ]


def occurring_classes(stream: Stream, stage: Stage) -> Classes:
    """Label positions that a task exposes or shows among its training images: what it takes to begin with it.

    Classes that no task exposes are not among them: of these clients have images, but never a label.
    """
    shown = set(np.unique(stream.train_labels[stage.train_ids]).tolist())
    return tuple(sorted({*stage.classes, *shown.intersection(stream.known(stream.num_tasks - 1))}))


def by_class(stream: Stream) -> bool:
    """Whether a task is tested on the classes that it exposes; else each task has a test set of its own."""
    return all(set(stream.test_labels[s.test_ids].tolist()) <= set(s.classes) for s in stream.stages)


def refuse_stream(time: settings.Time, stream: Stream) -> None:
    """Refuses clocks of the clients' own where the stream's tasks have to come in its own order.

    Raises:
        UsageError: images know their task, or stand in several tasks.
    """
    if time.order == "common" or not (stream.task_known or stream.repeats):
        return
    why = "heads belong to tasks of the stream" if stream.task_known else "a task holds the images of earlier ones"
    raise UsageError("time.order", time.order, f"must be common with scenario {stream.name}: {why}", ("common",))


def refuse_own_clocks(time: settings.Time, strategies: Sequence[Strategy]) -> None:
    """Refuses strategies that need one common clock where clients have tasks of their own.

    Raises:
        UsageError: naming the strategy and its reason.
    """
    for strategy in strategies:
        if time.order != "common" and strategy.common_clock:
            allowed = f"must be common with strategy {strategy.name}, which {strategy.common_clock}"
            raise UsageError("time.order", time.order, allowed, ("common",))


def with_whole_head(config: settings.Config, split: Split) -> settings.Config:
    """The settings with a head for all classes from the start where clients have tasks of their own: it cannot grow in
    the order of a stream that is nobody's."""
    if split.own_clocks is None:
        return config
    return replace(config, model=replace(config.model, head_allocate="all"))
