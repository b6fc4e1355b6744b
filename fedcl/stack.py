"""Strategies that run together: who owns which exclusive slot, and what of a step each of them sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .errors import UsageError
from .strategy import Arrays, Step, Strategy

SLOTS = ("task_loss", "phases", "weight", "round", "aggregate", "personal", "newcomer", "predict")
"""Hooks that only one strategy of a stack may implement."""


@dataclass(frozen=True)
class Stack:
    """Strategies that run together, with the owner of each exclusive slot.

    Raises:
        UsageError: two strategies claim the same slot, or one stands twice.
    """

    strategies: tuple[Strategy, ...]
    owners: Mapping[str, Strategy | None]

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> Stack:
        """Resolves the exclusive slots."""
        names = [s.name for s in strategies]
        if len(set(names)) < len(names):
            raise UsageError("strategy", names, "each strategy may stand once in a stack")
        owners: dict[str, Strategy | None] = {}
        for slot in SLOTS:
            claims = [s for s in strategies if claimed(s, slot)]
            firm = [s for s in claims if slot not in s.yields]
            if len(firm) > 1:
                both = " and ".join(s.name for s in firm)
                raise UsageError("strategy", names, f"{both} both define {slot}; only one of a stack may")
            owners[slot] = next(iter(firm or claims), None)
        return cls(tuple(strategies), owners)

    @property
    def learns(self) -> bool:
        """Whether a strategy learns from images without labels, so that a client can train on these."""
        return any(s.unlabelled == "learns" for s in self.strategies)

    def having(self, hook: str) -> tuple[Strategy, ...]:
        """The strategies that define a hook themselves, in the order of the stack."""
        return tuple(s for s in self.strategies if getattr(type(s), hook) is not getattr(Strategy, hook))

    def __iter__(self) -> Iterator[Strategy]:
        return iter(self.strategies)


def claimed(strategy: Strategy, slot: str) -> bool:
    """Whether a strategy fills an exclusive slot: by a hook, or by how clients' models are to be joined."""
    defined = getattr(type(strategy), slot) is not getattr(Strategy, slot)
    return defined or (slot == "aggregate" and strategy.model_reduction not in ("weighted_mean", "stack"))


class Holder(Protocol):
    """What a client has of each strategy, by its name."""

    @property
    def down(self) -> Mapping[str, Arrays]: ...

    @property
    def state(self) -> Mapping[str, Arrays]: ...

    @property
    def carried(self) -> Mapping[str, Arrays]: ...


def narrowed(step: Step, strategy: Strategy, client: Holder) -> Step:
    """The same step with the arrays and the state of one strategy; the forward pass stays shared."""
    name = strategy.name
    down, state, carried = client.down.get(name, {}), client.state.get(name, {}), client.carried.get(name, {})
    return replace(step, down=down, state=state, carried=carried, strategy=name)


def seen_by(step: Step, strategy: Strategy, client: Holder) -> Step | None:
    """As :func:`narrowed`, without images that have no label where the strategy ignores them; None without any other.

    The strategy's own :attr:`Strategy.unlabelled` decides, so that none meets the label -1 unprepared.
    """
    if strategy.unlabelled == "ignores":
        step = step.labelled()
        if not len(step.y):
            return None
    return narrowed(step, strategy, client)
