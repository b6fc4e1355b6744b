"""A process that runs one point of a sweep after the other: jobs come as lines of JSON, and so do its reports.

Importing torch and Avalanche takes seconds, so a worker is kept. When its standard input ends while it runs something
(the sweep was killed) the run is stopped as by Ctrl-C, at its next step and with a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from types import FrameType
from typing import Any

from .job import Job, perform


class Worker:
    """The state of the process: whether a run is on, and whether it is to stop."""

    def __init__(self, told: int) -> None:
        self._told = told
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._busy = False

    def tell(self, message: Mapping[str, Any]) -> None:
        """Reports; where nobody listens any more the run goes on to its next checkpoint all the same."""
        with contextlib.suppress(OSError):
            os.write(self._told, json.dumps(message).encode() + b"\n")

    def read(self) -> None:
        """Takes jobs in, in a thread of its own: a run that is on must notice that the sweep is gone."""
        for line in sys.stdin:
            self._jobs.put(line)
        self._jobs.put(None)
        if self._busy:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C while a run is built or ends; while it trains it has a handler of its own."""
        if self._busy:
            raise KeyboardInterrupt

    def serve(self) -> None:
        """Runs jobs until there are no more."""
        signal.signal(signal.SIGINT, self.interrupt)
        threading.Thread(target=self.read, daemon=True).start()
        while (line := self._jobs.get()) is not None:
            self._busy = True
            try:
                outcome = asdict(perform(Job(**json.loads(line)), self.tell))
            except KeyboardInterrupt:
                outcome = {"status": "interrupted"}
            self._busy = False
            self.tell({"event": "end", **outcome})


def main() -> None:
    """The process. What libraries print goes to standard error, which the sweep keeps in a file."""
    told = os.dup(1)
    os.dup2(2, 1)
    worker = Worker(told)
    worker.serve()
    # Threads of libraries must not hold up a process that has nothing left to do.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
