"""Deterministic choices of samples: test splits, validation splits, at most N a class."""

from __future__ import annotations

from math import floor

import numpy as np
import numpy.typing as npt

from fedcl import random
from fedcl.errors import UsageError

Ids = npt.NDArray[np.int64]


def stratified(groups: Ids, fraction: float, *stream: object) -> tuple[Ids, Ids]:
    """Sample ids split so that each group gives ``fraction`` of its samples to the second part.

    The share of n samples is rounded half up and at most n - 1: no group leaves the first part.

    Args:
        groups: (N,) integers, for example class ids.
        fraction: in [0, 1).
        stream: name of the random stream; each group draws from its own.

    Returns:
        ids of the first and of the second part, each ascending.

    >>> first, second = stratified(np.array([0, 0, 0, 0, 0, 1]), 0.4, "doc")
    >>> len(first), len(second), 5 in first
    (4, 2, True)
    """
    taken = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups).tolist():
        members = np.flatnonzero(groups == group)
        count = min(floor(fraction * len(members) + 0.5), len(members) - 1)
        taken[members[random.permutation(len(members), *stream, group)[:count]]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def validation_split(labels: Ids, fraction: float, seed: int) -> tuple[Ids, Ids]:
    """Ids of training images to train on, and of those held out for validation.

    Args:
        labels: (N,) class ids.
        fraction: share of each class that is held out (``data.validation``), in [0, 1).
        seed: of the run.

    Returns:
        training ids and validation ids, each ascending. A class keeps at least one training image.

    Raises:
        UsageError: ``fraction`` is outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise UsageError("data.validation", fraction, "a share of the training images, at least 0 and below 1")
    return stratified(labels, fraction, seed, "validation")


def at_most(labels: Ids, count: int, *stream: object) -> Ids:
    """Ids, ascending, of at most ``count`` samples a class; a smaller count keeps some of a larger one's."""
    kept = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        kept.append(members[random.permutation(len(members), *stream, label)[:count]])
    return np.sort(np.concatenate(kept))
