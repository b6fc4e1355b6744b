"""Streams of the clients' own: each client meets classes that were drawn for it, some of which all may share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .. import random as counter
from ..errors import UsageError
from ..partitioning import Partition, never_trained, split_of
from ..settings import schema as settings
from ..stream import Ids, Split, Stage, Stream
from .clocks import (
    Classes,
    Clocks,
    by_class,
    counted,
    nearest,
    occurring_classes,
    presence,
    rearranged,
    refuse_stream,
)


def own_classes(
    time: settings.Time, available: Sequence[int], tasks: int, clients: int, seed: int
) -> list[list[Classes]]:
    """The classes of each client's tasks under ``time.order=client_specific``.

    Of the ``tasks * time.classes`` classes of a client ``time.shared``, to the nearest whole number, are the same for
    all clients; the others are dealt from a shuffled list of the rest, over and over: no class comes to a second
    client before each has come to one. Each client meets its classes in an order of its own.

    Raises:
        UsageError: there are too few classes.
    """
    wanted = tasks * time.classes
    common = nearest(time.shared, wanted)
    if wanted > len(available):
        allowed = f"at most {len(available) // tasks}: a client meets {tasks} tasks of different classes, and there "
        raise UsageError("time.classes", time.classes, allowed + f"are {len(available)}")
    shuffled = [available[i] for i in counter.permutation(len(available), seed, "time", "classes")]
    rest, each = shuffled[common:], wanted - common
    found = []
    for client in range(clients):
        mine = shuffled[:common] + [rest[(client * each + i) % len(rest)] for i in range(each)]
        order = [mine[i] for i in counter.permutation(wanted, seed, "time", "order", client)]
        cut = (order[i : i + time.classes] for i in range(0, wanted, time.classes))
        found.append([tuple(sorted(task)) for task in cut])
    return found


def client_specific(stream: Stream, partition: Partition, config: settings.Config) -> Split:
    """The split of ``time.order=client_specific``: each class is dealt, by the rule of the ``partition`` section, to
    the clients that have it among their own; classes that nobody has are left out.

    Raises:
        UsageError: the stream's tasks are no sets of classes, the rule needs more than one class, or settings do not
            fit.
    """
    time, clients, seed, tasks = config.time, config.federation.clients, config.seed, stream.num_tasks
    refuse_stream(time, stream)
    _refuse_shared_classes(stream, time)
    if partition.once:
        allowed = "must be a rule that deals each class by itself with time.order=client_specific"
        raise UsageError("partition.name", partition.name, allowed)
    available = [label for stage in stream.stages for label in stage.classes]
    classes = own_classes(time, available, tasks, clients, seed)
    whole = Stage(0, tuple(available), *(_joined(stream, kind) for kind in ("train_ids", "validation_ids", "test_ids")))
    place = {(k, label): i for k, own in enumerate(classes) for i, task in enumerate(own) for label in task}
    parts: list[list[list[Ids]]] = [[[] for _ in range(clients)] for _ in range(tasks)]
    for label in sorted({label for _, label in place}):
        holders = [k for k in range(clients) if (k, label) in place]
        rows = whole.train_ids[stream.train_labels[whole.train_ids] == label]
        try:
            dealt = partition.split(
                stream.train_labels[rows], len(holders), config.partition, seed, "time", "partition", label
            )
        except UsageError as error:
            allowed = f"must deal each class by itself with time.order=client_specific; {error.key}: {error.allowed}"
            raise UsageError("partition.name", partition.name, allowed) from error
        for k, part in zip(holders, dealt, strict=True):
            parts[place[k, label]][k].append(rows[part])
    held = [[np.sort(np.concatenate(found)) for found in stage] for stage in parts]
    stages = [replace(whole, index=i) for i in range(tasks)]
    split = split_of(stream, stages, held, config.partition, clients, seed)
    out = set(never_trained(config.partition, clients, seed))
    mine = [classes[k] for k in range(clients) if k not in out]
    own = counted(presence(time, tasks, split.clients, seed) or [[True] * split.clients] * tasks)
    met = [sum(stage[k] >= 0 for stage in own) for k in range(split.clients)]
    clocks = Clocks(own, tuple(tuple(tasks_[: met[k]]) for k, tasks_ in enumerate(mine)))
    return rearranged(split, clocks, lambda stage, client: own[stage][client])


def _joined(stream: Stream, kind: str) -> Ids:
    return np.sort(np.concatenate([getattr(stage, kind) for stage in stream.stages]))


def _refuse_shared_classes(stream: Stream, time: settings.Time) -> None:
    for stage in stream.stages:
        if not by_class(stream) or set(occurring_classes(stream, stage)) != set(stage.classes):
            allowed = f"must be common or asynchronous with scenario {stream.name}: its tasks are no sets of classes, "
            raise UsageError("time.order", time.order, allowed + "from which clients could have classes of their own")
