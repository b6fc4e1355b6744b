"""The texts in the table of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def label(entry: dict[str, Any]) -> str:
    """The first cell of a class: its id, and its name where it has one."""
    name = str(entry["name"])
    short = name if len(name) <= 20 else name[:19] + "…"
    return short if name == str(entry["class"]) else f"{entry['class']} {short}"


def own_tasks(own: Sequence[int | None], shown: int) -> list[str]:
    """The number of each client's own task, from 1; a dash for whoever is absent."""
    cells = ["-" if task is None else str(task + 1) for task in own[:shown]]
    return [*cells, *([""] if len(own) > shown else []), ""]


def cells(values: Sequence[int], shown: int, labelled: Sequence[int] | None = None) -> list[str]:
    """The first numbers, the sum of the others if there are some, and of all; apart by label where some have none."""
    known = values if labelled is None else labelled
    parts = [(known[i : i + 1], values[i : i + 1]) for i in range(min(shown, len(values)))]
    parts += [(known[shown:], values[shown:])] if len(values) > shown else []
    pairs = [(sum(own), sum(held)) for own, held in (*parts, (known, values))]
    texts = [str(held) if labelled is None else f"{own}+{held - own}" for own, held in pairs]
    return [
        text if held or place >= shown else "."
        for place, (text, (_, held)) in enumerate(zip(texts, pairs, strict=True))
    ]


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines whose columns stand below one another, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
