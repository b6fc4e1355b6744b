"""The contestant's side of a benchmark: wait for a turn, take it, say how long it took.

A contestant is a process. It gets its turns as lines on standard input and answers each with one JSON line on what
was its standard output; whatever else the process or its libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

GO = "go"


class Turns:
    """The pipes of this process, from now on for the protocol alone."""

    def __init__(self) -> None:
        # Copies that children do not inherit: a daemon that outlives its parent would keep the pipes open.
        self._input = os.fdopen(os.dup(0), "r")
        self._output = os.fdopen(os.dup(1), "w")
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        self._start = 0.0

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Says that everything is loaded; ``facts`` are plain JSON values for the report."""
        self._say({"ready": dict(facts)})

    def wait(self) -> None:
        """Returns when it is this contestant's turn, with its clock started.

        A parent that is gone, or wants no more rounds, ends the process at once.
        """
        if self._input.readline().strip() != GO:
            sys.stderr.flush()
            # Not sys.exit: this may be a thread of a library that catches everything.
            os._exit(0)
        synchronise()
        self._start = time.perf_counter()

    def done(self) -> None:
        """Ends the turn and says how many seconds it took."""
        synchronise()
        self._say({"seconds": time.perf_counter() - self._start})

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Says that all rounds are over; ``facts`` as in :meth:`ready`."""
        self._say({"finished": {**facts, "device_memory_mb": device_memory()}})

    def _say(self, message: dict[str, Any]) -> None:
        self._output.write(json.dumps(message) + "\n")
        self._output.flush()


def synchronise() -> None:
    """Waits for what a GPU of this process still has to do."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_memory() -> float | None:
    """The most that tensors of this process held on its GPU, in MB (10^6 bytes); None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_allocated()) / 1e6
