"""Who owns which row: the client of each row, and the rows of each client."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .stream import Ids


def owners(parts: Sequence[Ids], count: int) -> Ids:
    """(count,) int64: whose part each place is in, -1 for nobody's; the inverse of :func:`rows_by_owner`."""
    owner = np.full(count, -1, dtype=np.int64)
    for client, part in enumerate(parts):
        owner[part] = client
    return owner


def rows_by_owner(owner: Ids, clients: int) -> list[Ids]:
    """For each client the places where ``owner`` names it, ascending; -1 is nobody.

    >>> [rows.tolist() for rows in rows_by_owner(np.array([1, -1, 0, 1]), 2)]
    [[2], [0, 3]]
    """
    order = np.argsort(owner, kind="stable").astype(np.int64)
    ends = np.searchsorted(owner[order], np.arange(clients + 1)).tolist()
    return [order[start:end] for start, end in pairwise(ends)]
