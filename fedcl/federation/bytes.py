"""What travels, in bytes: elements times item size of the declared arrays, the same on every runtime.

A broadcast is charged once per client within its scope. Sample ids and other facts that only a simulation sends
are not charged. An array that stands twice in one message (the previous model equals the broadcast one at the start
of a task) is charged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..strategy import Arrays


def nbytes(arrays: Mapping[str, Any]) -> int:
    """Bytes of named tensors."""
    return sum(a.numel() * a.element_size() for a in arrays.values())


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


@dataclass
class ByteMeter:
    """Counts both directions and remembers who holds what.

    Attributes:
        up, down: bytes since the start of the run.
    """

    up: int = 0
    down: int = 0
    _held: dict[str, tuple[str, set[int]]] = field(default_factory=dict)

    def charge_down(self, groups: Sequence[Group], clients: Iterable[int]) -> int:
        """Charges a message of ``groups`` to each client; returns the bytes of this call."""
        clients = list(clients)
        before = self.down
        counted: dict[int, set[int]] = {}
        for group in groups:
            scope, holders = self._held.get(group.name, ("", set()))
            if scope != group.scope:
                holders = set()
            fresh = [c for c in clients if c not in holders]
            if fresh:
                owners = [counted.setdefault(id(a), set()) for a in group.arrays.values()]
                for array, seen in zip(group.arrays.values(), owners, strict=True):
                    size = array.numel() * array.element_size()
                    self.down += size * sum(c not in seen for c in fresh) if seen else size * len(fresh)
                    seen.update(fresh)
            self._held[group.name] = (group.scope, holders | set(fresh))
        return self.down - before

    def charge_up(self, size: int) -> None:
        """Charges an upload of ``size`` bytes."""
        self.up += size

    def state(self) -> dict[str, Any]:
        """JSON form for a checkpoint."""
        held = {name: [scope, sorted(clients)] for name, (scope, clients) in self._held.items()}
        return {"up": self.up, "down": self.down, "held": held}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> ByteMeter:
        """The inverse of :meth:`state`."""
        held = {name: (scope, set(clients)) for name, (scope, clients) in state["held"].items()}
        return cls(state["up"], state["down"], held)
