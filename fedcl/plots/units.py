"""Axes of bytes and seconds in units that people read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.matrix import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
TIMES = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))
WIDE = 10.0
"""From this ratio of the largest to the smallest value on, an axis is logarithmic."""


def unit_of(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit (powers of 1000) for values up to ``largest`` bytes.

    >>> unit_of(2_500_000), unit_of(0)
    ((1000000.0, 'MB'), (1.0, 'bytes'))
    """
    return next((pair for pair in UNITS if largest >= pair[0]), UNITS[-1])


def byte_axis(axes: Axes, values: FloatArray, label: str, ticks: Sequence[float] | FloatArray = ()) -> None:
    """Makes x an axis of bytes: its unit in the label, logarithmic for a wide range.

    Args:
        values: all that is drawn, in bytes.
        ticks: values to be marked, where there are few of them.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    largest = float(values.max()) if len(values) else 0.0
    divisor, unit = unit_of(largest)
    smallest = float(values.min()) if len(values) else 0.0
    logarithmic = smallest > 0 and largest / smallest >= WIDE

    def text(value: float, _: Any) -> str:
        return f"{value / divisor:.4g}"

    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if largest / smallest < 100 else (1.0,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.05 * largest if largest else 1.0)
    if 0 < len(ticks) <= 6:
        axes.xaxis.set_major_locator(FixedLocator(np.asarray(ticks).tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(text))
    axes.set_xlabel(f"{label} ({unit})")


def time_unit(longest: float) -> tuple[float, str]:
    """Divisor and name of the unit for times up to ``longest`` seconds.

    >>> time_unit(119), time_unit(7300)
    ((1.0, 's'), (3600.0, 'h'))
    """
    return next((divisor, name) for least, divisor, name in TIMES if longest >= least)


def time_axis(axes: Axes, label: str) -> None:
    """Makes x, which is in seconds and linear, an axis in the unit that fits it."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    longest = axes.get_xlim()[1]
    divisor, unit = time_unit(longest)
    steps = (factor * 10.0**power for power in range(-6, 9) for factor in (1, 2, 5))
    axes.xaxis.set_major_locator(MultipleLocator(next(s for s in steps if longest / divisor / s <= 4.5) * divisor))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:.4g}"))
    axes.set_xlabel(f"{label} ({unit})")
