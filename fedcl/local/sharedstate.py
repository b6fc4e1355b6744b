"""A strategy's client state inside a stack of clients, which need not all have one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from ..errors import RunFailed


class CannotStack(RunFailed):
    """What a strategy asks for differs between the clients of a stack; one by one they can be trained."""


class SharedState(dict[str, Tensor]):
    """A strategy's client state inside a stack.

    Args:
        unlike: names of arrays that some clients do not have, or have in another shape. They cannot be stacked, and
            to leave them out in silence would be wrong for those who have them: asking for one is an error.
    """

    def __init__(self, unlike: Collection[str]) -> None:
        super().__init__()
        self.unlike = unlike

    def refuse(self, name: str) -> None:
        """Raises :class:`CannotStack` if ``name`` cannot be told."""
        if name in self.unlike:
            raise CannotStack(f"the client state {name!r} is missing, or of another shape, at some clients of a stack")

    def __missing__(self, name: str) -> Tensor:
        self.refuse(name)
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.refuse(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.refuse(str(name))
        return super().__contains__(name)

    def __len__(self) -> int:
        self.refuse(next(iter(self.unlike), ""))
        return super().__len__()

    def __iter__(self) -> Iterator[str]:
        len(self)
        return super().__iter__()

    def keys(self) -> Any:
        len(self)
        return super().keys()

    def values(self) -> Any:
        len(self)
        return super().values()

    def items(self) -> Any:
        len(self)
        return super().items()
