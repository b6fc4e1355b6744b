"""How arrays of several clients become one: named rules, streaming where the rule is a sum.

A node reduces its own clients to a partial, the server merges the partials of all nodes; a cohort of any size costs the
memory of a few models. Sums of floating numbers are kept as an unevaluated pair of float64 (high, low), so that their
rounded value does not depend on how the clients are grouped over nodes; integers are summed in int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import RunFailed
from ..strategy import Arrays, Reduction

RULES: tuple[Reduction, ...] = ("sum", "mean", "weighted_mean", "masked_mean", "max", "min", "stack")
SUMS: tuple[Reduction, ...] = ("sum", "mean", "weighted_mean")
_LOW = "~low"
"""Ends the name of the low part of a sum in a partial."""

_COUNT = "~count"
"""Ends the name of how many clients sent each entry, in a partial."""

_BLOCK = 1 << 16
"""Numbers that are added at once on a CPU: what is in between stays in the cache."""


@dataclass
class Entry:
    """One array on its way through a reduction."""

    rule: Reduction
    dtype: torch.dtype
    value: Tensor | None = None
    low: Tensor | None = None
    counts: Tensor | None = None
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

    def rule(self, name: str) -> Reduction:
        """The declared rule of an array that leaves a client.

        Raises:
            RunFailed: there is none, or it does not exist.
        """
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
                entry = self._entries[name] = Entry(self.rule(name), array.dtype)
            self._fold(name, entry, array, weight if entry.rule == "weighted_mean" else 1.0)

    def add_stack(self, arrays: Arrays, weights: Sequence[float]) -> None:
        """Adds arrays (K, ...) of K clients at once, under rules that are sums; their weights are not recorded.

        Whoever calls it also calls :meth:`add` for each client, with what is not stacked.
        """
        for name, array in arrays.items():
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = Entry(self.rule(name), array.dtype)
            if entry.rule not in SUMS:
                raise RunFailed(f"array {name!r} has the reduction {entry.rule!r}, which is no sum")
            if entry.value is not None and entry.value.shape != array.shape[1:]:
                _same_shape(name, entry.value, array[0])
            factors = weights if entry.rule == "weighted_mean" else [1.0] * len(weights)
            if array.is_floating_point() or entry.rule != "sum":
                _accumulate(entry, weighted_sum(array, factors))
            else:
                total = array.to(torch.int64).sum(0)
                entry.value = total if entry.value is None else entry.value + total
            entry.weight += sum(factors)

    @staticmethod
    def _fold(name: str, entry: Entry, array: Tensor, weight: float) -> None:
        if array.dtype != entry.dtype:
            raise RunFailed(f"array {name!r} is {array.dtype} at one client, {entry.dtype} at another")
        if entry.rule == "stack":
            _same_shape(name, entry.parts[0] if entry.parts else None, array)
            entry.parts.append(array)
            return
        _same_shape(name, entry.value, array)
        if entry.rule == "masked_mean":
            sent = ~torch.isnan(array)
            _accumulate(entry, torch.where(sent, array, 0.0))
            entry.counts = sent.to(torch.int64) if entry.counts is None else entry.counts + sent
        elif entry.rule in SUMS:
            if array.is_floating_point() or entry.rule != "sum":
                _accumulate(entry, array, weight)
            else:
                whole = array.to(torch.int64)
                entry.value = whole if entry.value is None else entry.value + whole
            entry.weight += weight
        else:
            pick = torch.maximum if entry.rule == "max" else torch.minimum
            # A copy: the array may be a row of a whole stack.
            entry.value = array.clone() if entry.value is None else pick(entry.value, array)

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
                if entry.low is not None and bool(entry.low.any()):
                    arrays[name + _LOW] = entry.low
                if entry.counts is not None:
                    arrays[name + _COUNT] = entry.counts
        return arrays, {"entries": facts, "weights": self.weights}

    def merge(self, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Adds a node's partial."""
        self.weights.extend(facts["weights"])
        for name, fact in facts["entries"].items():
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = Entry(self.rule(name), getattr(torch, fact["dtype"]))
            if getattr(torch, fact["dtype"]) != entry.dtype:
                raise RunFailed(f"array {name!r} is {fact['dtype']} at one client, {entry.dtype} at another")
            if entry.rule == "stack":
                for i in range(fact["parts"]):
                    self._fold(name, entry, arrays[f"{name}#{i}"], 1.0)
            elif entry.rule in SUMS or entry.rule == "masked_mean":
                _same_shape(name, entry.value, arrays[name])
                if arrays[name].is_floating_point():
                    _accumulate(entry, arrays[name])
                    if entry.low is not None and name + _LOW in arrays:
                        entry.low += arrays[name + _LOW]
                else:
                    entry.value = arrays[name] if entry.value is None else entry.value + arrays[name]
                if name + _COUNT in arrays:
                    counts = arrays[name + _COUNT]
                    entry.counts = counts if entry.counts is None else entry.counts + counts
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
            value = value if entry.low is None else value + entry.low
            if entry.counts is not None:
                value = value / entry.counts  # 0 / 0, that is NaN, where nobody sent an entry
                value = value if entry.dtype.is_floating_point else value.floor()
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


def _accumulate(entry: Entry, array: Tensor, weight: float = 1.0) -> None:
    """Adds ``weight * array`` to the pair (value, low) without losing a bit of the sum (Knuth's two-sum)."""
    if entry.value is None or entry.low is None:
        entry.value = torch.zeros(array.shape, dtype=torch.float64, device=array.device)
        entry.low = torch.zeros_like(entry.value)
    block = min(_BLOCK, array.numel()) if array.device.type == "cpu" else array.numel()
    scratch = torch.empty(3, block, dtype=torch.float64, device=array.device)
    parts = (torch.split(flat.reshape(-1), max(block, 1)) for flat in (entry.value, entry.low, array))
    for high, low, part in zip(*parts, strict=True):
        added, total, back = scratch[:, : len(part)]
        added.copy_(part).mul_(weight)
        torch.add(high, added, out=total)
        torch.sub(total, high, out=back)
        low.add_(added.sub_(back))
        torch.sub(total, back, out=added)
        low.add_(high.sub_(added))
        high.copy_(total)


def weighted_sum(stacked: Tensor, weights: Sequence[float]) -> Tensor:
    """The sum over the first axis of (K, ...), each row times its weight, in float64.

    >>> weighted_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [1.0, 10.0])
    tensor([31., 42.], dtype=torch.float64)
    """
    if stacked.device.type != "cpu":
        factors = torch.tensor(list(weights), dtype=torch.float64).to(stacked.device)
        return torch.einsum("k,k...->...", factors, stacked.to(torch.float64))
    total = torch.zeros(stacked.shape[1:], dtype=torch.float64)
    for row, weight in zip(stacked.unbind(0), weights, strict=True):
        total.add_(row, alpha=weight)  # converted on the way, without a copy
    return total


def _same_shape(name: str, one: Tensor | None, other: Tensor) -> None:
    if one is not None and one.shape != other.shape:
        raise RunFailed(f"array {name!r} has shape {tuple(other.shape)} at one client, {tuple(one.shape)} at another")
