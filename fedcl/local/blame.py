"""Whose error it is: one line that names the strategy and the place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import FedclError, RunFailed
from ..strategy import Strategy


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a device or on the host."""
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def blame(strategy: Strategy, hook: str) -> Iterator[None]:
    """Turns any exception of a strategy's hook into one line that names the strategy and the place."""
    try:
        yield
    except (FedclError, KeyboardInterrupt):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" ({trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno})" if trace else ""
        single = "more than 1 value per channel" in str(error)  # BatchNorm's own words
        hint = (
            "; a batch of one image cannot train BatchNorm: set federation.batch_min=2 or model.norm=group"
            if single
            else ""
        )
        raise RunFailed(
            f"strategy {strategy.name!r} failed in {hook}: {type(error).__name__}: {error}{where}{hint}"
        ) from error
