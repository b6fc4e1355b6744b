"""Runs of a few stacks that are stopped at exact points and go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from fedcl.config import Config

TinyConfig = Callable[[Mapping[str, Any]], "Config"]

PERSONAL = """
import torch
from fedcl.strategy import Strategy

class Personal(Strategy):
    name = "personal_probe"
    reductions = {"n": "sum"}

    def share(self, name, model):
        return "private" if name.startswith("head.") else "shared"

    def end_round(self, ctx, trained, steps):
        return {"n": torch.tensor(1)}, {"seen": ctx.state.get("seen", torch.tensor(0)) + steps}

    def after_aggregate(self, server):
        return server.arrays, {"total": server.state.get("total", torch.tensor(0)) + server.uploads["n"]}
"""

BASE = {
    "federation.clients": 4, "federation.participation": 0.75, "federation.rounds": 3, "federation.batch_min": 2,
    "checkpoint.every": 1, "evaluate.every": 1, "engine.dtype": "float32", "engine.path": "sequential",
}  # fmt: skip
STACKS: dict[str, dict[str, Any]] = {
    "replay+fedewc": {"strategy": ["replay", "fedewc"]},
    "everything": {
        "strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning", "replay"],
        "model.norm": "batch",
        "model.dropout": 0.2,
        "data.augment": ["crop(1)"],
    },
    "private parts, convolutions": {
        "strategy": ["personal_probe", "fedewc"],
        "plugins": ["PERSONAL"],
        "model.name": "simple_cnn",
        "model.norm": "batch",
        "model.batch_norm": "local",
        "model.width": None,
        "model.depth": None,
        "data.size": 16,
        "partition.test": "same_mix",
    },
    "adaptive server": {"strategy": ["fedadam"], "scenario.tasks": 3},
}


class Lab:
    """Runs of one stack: the uninterrupted one, and others that are stopped and go on."""

    stacks = STACKS
    known: ClassVar[dict[str, tuple[dict[str, Any], int]]] = {}

    def __init__(self, children: Any, tiny_config: TinyConfig, everything: list[str], place: Path) -> None:
        self.children, self.tiny_config = children, tiny_config
        self.everything, self.place = everything, place

    def settings(self, stack: str) -> dict[str, Any]:
        overrides = {**BASE, **STACKS[stack]}
        if "plugins" in overrides:
            plugin = self.place / "personal_probe.py"
            plugin.write_text(PERSONAL)
            overrides["plugins"] = [str(plugin)]
        return asdict(self.tiny_config(overrides))

    def start(self, settings: dict[str, Any], *faults: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """A new run in its own folder."""
        folder = Path(settings["output"]["dir"]) / settings["name"] / f"seed-{settings['seed']}"
        return folder, self.children.start({"settings": settings, "faults": list(faults)})

    def resume(self, folder: Path, *faults: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self.children.start({"folder": str(folder), "faults": list(faults)})
        return answer

    def whole(self, stack: str) -> tuple[dict[str, Any], int]:
        """Results of the uninterrupted run and how many points it can be killed at."""
        if stack in self.known:
            return self.known[stack]
        counting = {"functions": self.everything, "at": 0, "action": "kill"}
        folder, answer = self.start(self.settings(stack), counting)
        assert (answer["code"], answer["error"]) == (0, "")
        self.known[stack] = self.results(folder), answer["calls"][0]
        return self.known[stack]

    @staticmethod
    def results(folder: Path) -> dict[str, Any]:
        """What must not depend on interruptions."""
        summary = json.loads((folder / "summary.json").read_text())
        assert summary.pop("wall_seconds") > 0
        assert summary.pop("measured")["client_seconds"] > 0
        return {
            "summary": summary,
            **{n: (folder / n).read_text() for n in ("accuracy_matrix.csv", "rounds.csv")},
        }

    @staticmethod
    def kill(function: str, at: int, **more: Any) -> dict[str, Any]:
        """A fault: death at the ``at``-th call of ``function``."""
        return {"functions": [function], "at": at, "action": "kill", **more}
