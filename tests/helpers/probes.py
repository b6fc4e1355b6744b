"""Small strategies written by a test, and what they noted."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fedcl.run import RunResult

HEADER = """
import torch
from fedcl.strategy import Strategy, Source, Broadcast, Finished, Phase, cross_entropy

SEEN = []

class Probe(Strategy):
    name = "NAME"
"""

_numbers = itertools.count()


class Probes:
    """``probes(body)``: settings of a run with a strategy whose class body is ``body``."""

    first_line = len(HEADER.splitlines()) + 1
    """The line of the file on which the body begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, body: str, **settings: Any) -> dict[str, Any]:
        name = f"probe_{next(_numbers)}"
        path = self.folder / f"{name}.py"
        path.write_text(HEADER.replace("NAME", name) + textwrap.indent(textwrap.dedent(body), "    "))
        # One by one: a probe notes what a client alone sees, and trying out whether it stacks would add to its notes.
        return {"strategy": [name], "plugins": [str(path)], "engine.path": "sequential", **settings}

    @staticmethod
    def seen(settings: Mapping[str, Any]) -> list[Any]:
        """What the strategy of these settings noted in the list ``SEEN`` of its module."""
        from fedcl import registry

        path = str(Path(settings["plugins"][0]).resolve())
        found = next(p for p in registry.plugins() if str(p.path) == path)
        noted: list[Any] = sys.modules[found.module].SEEN
        return noted


def moved(result: RunResult) -> set[str]:
    """Parameters that the run changed; the tiny run's initial ones are drawn anew."""
    from fedcl.build import build
    from fedcl.config import load_config

    experiment = build(load_config(result.folder / "config.yaml"))
    final = {n: p.detach() for n, p in result.model.named_parameters()}
    first = {n: experiment.node.grown(n, a, 10, "initial") for n, a in experiment.initial.items()}
    return {n for n, p in final.items() if not torch.equal(p, first[n])}
