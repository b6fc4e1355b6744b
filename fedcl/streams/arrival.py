"""Single pass (``federation.passes=once``): which of a client's images of a task arrive in which round.

A client's images of a task are put in the order in which the stream shows them, at random where the stream has none,
and cut into as many chunks as there are rounds. Round r has chunk r at hand, and nothing else of the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .. import random as counter
from ..errors import UsageError

if TYPE_CHECKING:
    from ..config import Config
    from ..strategy import Strategy
    from ..stream import Ids, Split, Stream


def chunk_size(count: int, round_: int, rounds: int) -> int:
    """Images of chunk ``round_`` of ``count`` images in ``rounds`` chunks: the first ones get one more.

    >>> [chunk_size(8, r, 3) for r in range(3)]
    [3, 3, 2]
    """
    return count // rounds + (round_ < count % rounds)


def chunk(rows: Ids, arrival: Ids | None, round_: int, rounds: int, *name: object) -> Ids:
    """The rows of one round, in the order of arrival.

    Args:
        rows: all rows of the client in the task.
        arrival: of the training store, (N,): when each row arrives; None: in an order drawn from ``name``.
        round_: from 0, below ``rounds``.
        name: of the random stream.

    >>> chunk(np.array([4, 5, 6]), np.array([0, 0, 0, 0, 9, 2, 5]), 0, 2).tolist()
    [5, 6]
    """
    if arrival is None:
        ordered = rows[counter.permutation(len(rows), *name)]
    else:
        ordered = rows[np.argsort(arrival[rows], kind="stable")]
    start = round_ * (len(rows) // rounds) + min(round_, len(rows) % rounds)
    return ordered[start : start + chunk_size(len(rows), round_, rounds)]


def at_hand(config: Config, stream: Stream, split: Split, task: int, round_: int, client: int) -> Ids:
    """The training rows that a client has at hand in a round: all of the task, or the round's chunk.

    The draw is that of the first epoch of the task's first round, so that one round of one pass is one epoch.
    """
    rows = split.train[task][client]
    if config.federation.passes == "many":
        return rows
    name = (config.seed, "client", client, task, 0, "order", 0)
    return chunk(rows, stream.arrival, round_, config.federation.rounds, *name)


def size_at_hand(config: Config, split: Split, task: int, round_: int, client: int) -> int:
    """How many rows :func:`at_hand` gives; a drawn client's rows are not drawn for it.

    Of a client without labelled rows at hand, how many unlabelled ones, where the stack learns from these.
    """

    def here(count: int) -> int:
        once = config.federation.passes == "once"
        return chunk_size(count, round_, config.federation.rounds) if once else count

    labelled = here(split.size(task, client))
    if labelled or not split.self_supervised:
        return labelled
    return here(split.unlabelled_size(task, client))


def unlabelled_at_hand(
    config: Config, stream: Stream, split: Split, task: int, round_: int, clients: Sequence[int]
) -> dict[int, Ids]:
    """As :func:`at_hand` for each client, the rows whose labels are hidden; {} where all are labelled."""
    if split.unlabelled is None:
        return {}
    without = replace(split, train=split.unlabelled)
    return {client: at_hand(config, stream, without, task, round_, client) for client in clients}


def of_use(config: Config, split: Split, strategy: Strategy, task: int, round_: int, client: int) -> bool:
    """Whether a client has images at hand that a strategy can use: labelled ones, or any where it learns from all."""
    split = replace(split, self_supervised=strategy.unlabelled == "learns")
    return size_at_hand(config, split, task, round_, client) > 0


def check_once(config: Config, strategies: Iterable[Strategy], stream: Stream) -> None:
    """Refuses what needs images again that ``federation.passes=once`` shows once.

    Raises:
        UsageError: naming the strategy or the stream.
    """
    if config.federation.passes == "many":
        return
    for strategy in strategies:
        if strategy.repeats:
            allowed = f"many with strategy {strategy.name}, which repeats old images"
            raise UsageError("federation.passes", "once", allowed)
        if strategy.revisits:
            allowed = f"many with strategy {strategy.name}, which needs a task's images again {strategy.revisits}"
            raise UsageError("federation.passes", "once", allowed)
    if stream.repeats:
        allowed = f"many with scenario.name={stream.name}, whose tasks hold images of earlier ones"
        raise UsageError("federation.passes", "once", allowed)


def once_notes(config: Config, split: Split) -> list[str]:
    """One line where some clients have fewer images of a task to train on than there are rounds to spread them over.

    Those that have none are told of elsewhere.
    """
    rounds = config.federation.rounds
    if config.federation.passes == "many" or split.rule:
        return []
    labelled, without = (counts.sum(axis=2) for counts in (split.counts(), split.unlabelled_counts()))
    usable = np.maximum(labelled, without) if split.self_supervised else labelled
    few = int(((usable > 0) & (usable < rounds)).sum())
    if not few:
        return []
    cases = "one case" if few == 1 else f"{few} cases"
    return [
        f"federation.passes=once: in {cases} a client has fewer images of a task to train on than there are rounds "
        f"({rounds}); it does not train in the rounds that get none"
    ]
