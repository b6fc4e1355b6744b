"""Strategies that run together: who owns which exclusive slot, and what of a step each of them sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import UsageError
from .strategy import Arrays, Step, Strategy

SLOTS = ("task_loss", "aggregate", "predict")
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
            claims = [s for s in strategies if getattr(type(s), slot) is not getattr(Strategy, slot)]
            firm = [s for s in claims if slot not in s.yields]
            if len(firm) > 1:
                both = " and ".join(s.name for s in firm)
                raise UsageError("strategy", names, f"{both} both define {slot}; only one of a stack may")
            owners[slot] = next(iter(firm or claims), None)
        return cls(tuple(strategies), owners)

    def owns(self, strategy: Strategy, slot: str) -> bool:
        """Whether ``strategy`` fills ``slot`` in this stack."""
        return self.owners[slot] is strategy

    @property
    def learns(self) -> bool:
        """Whether a strategy learns from images without labels, so that a client can train on these."""
        return any(s.unlabelled == "learns" for s in self.strategies)

    def __iter__(self) -> Iterator[Strategy]:
        return iter(self.strategies)


def narrowed(step: Step, strategy: Strategy, down: Mapping[str, Arrays], state: Mapping[str, Arrays]) -> Step:
    """The same step with the arrays and the state of one strategy; the forward pass stays shared."""
    return replace(step, down=down.get(strategy.name, {}), state=state.get(strategy.name, {}))


def seen_by(step: Step, strategy: Strategy, down: Mapping[str, Arrays], state: Mapping[str, Arrays]) -> Step | None:
    """As :func:`narrowed`, without images that have no label where the strategy ignores them; None without any other.

    The strategy's own :attr:`Strategy.unlabelled` decides, so that none meets the label -1 unprepared.
    """
    if strategy.unlabelled == "ignores":
        step = step.labelled()
        if not len(step.y):
            return None
    return narrowed(step, strategy, down, state)
