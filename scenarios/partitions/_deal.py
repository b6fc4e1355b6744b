"""Exact integer cuts and deals that the rules share."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from fedcl import random as counter
from fedcl.errors import UsageError
from fedcl.stream import Ids

LEAST_CONCENTRATION = 1e-300
"""Below this the logarithm of a gamma draw leaves the range of a double."""

_GRID = 1 << 40


def check_concentration(key: str, value: float) -> None:
    """Raises UsageError unless ``value`` is a usable Dirichlet concentration (NaN and infinity are not)."""
    if not (math.isfinite(value) and value >= LEAST_CONCENTRATION):
        raise UsageError(key, value, f"a finite number of at least {LEAST_CONCENTRATION:g}")


def even_sizes(total: int, parts: int) -> list[int]:
    """Sizes that differ by at most one; the first ``total % parts`` are the larger ones.

    >>> even_sizes(7, 3)
    [3, 2, 2]
    """
    small, larger = divmod(total, parts)
    return [small + (part < larger) for part in range(parts)]


def cut_sizes(weights: Sequence[int], total: int) -> list[int]:
    """Sizes proportional to integer weights: part k ends at ``floor(total * (w_0 + ... + w_k) / sum(w))``.

    Python integers, so the cut points are exact.

    >>> cut_sizes([1, 1, 2], 7)
    [1, 2, 4]
    """
    whole, ends, reached = sum(weights), [0], 0
    for weight in weights:
        reached += weight
        ends.append(total * reached // whole)
    return [end - start for start, end in pairwise(ends)]


def dirichlet_logs(stream: counter.Stream, concentration: float, count: int) -> list[float]:
    """Logarithms of ``count`` independent Gamma(concentration) draws: a symmetric Dirichlet before
    normalising.

    Kept as logarithms so that normalising over a subset (:func:`weights`) works where all shares of the
    subset would underflow.
    """
    return [stream.log_gamma_draw(concentration) for _ in range(count)]


def weights(logs: Sequence[float], allowed: Sequence[bool]) -> list[int]:
    """Dirichlet shares over the allowed entries, as integers in units of 2^-40 of the largest share.

    The largest allowed entry gets 2^40, entries that are not allowed get 0.

    >>> weights([0.0, 0.0, -1e300], [True, False, True]) == [2**40, 0, 0]
    True
    """
    top = max(log for log, allow in zip(logs, allowed, strict=True) if allow)
    return [round(math.exp(log - top) * _GRID) if allow else 0 for log, allow in zip(logs, allowed, strict=True)]


def fill_quota(source: counter.Stream, logs: Sequence[float], quota: int, left: list[int]) -> list[int]:
    """How many rows of each class a quota takes, one row at a time; they are taken out of ``left``.

    A class is drawn by the Dirichlet shares, renormalised over the classes that still have rows: a word r picks
    the first class whose cumulative integer weight exceeds ``r sum(w) / 2^64``.

    Args:
        logs: logarithms of the shares, one a class.
        quota: at most ``sum(left)``.
    """
    ends: list[int] = []
    mine = [0] * len(left)
    for _ in range(quota):
        if not ends:
            ends = list(accumulate(weights(logs, [rows > 0 for rows in left])))
        pick = bisect_right(ends, source.below(ends[-1]))
        mine[pick] += 1
        left[pick] -= 1
        if left[pick] == 0:
            ends = []
    return mine


def deal(order: Ids, sizes: Sequence[int]) -> list[Ids]:
    """Cuts ``order`` (N,) into consecutive pieces of ``sizes``, which sum to N."""
    ends = np.cumsum(np.array(sizes, dtype=np.int64))
    return [order[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]


def deal_by_class(labels: Ids, classes: Sequence[int], counts: Ids, *stream: object) -> list[Ids]:
    """Gives client k ``counts[k, j]`` random rows of class ``classes[j]``.

    The rows of a class are put in the random order of the stream ``(*stream, "rows", class)`` and cut in
    client order.

    Args:
        labels: (N,) int64.
        classes: the C classes in ``labels``.
        counts: (K, C) int64; each column sums to the rows of its class.
    """
    clients = counts.shape[0]
    held: list[list[Ids]] = [[] for _ in range(clients)]
    for column, label in enumerate(classes):
        rows = np.flatnonzero(labels == label)
        order = rows[counter.permutation(len(rows), *stream, "rows", int(label))]
        for client, part in enumerate(deal(order, counts[:, column].tolist())):
            held[client].append(part)
    empty = np.empty(0, dtype=np.int64)
    return [np.concatenate([empty, *parts]) for parts in held]


def class_sizes(labels: Ids) -> tuple[list[int], list[int]]:
    """The classes in ``labels``, ascending, and how many rows each has."""
    present, sizes = np.unique(labels, return_counts=True)
    return present.tolist(), sizes.tolist()
