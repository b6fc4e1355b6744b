"""How arrays of several clients become one: named rules, streaming where the rule is a sum.

A node reduces its own clients to a partial, the server merges the partials of all nodes. Sums accumulate in fixed
client order in float64 (integers in int64), so a cohort of any size costs the memory of one model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import RunFailed
from ..strategy import Arrays, Reduction

RULES: tuple[Reduction, ...] = ("sum", "mean", "weighted_mean", "max", "min", "stack")
_STREAMED = ("sum", "mean", "weighted_mean")


@dataclass
class Entry:
    """One array on its way through a reduction."""

    rule: Reduction
    dtype: torch.dtype
    value: Tensor | None = None
    weight: float = 0.0
    parts: list[Tensor] = field(default_factory=list)


class Reducer:
    """Reduces the arrays of clients by name.

    Args:
        rules: the rule of each name; a name may be given as ``prefix/`` for all names below it.
    """

    def __init__(self, rules: Mapping[str, Reduction]) -> None:
        self._rules = rules
        self._entries: dict[str, Entry] = {}
        self.weights: list[float] = []

    def _rule(self, name: str) -> Reduction:
        rule = self._rules.get(name)
        if rule is None:
            rule = next(
                (r for prefix, r in self._rules.items() if prefix.endswith("/") and name.startswith(prefix)),
                None,
            )
        if rule is None:
            raise RunFailed(f"array {name!r} leaves a client without a declared reduction; declare it in `reductions`")
        if rule not in RULES:
            raise RunFailed(f"array {name!r} has the reduction {rule!r}; allowed are {', '.join(RULES)}")
        return rule

    def add(self, arrays: Arrays, weight: float) -> None:
        """Adds one client's arrays; ``weight`` (above 0) counts for ``weighted_mean`` only."""
        self.weights.append(weight)
        for name, array in arrays.items():
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = Entry(self._rule(name), array.dtype)
            self._fold(name, entry, array, weight if entry.rule == "weighted_mean" else 1.0)

    @staticmethod
    def _fold(name: str, entry: Entry, array: Tensor, weight: float) -> None:
        if array.dtype != entry.dtype:
            raise RunFailed(f"array {name!r} is {array.dtype} at one client, {entry.dtype} at another")
        if entry.rule == "stack":
            _same_shape(name, entry.parts[0] if entry.parts else None, array)
            entry.parts.append(array)
            return
        _same_shape(name, entry.value, array)
        if entry.rule in _STREAMED:
            wide = torch.float64 if array.is_floating_point() or entry.rule != "sum" else torch.int64
            if entry.value is None:
                entry.value = torch.zeros(array.shape, dtype=wide, device=array.device)
            entry.value.add_(array.to(wide), alpha=int(weight) if wide == torch.int64 else weight)
            entry.weight += weight
        else:
            pick = torch.maximum if entry.rule == "max" else torch.minimum
            entry.value = array if entry.value is None else pick(entry.value, array)

    def partial(self) -> tuple[Arrays, dict[str, Any]]:
        """What a node sends on: arrays, and per name the facts to merge and finish them."""
        arrays: Arrays = {}
        facts: dict[str, Any] = {}
        for name, entry in self._entries.items():
            facts[name] = {
                "dtype": str(entry.dtype).removeprefix("torch."),
                "weight": entry.weight,
                "parts": len(entry.parts),
            }
            if entry.rule == "stack":
                arrays.update({f"{name}#{i}": part for i, part in enumerate(entry.parts)})
            elif entry.value is not None:
                arrays[name] = entry.value
        return arrays, {"entries": facts, "weights": self.weights}

    def merge(self, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Adds a node's partial."""
        self.weights.extend(facts["weights"])
        for name, fact in facts["entries"].items():
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = Entry(self._rule(name), getattr(torch, fact["dtype"]))
            if getattr(torch, fact["dtype"]) != entry.dtype:
                raise RunFailed(f"array {name!r} is {fact['dtype']} at one client, {entry.dtype} at another")
            if entry.rule == "stack":
                for i in range(fact["parts"]):
                    self._fold(name, entry, arrays[f"{name}#{i}"], 1.0)
            elif entry.rule in _STREAMED:
                _same_shape(name, entry.value, arrays[name])
                entry.value = arrays[name] if entry.value is None else entry.value + arrays[name]
                entry.weight += fact["weight"]
            else:
                self._fold(name, entry, arrays[name], 1.0)

    def result(self, names: Iterable[str] | None = None) -> Arrays:
        """The reduced arrays (all, or those of ``names``) in the dtype the clients sent; a mean of integers is floored.

        Stacked names give one array with a leading client axis; their shapes must agree.
        """
        out: Arrays = {}
        for name, entry in self._entries.items() if names is None else [(n, self._entries[n]) for n in names]:
            if entry.rule == "stack":
                out[name] = torch.stack(entry.parts)
                continue
            value = entry.value
            if value is None:
                continue
            if entry.rule in ("mean", "weighted_mean"):
                if not entry.weight > 0 or not math.isfinite(entry.weight):
                    continue
                value = value / entry.weight
                value = value if entry.dtype.is_floating_point else value.floor()
            out[name] = value.to(entry.dtype)
        return out

    def names(self) -> list[str]:
        """Names of all arrays that were added."""
        return list(self._entries)

    def stacked(self, name: str) -> list[Tensor]:
        """The single clients' arrays of a name with the rule ``stack``, in client order."""
        return self._entries[name].parts


def _same_shape(name: str, one: Tensor | None, other: Tensor) -> None:
    if one is not None and one.shape != other.shape:
        raise RunFailed(f"array {name!r} has shape {tuple(other.shape)} at one client, {tuple(one.shape)} at another")
