"""The one kind of message: a call of a function at some clients of a node, and its reply.

Functions are ``train`` (a round of local training) and ``STRATEGY:METHOD`` (an exchange of a strategy). What only a
simulation needs (sample ids) travels in arrays whose names start with ``_``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..strategy import Arrays


@dataclass(frozen=True)
class Header:
    """What a node needs to know beside arrays; JSON on the wire.

    Attributes:
        function: ``train`` or ``STRATEGY:METHOD``.
        clients: partition ids, ascending.
        sequence: number of this exchange in the run; client states are stored under it.
        width: classes the head can score.
        known, new: class positions.
    """

    function: str
    clients: list[int]
    task: int
    round: int
    rounds: int
    tasks: int
    sequence: int
    width: int
    known: list[int]
    new: list[int]

    def to_json(self) -> str:
        """The wire form."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Header:
        """The inverse of :meth:`to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Call:
    """A call at a node.

    Attributes:
        model: shared parameters and buffers.
        previous: the global model of the previous task's end, or empty.
        down: each strategy's broadcast arrays.
        ids: each client's training rows of this task, (n,) int64.
    """

    header: Header
    model: Arrays
    previous: Arrays
    down: Mapping[str, Arrays]
    ids: Mapping[int, Tensor]

    def arrays(self) -> Arrays:
        """Everything as one flat mapping for the message."""
        flat = {f"model/{n}": a for n, a in self.model.items()}
        flat |= {f"previous/{n}": a for n, a in self.previous.items()}
        flat |= {f"down/{s}/{n}": a for s, arrays in self.down.items() for n, a in arrays.items()}
        rows = [self.ids[c] for c in self.header.clients]
        flat["_sizes"] = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        flat["_ids"] = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        return flat

    @classmethod
    def of(cls, header: Header, flat: Arrays) -> Call:
        """The inverse of :meth:`arrays`."""
        down: dict[str, Arrays] = {}
        for name, array in flat.items():
            if name.startswith("down/"):
                strategy, key = name.removeprefix("down/").split("/", 1)
                down.setdefault(strategy, {})[key] = array
        rows = torch.split(flat["_ids"], flat["_sizes"].tolist())
        return cls(
            header,
            below(flat, "model/"),
            below(flat, "previous/"),
            down,
            dict(zip(header.clients, rows, strict=True)),
        )

    def restricted(self, clients: list[int]) -> Call:
        """The same call for some of its clients."""
        return replace(self, header=replace(self.header, clients=clients))


@dataclass(frozen=True)
class Reply:
    """What a node answers: its clients' reduced arrays, facts to merge them, and what was measured."""

    arrays: Arrays
    facts: dict[str, Any]
    measured: dict[str, Any]


def below(flat: Mapping[str, Tensor], prefix: str) -> Arrays:
    """Entries whose name starts with ``prefix``, without it."""
    return {n.removeprefix(prefix): a for n, a in flat.items() if n.startswith(prefix)}


def prefixed(arrays: Mapping[str, Tensor], prefix: str) -> Arrays:
    """The inverse of :func:`below`."""
    return {f"{prefix}{n}": a for n, a in arrays.items()}
