"""Who takes part in a round, and whom a strategy's own exchange reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import random as counter
from ..config import Config

if TYPE_CHECKING:
    from ..stream import Split


def cohort_size(config: Config, clients: int) -> int:
    """Clients of a round: ``federation.cohort``, or ``participation`` of all, at least one.

    >>> cohort_size(Config(), 3)
    3
    """
    # A centralised bound has fewer clients than the settings: one learner.
    asked = min(config.federation.cohort, clients)
    return asked or max(1, round(config.federation.participation * clients))


def cohort(config: Config, clients: int, task: int, round_: int) -> list[int]:
    """Partition ids of a round's cohort, ascending; how many is said by :func:`cohort_size`.

    A pure function of the seed, drawn in O(cohort), so that the population is never enumerated.

    Args:
        config: the settings; ``federation.participation``, ``federation.cohort`` and ``seed`` are read.
        clients: how many there are, K.
        task, round_: 0-based.

    >>> cohort(Config(), 3, 0, 0)
    [0, 1, 2]
    """
    return counter.sample(clients, cohort_size(config, clients), config.seed, "cohort", task, round_)


def cohort_there(config: Config, split: Split, task: int, round_: int) -> list[int]:
    """As :func:`cohort`, among the clients that are there; a pure function of the seed too."""
    there = split.present(task)
    return [there[place] for place in cohort(config, len(there), task, round_)]


def reached(config: Config, split: Split, task: int, rounds: int, sequence: int) -> Sequence[int]:
    """Partition ids of the clients that a strategy's own exchange reaches, ascending; whoever is absent is not.

    By ``federation.exchange``: ``all``; ``trained``, the cohorts of this task so far; or a number, drawn anew for
    each exchange. ``auto`` is all of a complete split, and as many as a round's cohort of a drawn population.

    Args:
        rounds: finished rounds of the task.
        sequence: exchanges of the run so far, which name the draw.
    """
    there, whom = split.present(task), config.federation.exchange
    if whom == "trained":
        return sorted({client for round_ in range(rounds) for client in cohort_there(config, split, task, round_)})
    if whom == "all" or (whom == "auto" and not split.rule):
        return there
    count = cohort_size(config, len(there)) if whom == "auto" else min(int(whom), len(there))
    return [there[place] for place in counter.sample(len(there), count, config.seed, "exchange", task, sequence)]


def reach_note(config: Config, split: Split) -> list[str]:
    """One line on whom exchanges reach, where it is neither everybody nor what the user asked for."""
    if config.federation.exchange != "auto" or not split.rule:
        return []
    count = cohort_size(config, split.clients)
    return [
        f"what a strategy asks of clients beside training (exchanges) reaches {count} of {split.clients} clients, "
        "drawn anew each time; federation.exchange=trained asks those that trained in the task"
    ]
