"""What a number of ``summary.json`` is: its unit, which direction is better, how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..tell.progress import size

Unit = Literal["points", "bytes", "seconds", ""]

DEFAULT = ("average_accuracy", "average_incremental_accuracy", "forgetting")


@dataclass(frozen=True)
class Metric:
    """A metric by its dotted key in ``summary.json``.

    Attributes:
        key: for example ``average_accuracy`` or ``personal.average_accuracy.worst_decile``.
        unit: ``points`` are shares in [-1, 1] that are shown in percent.
        better: None where neither direction is.
    """

    key: str
    unit: Unit
    better: Literal["higher", "lower"] | None

    @property
    def title(self) -> str:
        """For a heading, with the unit of :meth:`number`.

        >>> metric_of("average_accuracy").title, metric_of("wall_seconds").title
        ('average accuracy (%)', 'wall seconds (s)')
        """
        units = {"points": " (%)", "bytes": "", "seconds": " (s)", "": ""}
        return self.key.replace("_", " ").replace(".", ", ") + units[self.unit]

    def number(self, value: float | None) -> str:
        """A value without its unit, where the heading has it; "-" for None.

        >>> metric_of("forgetting").number(0.4302), metric_of("bytes_up").number(29_466_800.0)
        ('43.0', '29.5 MB')
        """
        if value is None:
            return "-"
        if self.unit == "points":
            return _short(100 * value, 1)
        if self.unit == "bytes":
            return ("-" if value < 0 else "") + size(round(abs(value)))
        return _short(value, 2) if self.unit == "seconds" else f"{value:.4g}"

    def amount(self, value: float) -> str:
        """A difference with its unit.

        >>> metric_of("forgetting").amount(0.031), metric_of("wall_seconds").amount(1.5)
        ('3.1 points', '1.50 s')
        """
        units = {"points": " points", "bytes": "", "seconds": " s", "": ""}
        return self.number(value) + units[self.unit]


def metric_of(key: str) -> Metric:
    """What a key stands for, told from its name.

    >>> metric_of("bytes_up").better, metric_of("probes.spectrum.rank").better
    ('lower', None)
    """
    last = key.rpartition(".")[2]
    if last in ("std", "clients", "undefined"):
        return Metric(key, "", None)
    if "bytes" in last:
        return Metric(key, "bytes", "lower")
    if "seconds" in last:
        return Metric(key, "seconds", "lower")
    if "forgetting" in key or last == "performance_drop":
        return Metric(key, "points", "lower")
    if "accuracy" in key or last in ("backward_transfer", "forward_transfer", "stability", "stability_plasticity"):
        return Metric(key, "points", "higher")
    return Metric(key, "", None)


def numbers_in(summary: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a summary that hold a number.

    >>> list(numbers_in({"a": 1.5, "b": {"c": 2}, "d": "x", "e": True}))
    ['a', 'b.c']
    """
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name


def _short(value: float, decimals: int) -> str:
    # A small number must not read as none at all.
    small = 0 < abs(value) < 0.5 * 10.0**-decimals
    text = f"{value:.2g}" if small else f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text
