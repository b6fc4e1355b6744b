"""What a page is made of: tables, charts to choose from, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..metrics.matrix import FloatArray

UNDEFINED = "–"
THIN, SPACE = "\N{NARROW NO-BREAK SPACE}", "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Column:
    """A column: its heading with the unit, and whether it holds numbers."""

    title: str
    kind: Literal["text", "number"] = "number"


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: what is shown.
        value: what it is sorted by; None where it is undefined, which is always last.
        tint: shade behind it, in [0, 1].
        picks: name of a chooser and position in it, for a cell that chooses it.
    """

    text: str
    value: float | str | None
    tint: float | None = None
    picks: tuple[str, int] | None = None


@dataclass(frozen=True)
class Interval:
    """A mean and its interval as places in [0, 100] on the scale of its table; None where undefined."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Table:
    """A table that can be sorted.

    Attributes:
        name: unique in the page; letters and dashes.
        caption: what it holds.
        columns: the first one heads the rows.
        rows: a cell a column.
        note: what is not in it, and where that is.
        intervals: drawn beside the rows where given, one a row.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    intervals: tuple[Interval, ...] = ()

    def cut(self, most: int, rest: str) -> Table:
        """The first ``most`` rows, with a note that says so and where the ``rest`` is."""
        if len(self.rows) <= most:
            return self
        note = f"The first {most:,} of {len(self.rows):,} rows; all are in {rest}.".replace(",", THIN)
        return Table(self.name, self.caption, self.columns, self.rows[:most], note)


@dataclass(frozen=True)
class Chooser:
    """A chart and a table over tasks of one thing among many, drawn in the browser.

    Attributes:
        name: unique in the page.
        noun: of what is chosen, "class".
        heading: of its section.
        items: their names.
        lines: label -> accuracy (items, T) in [0, 1], NaN where undefined.
        band: whether mean and range of all items are drawn behind.
        note: what is not in it, or how it was averaged.
    """

    name: str
    noun: str
    heading: str
    items: tuple[str, ...]
    lines: dict[str, FloatArray]
    band: bool
    note: str = ""
    tasks: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", max(table.shape[1] for table in self.lines.values()))

    def data(self, most: int) -> dict[str, Any]:
        """For the script: plain lists of percent, null where undefined; at most so many items."""
        found: dict[str, Any] = {
            "noun": self.noun,
            "items": self.items[:most],
            "tasks": self.tasks,
            "lines": [
                {"label": label, "values": [_percents(row) for row in table[:most]]}
                for label, table in self.lines.items()
            ],
            "band": None,
        }
        if self.band and len(self.items) > 1:
            (table,) = self.lines.values()
            columns = [column[~np.isnan(column)] for column in table.T]
            found["band"] = {
                how: _percents(np.array([reduce(c) if len(c) else np.nan for c in columns]))
                for how, reduce in (("mean", np.mean), ("low", np.min), ("high", np.max))
            }
        return found


def number(value: float | None, decimals: int = 1) -> Cell:
    """A cell with a number."""
    if value is None or not math.isfinite(value):
        return Cell(UNDEFINED, None)
    text = f"{value:,.{decimals}f}".replace(",", THIN)
    return Cell(text.removeprefix("-") if float(f"{value:.{decimals}f}") == 0 else text, value)


def percent(value: float | None, tint: bool = False) -> Cell:
    """A cell with a share in percent."""
    if value is None or not math.isfinite(value):
        return Cell(UNDEFINED, None)
    cell = number(100 * value)
    return Cell(cell.text, cell.value, min(1.0, max(0.0, value)) if tint else None)


def count(value: float | None) -> Cell:
    """A cell with a whole number."""
    return number(value, 0)


def words(text: object) -> Cell:
    """A cell with text."""
    return Cell(str(text), str(text))


def numbers(titles: Iterable[str]) -> tuple[Column, ...]:
    """Columns of numbers."""
    return tuple(Column(title) for title in titles)


def _percents(row: Sequence[float] | FloatArray) -> list[float | None]:
    return [round(100 * float(value), 2) if math.isfinite(value) else None for value in row]
