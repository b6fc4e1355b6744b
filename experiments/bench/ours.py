"""fedcl as a contestant: a run like any other, that waits for its turn between rounds.

Usage: python -m fedcl.experiments.bench.ours WORKLOAD ROUNDS [KEY=VALUE]...
"""

from __future__ import annotations

import sys

import torch

from fedcl.bench.turns import Turns
from fedcl.bench.workloads import settings
from fedcl.config import load_config
from fedcl.errors import FedclError
from fedcl.run import execute
from fedcl.tell.progress import QuietProgress, Standing

from .work import device_of


class Gate(QuietProgress):
    """Holds a run up between its rounds."""

    def __init__(self, turns: Turns, rounds: int, facts: dict[str, str | None]) -> None:
        self._turns, self._rounds, self._facts = turns, rounds, facts

    def start(self, title: str, tasks: int, rounds: int, done: int) -> None:
        """Everything is built; the first round waits for its turn."""
        self._turns.ready(self._facts)
        self._turns.wait()

    def round(self, task: int, round: int, standing: Standing) -> None:
        """A round is over, with all that is written down about it."""
        self._turns.done()
        if round + 1 < self._rounds:
            self._turns.wait()

    def message(self, text: str) -> None:
        """Into the log."""
        print(text, file=sys.stderr)


def main(workload: str, rounds: int, overrides: list[str]) -> None:
    """Runs the workload's settings with the real engine."""
    turns = Turns()
    config = settings(workload, [*overrides, ("federation.rounds", rounds)])
    device = device_of(config.engine.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    result = execute(config, progress=Gate(turns, rounds, {"device": device.type, "gpu": gpu}))
    engine = load_config(result.folder / "config.yaml").engine
    turns.finish({"engine": vars(engine)})


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    except FedclError as error:
        sys.exit(f"{type(error).__name__}: {error}")
