"""Local training inside a function that the server calls, and what is measured of it."""

from __future__ import annotations

from collections import Counter
from typing import Any
from zlib import crc32

from ..local.client import Asked, Client, Kind
from ..local.training import train_alone
from ..strategy import Arrays, Phase


def nothing_trained() -> dict[str, Any]:
    """The measurements of a call before anybody has trained."""
    return {
        "steps": 0, "samples": 0, "dropped": 0, "idle": [], "empty": [], "losses": {}, "terms": {}, "own": {},
        "engine": [],
    }  # fmt: skip


class Trainer:
    """Trains one client on demand and remembers what it did.

    Attributes:
        function: name of the exchanged function that trains.
        shapes: how many steps had batches of each shape.
    """

    def __init__(self, client: Client, function: str) -> None:
        self.client, self.function = client, function
        self.shapes: Counter[Kind] = Counter()
        self.steps = self.dropped = 0
        self.losses: dict[str, float] = {}

    def __call__(self, phase: Phase) -> Arrays:
        trained = train_alone(self.client, phase)
        names = "\n".join(n for n in self.client.node.trainable if phase.trains(n))
        asked = Asked(f"{self.function} {phase.name} {self.client.task} {crc32(names.encode()):08x}", phase)
        self.shapes.update({(asked, shape): steps for shape, steps in trained.shapes.items()})  # type: ignore[misc]
        self.steps += trained.steps
        self.dropped += trained.dropped
        self.losses |= trained.losses
        return trained.arrays

    def record(self, steps: int, dropped: int, losses: dict[str, float]) -> None:
        """Adds training by a loop that is not the engine's, whose FLOPs are unknown.

        Args:
            steps: optimiser steps taken.
            dropped: images left out of an epoch.
            losses: mean of each term over the steps.
        """
        if steps:
            size = self.client.node.config.federation.batch_size
            self.shapes[(Asked(f"{self.function} by another loop", None), (size,))] += steps
        self.steps += steps
        self.dropped += dropped
        self.losses |= losses

    def report(self, measured: dict[str, Any]) -> None:
        """Adds what the client did to the measurements of the call."""
        if not self.steps:
            return
        samples = self.client.samples
        measured["steps"] += self.steps
        measured["samples"] += samples
        measured["dropped"] += self.dropped
        for term, value in self.losses.items():
            measured["losses"][term] = measured["losses"].get(term, 0.0) + value * samples
            measured["terms"][term] = measured["terms"].get(term, 0) + samples
