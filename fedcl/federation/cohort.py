"""Who takes part in a round."""

from __future__ import annotations

from .. import random as counter
from ..config import Config


def cohort(config: Config, clients: int, task: int, round_: int) -> list[int]:
    """Partition ids of a round's cohort, ascending: ``participation`` of all clients, at least one.

    A pure function of the seed, drawn in O(cohort), so that the population is never enumerated.

    Args:
        config: the settings; ``federation.participation`` and ``seed`` are read.
        clients: how many there are, K.
        task, round_: 0-based.

    >>> cohort(Config(), 3, 0, 0)
    [0, 1, 2]
    """
    size = max(1, round(config.federation.participation * clients))
    return counter.sample(clients, size, config.seed, "cohort", task, round_)
