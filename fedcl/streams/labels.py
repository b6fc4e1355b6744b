"""Which of the clients' training images have a label: semi-supervised and unlabelled streams.

Whether an image is labelled is decided once for a run, before it starts, from the seed alone. Labels that are hidden
are -1 in the store that nodes have, so that no hook of a strategy can reach them; the experimenter's stay in
:class:`fedcl.stream.Stream`, for evaluation.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .. import random as counter
from ..errors import UsageError
from ..settings import schema as settings
from ..stream import Ids, Split, Stream
from .population import Drawn

if TYPE_CHECKING:
    from ..strategy import Strategy

Mask = npt.NDArray[np.bool_]

HIDDEN = -1
"""The label of an image whose label is hidden."""


def hidden_rows(split: Split, stream: Stream, config: settings.Labels, seed: int) -> Mask:
    """(N,) bool: the rows of the training store whose labels nobody but the experimenter has.

    Those of ``stream.unlabelled``, and of the others all but those that the section ``labels`` picks:

    - ``per=sample``: of each client's images of a class in a task the share ``rate`` (see :func:`allotted`), or
      ``count`` images. A drawn population shares images, so there it is of each class of the task.
    - ``per=client``: all images of ``rate`` of the clients (rounded half up, one at least if the rate is above 0).

    An image that stands in several tasks keeps what was decided in the first.

    Raises:
        UsageError: the section does not fit the partition.
    """
    hidden = np.zeros(len(stream.train_labels), dtype=bool)
    hidden[stream.unlabelled] = True
    if config.rate == 1 and config.count is None:
        return hidden
    if config.per == "client":
        return hidden | _by_client(split, config, seed)
    tasks = [[stage.train_ids] for stage in stream.stages] if split.rule else [list(task) for task in split.rows]
    return hidden | _by_sample(tasks, ~hidden, stream.train_labels, config, seed)


def allotted(sizes: Sequence[int], rate: Fraction, start: Fraction) -> list[int]:
    """How many of each group of images are labelled: the share ``rate`` of all, spread over the groups.

    Group c ends at ``floor(rate * (n_0 + ... + n_c) + start)``: every group has its share rounded up or down, so has
    the sum, and over ``start`` in [0, 1) the mean is exact, also where groups are too small for rounding each alone.

    >>> allotted([5, 5, 10], Fraction(1, 10), Fraction(1, 2))
    [1, 0, 1]
    """
    ends = [0, *np.cumsum(np.array(sizes, dtype=np.int64)).tolist()]
    cuts = [math.floor(rate * end + start) for end in ends]
    return [after - before for before, after in pairwise(cuts)]


def _by_sample(groups: list[list[Ids]], open_: Mask, labels: Ids, config: settings.Labels, seed: int) -> Mask:
    """(N,) bool: images without a label, drawn in each group of images (a client's, or a task's) of each task."""
    rate = Fraction(str(config.rate))  # the decimal text is taken exactly: 0.29 of 100 images are 29
    hidden, decided = np.zeros(len(labels), dtype=bool), ~open_
    for task, clients in enumerate(groups):
        for client, ids in enumerate(clients):
            mine = ids[~decided[ids]]
            classes, sizes = np.unique(labels[mine], return_counts=True)
            name = (seed, "labels", task, client)
            if config.count is not None:
                counts = [min(config.count, size) for size in sizes.tolist()]
            else:
                start = Fraction(int(counter.words(1, *name, "start")[0]), 2**64)
                counts = allotted(sizes.tolist(), rate, start)
            for label, count in zip(classes.tolist(), counts, strict=True):
                rows = np.sort(mine[labels[mine] == label])
                hidden[rows[counter.permutation(len(rows), *name, label)[count:]]] = True
            decided[ids] = True
    return hidden


def _by_client(split: Split, config: settings.Labels, seed: int) -> Mask:
    """(N,) bool: the images of the clients without labels, the same clients in every task."""
    if split.rule:
        allowed = "must be sample with partition.size: clients that draw their images share some of them"
        raise UsageError("labels.per", config.per, allowed, ("sample",))
    rate = Fraction(str(config.rate))
    count = max(math.floor(rate * split.clients + Fraction(1, 2)), 1 if rate else 0)
    labelled = set(counter.sample(split.clients, count, seed, "labels", "clients"))
    hidden, decided = (np.zeros(len(split.train_labels), dtype=bool) for _ in range(2))
    for clients in split.rows:
        for client, ids in enumerate(clients):
            if client not in labelled:
                hidden[ids[~decided[ids]]] = True
        for ids in clients:
            decided[ids] = True
    return hidden


def separated(split: Split, stream: Stream, hidden: Mask) -> Split:
    """The split with the rows of a mask (N,) as unlabelled ones; as it is where there are none.

    Only clients' training images are hidden: those of personal test sets and of clients that never train are not, but
    for classes that are never labelled. These are left out of both, as nobody can be asked to name them.
    """
    if not hidden.any():
        return split
    labelled = tuple(_picked(clients, ~hidden) for clients in split.train)
    without = tuple(_picked(clients, hidden) for clients in split.train)
    tasks = [[stage.train_ids] for stage in stream.stages] if split.rule else split.rows
    held = distinct([ids for task in tasks for ids in task])
    named = np.isin(stream.train_labels, stream.known(stream.num_tasks - 1))
    split, never = _without_unnamed(split, named), split.held_out
    if never is not None:
        kept = tuple(tuple(ids[named[ids]] for ids in task) for task in never.rows)
        never = replace(_without_unnamed(never, named), train=kept)
    rows = held[hidden[held]]
    return replace(split, train=labelled, unlabelled=without, hidden=rows, held_out=never)


def _without_unnamed(split: Split, named: Mask) -> Split:
    if split.test is None or split.test_store != "train":
        return split
    return replace(split, test=tuple(tuple(ids[named[ids]] for ids in task) for task in split.test))


def _picked(clients: tuple[Ids, ...] | Drawn, mask: Mask) -> tuple[Ids, ...] | Drawn:
    if isinstance(clients, tuple):
        return tuple(ids[mask[ids]] for ids in clients)

    def rows(client: int) -> Ids:
        ids = clients[client]
        return ids[mask[ids]]

    return Drawn(len(clients), rows, lambda client: len(rows(client)))


def masked(labels: Ids, hidden: Ids) -> Ids:
    """Labels (N,) with :data:`HIDDEN` in the rows ``hidden``; the same array where there are none."""
    if not len(hidden):
        return labels
    out = labels.copy()
    out[hidden] = HIDDEN
    return out


def as_strategies_see(stream: Stream, split: Split) -> tuple[Stream, Split]:
    """Both with :data:`HIDDEN` in the place of the labels that clients do not have."""
    if not len(split.hidden):
        return stream, split
    labels, never = masked(stream.train_labels, split.hidden), split.held_out
    never = None if never is None else replace(never, train_labels=masked(never.train_labels, split.hidden))
    return replace(stream, train_labels=labels), replace(split, train_labels=labels, held_out=never)


def to_text(hidden: Ids) -> str:
    """Row numbers as text, to go with a message: the bits of a mask, compressed; empty for no rows."""
    if not len(hidden):
        return ""
    mask = np.zeros(int(hidden.max()) + 1, dtype=bool)
    mask[hidden] = True
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes())).decode()


def from_text(text: str) -> Ids:
    """The inverse of :func:`to_text`.

    >>> from_text(to_text(np.array([1, 9]))).tolist()
    [1, 9]
    """
    if not text:
        return np.zeros(0, dtype=np.int64)
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(bits)).astype(np.int64)


def labelled_somewhere(split: Split) -> bool:
    """Whether a client has a labelled image in any task."""
    if split.unlabelled is None:
        return True
    clients = split.some(64) if split.rule else range(split.clients)
    return any(split.size(task, client) for task in range(len(split.train)) for client in clients)


def check_learners(split: Split, strategies: Sequence[Strategy]) -> None:
    """Refuses a stack that has nothing to learn from.

    Raises:
        UsageError: no image is labelled, and no strategy learns from images without labels.
    """
    if labelled_somewhere(split) or split.self_supervised:
        return
    from .. import registry

    able = [e.name for e in registry.entries("strategies") if getattr(e.cls, "unlabelled", "") == "learns"]
    names = ", ".join(s.name for s in strategies)
    verb = "learns" if len(strategies) == 1 else "learn"
    allowed = f"{names} {verb} from labels only, and no client has a labelled image; "
    allowed += f"strategies that learn from images without labels: {', '.join(able)}"
    raise UsageError("strategy", [s.name for s in strategies], allowed, able)


def distinct(parts: Sequence[Ids]) -> Ids:
    """The distinct rows of several arrays, ascending."""
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
