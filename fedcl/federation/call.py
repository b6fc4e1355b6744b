"""The one kind of message: a call of a function at some clients of a node, and its reply.

Functions are ``train`` (a round of local training) and ``STRATEGY:METHOD`` (an exchange of a strategy). What only a
simulation needs (sample ids) travels in arrays whose names start with ``_``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
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
        path: ``stacked`` or ``sequential`` local training.
        chunk: clients in a stack; 0: all of a node.
        heads: the task of each class position where an image's task is known at test; empty: one head for all.
        counted: shapes of batches whose FLOPs the server knows, see :mod:`fedcl.federation.ledger`.
        own: rows (client, own task index, known, new) where clients have tasks of their own, the last two as places
            in ``sets``; empty: all are in step and ``task``, ``known`` and ``new`` are everybody's.
        sets: sets of class positions, each ascending.
        limits: rows (client, steps): stragglers that take fewer local steps.
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
    path: str = "sequential"
    chunk: int = 0
    heads: list[int] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    own: list[list[int]] = field(default_factory=list)
    sets: list[list[int]] = field(default_factory=list)
    limits: list[list[int]] = field(default_factory=list)

    @cached_property
    def _own(self) -> dict[int, tuple[int, list[int], list[int]]]:
        return {k: (task, self.sets[known], self.sets[new]) for k, task, known, new in self.own}

    def standing(self, client: int) -> tuple[int, list[int], list[int]]:
        """A client's own task index and the class positions that it knows and that are new to it."""
        return self._own.get(client, (self.task, self.known, self.new))

    def in_turn(self, clients: Sequence[int]) -> list[int]:
        """Clients in the order in which they are trained: by own task index, which a stack has in common."""
        return sorted(clients, key=lambda client: (self.standing(client)[0], client)) if self.own else list(clients)

    @cached_property
    def limit(self) -> dict[int, int]:
        """Most local steps by client; others take all that are planned."""
        return {row[0]: row[1] for row in self.limits}

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
        ids: each client's labelled training rows of this task, (n,) int64.
        own: rows of each client's own test images of this task, where its model is to be tested after training.
        unlabelled: each client's training rows of this task without a label; {} where all are labelled.
        each: arrays for single clients of the strategy whose function is called.
    """

    header: Header
    model: Arrays
    previous: Arrays
    down: Mapping[str, Arrays]
    ids: Mapping[int, Tensor]
    own: Mapping[int, Tensor] = field(default_factory=dict)
    unlabelled: Mapping[int, Tensor] = field(default_factory=dict)
    each: Mapping[int, Arrays] = field(default_factory=dict)

    def to(self, client: int) -> Mapping[str, Arrays]:
        """The broadcast arrays of each strategy with those that are for one client alone."""
        own = self.each.get(client)
        if not own:
            return self.down
        name = self.header.function.partition(":")[0]
        return {**self.down, name: {**self.down.get(name, {}), **own}}

    def arrays(self) -> Arrays:
        """Everything as one flat mapping for the message."""
        flat = {f"model/{n}": a for n, a in self.model.items()}
        flat |= {f"previous/{n}": a for n, a in self.previous.items()}
        flat |= {f"down/{s}/{n}": a for s, arrays in self.down.items() for n, a in arrays.items()}
        mine = {c: self.each[c] for c in self.header.clients if c in self.each}
        flat |= {f"each/{c}/{n}": a for c, arrays in mine.items() for n, a in arrays.items()}
        flat |= self._rows("ids", self.ids)
        if self.own:
            flat |= self._rows("own", self.own)
        if self.unlabelled:
            flat |= self._rows("unlabelled", self.unlabelled)
        return flat

    def _rows(self, name: str, rows: Mapping[int, Tensor]) -> Arrays:
        mine = [rows[c] for c in self.header.clients]
        sizes = torch.tensor([len(r) for r in mine], dtype=torch.int64)
        return {f"_{name}_sizes": sizes, f"_{name}": torch.cat(mine) if mine else torch.zeros(0, dtype=torch.int64)}

    @classmethod
    def of(cls, header: Header, flat: Arrays) -> Call:
        """The inverse of :meth:`arrays`."""
        down: dict[str, Arrays] = {}
        each: dict[int, Arrays] = {}
        for name, array in flat.items():
            if name.startswith("down/"):
                strategy, key = name.removeprefix("down/").split("/", 1)
                down.setdefault(strategy, {})[key] = array
            elif name.startswith("each/"):
                client, key = name.removeprefix("each/").split("/", 1)
                each.setdefault(int(client), {})[key] = array

        def rows(name: str) -> dict[int, Tensor]:
            if f"_{name}" not in flat:
                return {}
            parts = torch.split(flat[f"_{name}"], flat[f"_{name}_sizes"].tolist())
            return dict(zip(header.clients, parts, strict=True))

        return cls(
            header,
            below(flat, "model/"),
            below(flat, "previous/"),
            down,
            rows("ids"),
            rows("own"),
            rows("unlabelled"),
            each,
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
