"""What travels, in bytes: elements times item size of the declared arrays, the same on every runtime.

A broadcast is charged once per client within its scope. Sample ids and other facts that only a simulation sends
are not charged. An array that stands twice in one message (the previous model equals the broadcast one at the start
of a task) is charged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from ..strategy import Arrays

COUNTS = ("up", "down", "floats_up", "floats_down", "asked")
"""What :class:`ByteMeter` adds up."""


def nbytes(arrays: Mapping[str, Any]) -> int:
    """Bytes of named tensors."""
    return sum(a.numel() * a.element_size() for a in arrays.values())


def without_gaps(arrays: Mapping[str, Any]) -> Arrays:
    """What of arrays with gaps (NaN) travels: the numbers that are there, and one bit an entry that says which."""
    found: Arrays = {}
    for name, array in arrays.items():
        there = ~array.isnan()
        found[name] = array[there]
        found[f"{name} bits"] = there.new_zeros(-(-array.numel() // 8), dtype=torch.uint8)
    return found


def nfloats(arrays: Mapping[str, Any]) -> int:
    """Elements of those of named tensors that are floating point, whatever their precision."""
    return sum(a.numel() for a in arrays.values() if a.is_floating_point())


@dataclass(frozen=True)
class Group:
    """Arrays that are sent together.

    Attributes:
        name: for example ``model`` or ``fedewc``.
        scope: names what a client has to hold to need no second copy, for example ``task:3``.
    """

    name: str
    scope: str
    arrays: Arrays


@dataclass(frozen=True)
class Holders:
    """Who held a group at one moment, noted without copying: a round must not cost more the longer the run is.

    Attributes:
        scope: of the group.
        clients: all holders within the scope in the order they came; later ones are added to it.
        count: how many of them there were.
    """

    scope: str
    clients: Mapping[int, None]
    count: int

    def written(self) -> list[Any]:
        """JSON form: the scope and the clients, ascending."""
        return [self.scope, sorted(islice(self.clients, self.count))]


def written(state: Mapping[str, Any]) -> dict[str, Any]:
    """JSON form of :meth:`ByteMeter.state`, for a checkpoint."""
    held = {n: h.written() if isinstance(h, Holders) else h for n, h in state["held"].items()}
    return {**state, "held": held}


@dataclass
class ByteMeter:
    """Counts both directions and remembers who holds what.

    Attributes:
        up, down: bytes since the start of the run.
        floats_up, floats_down: the floating point numbers among them.
        asked: seconds that clients spent in exchanges of strategies.
    """

    up: int = 0
    down: int = 0
    floats_up: int = 0
    floats_down: int = 0
    asked: float = 0.0
    _held: dict[str, tuple[str, dict[int, None]]] = field(default_factory=dict)

    def charge_down(self, groups: Sequence[Group], clients: Iterable[int]) -> int:
        """Charges a message of ``groups`` to each client; returns the bytes of this call."""
        clients = list(clients)
        before = self.down
        counted: dict[int, set[int]] = {}
        for group in groups:
            scope, holders = self._held.get(group.name, ("", {}))
            if scope != group.scope:
                holders = {}
            fresh = [c for c in clients if c not in holders]
            if fresh:
                owners = [counted.setdefault(id(a), set()) for a in group.arrays.values()]
                for array, seen in zip(group.arrays.values(), owners, strict=True):
                    copies = sum(c not in seen for c in fresh) if seen else len(fresh)
                    self.down += nbytes({"": array}) * copies
                    self.floats_down += nfloats({"": array}) * copies
                    seen.update(fresh)
            holders.update(dict.fromkeys(fresh))
            self._held[group.name] = (group.scope, holders)
        return self.down - before

    def charge_up(self, size: int, floats: int = 0) -> None:
        """Charges an upload of ``size`` bytes with so many floating point numbers."""
        self.up += size
        self.floats_up += floats

    def since(self, before: Mapping[str, Any]) -> dict[str, int]:
        """Bytes and floats in both directions since an earlier :meth:`state`."""
        return {
            "bytes_up": self.up - before["up"],
            "bytes_down": self.down - before["down"],
            "floats_up": self.floats_up - before["floats_up"],
            "floats_down": self.floats_down - before["floats_down"],
        }

    def state(self) -> dict[str, Any]:
        """What was counted so far, as it is now; :func:`written` makes it JSON."""
        held = {name: Holders(scope, clients, len(clients)) for name, (scope, clients) in self._held.items()}
        return {"held": held, **{name: getattr(self, name) for name in COUNTS}}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> ByteMeter:
        """The inverse of :meth:`state`, from it or from its JSON form."""
        held = {name: (scope, dict.fromkeys(clients)) for name, (scope, clients) in written(state)["held"].items()}
        return cls(**{name: state.get(name, 0) for name in COUNTS}, _held=held)
