"""Local training inside a function that the server calls, and what is measured of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..local.client import Client, Kind
from ..local.training import train_alone
from ..strategy import Arrays, Phase

EXCHANGED = -1
"""Stands for the number of a phase in steps of an exchange: their FLOPs are not counted."""


def nothing_trained() -> dict[str, Any]:
    """The measurements of a call before anybody has trained."""
    return {
        "steps": 0, "samples": 0, "dropped": 0, "idle": [], "empty": [], "losses": {}, "terms": {}, "own": {},
        "engine": [],
    }  # fmt: skip


class Trainer:
    """Trains one client on demand and remembers what it did.

    Attributes:
        shapes: how many steps had batches of each shape.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.shapes: Counter[Kind] = Counter()
        self.steps = self.dropped = 0
        self.losses: dict[str, float] = {}

    def __call__(self, phase: Phase) -> Arrays:
        trained = train_alone(self.client, phase)
        self.shapes.update({(EXCHANGED, shape): steps for shape, steps in trained.shapes.items()})  # type: ignore[misc]
        self.steps += trained.steps
        self.dropped += trained.dropped
        self.losses |= trained.losses
        return trained.arrays

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
