"""The three global generators, which no part of a run may draw from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

NAMES = ("Python's random", "NumPy's global generator", "torch's global generator")


def states() -> tuple[bytes, bytes, bytes]:
    """Where the three generators stand, comparable."""
    _, words, *rest = np.random.get_state()  # noqa: NPY002
    numpy_state = np.asarray(words).tobytes() + repr(rest).encode()
    return repr(random.getstate()).encode(), numpy_state, torch.get_rng_state().numpy().tobytes()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Other global seeds inside; outside the generators go on as if nothing had been."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
