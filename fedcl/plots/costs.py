"""What runs cost: bytes and seconds, and what they went into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.matrix import FloatArray
from ..records.runs import Run
from ..tell.progress import size
from .methods import Method, describe, over_seeds, spread, told
from .style import COLOURS, HATCHES, INK, PAGE, TEXT_SIZE, add_legend, new_figure, wrap
from .units import byte_axis, time_axis, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options

TIMES = ("rounds", "ends of tasks", "probes", "saving")
NAMES = 1.55  # inches for the names of the methods


def costs_figure(methods: Sequence[Method], options: Options) -> Figure:
    """Bars a method, means over seeds: bytes up and down of all clients, seconds by what they went into, and FLOPs.

    Seconds are those of the machine of the run. Rounds include their evaluation, ends of tasks the evaluation after the
    task; what a stopped attempt did and a resumed one did again counts once. FLOPs are those of the clients' training
    and are drawn where a run counted them.
    """
    heads = [wrap(name, 72 * NAMES, TEXT_SIZE) for name in told(methods)]
    sent = [over_seeds(m, lambda r: [_metric(r, "bytes_up"), _metric(r, "bytes_down")], "summaries") for m in methods]
    spent = [over_seeds(method, seconds, "events") for method in methods]
    work = [over_seeds(method, lambda run: [_metric(run, "costs.flops")], "summaries") for method in methods]
    counted = not all(np.isnan(table).all() for table in work)
    parts = ["bytes up", "bytes down", *TIMES]
    height = 0.75 + sum(max(0.3, 0.16 * len(head) + 0.06) for head in heads)
    with new_figure(PAGE, height, describe(methods, options.title), parts) as figure:
        panels = figure.subplots(1, 3 if counted else 2, sharey=True)
        handles = _bars(panels[0], sent, lambda value: size(round(value)), COLOURS[:2])
        byte_axis(panels[0], np.array(panels[0].get_xlim()), "Sent")
        handles += _bars(panels[1], spent, _duration, COLOURS[2:6])
        if counted:
            _bars(panels[2], work, _in_words, ["#999999"])
            panels[2].set_xlabel("Training of all clients (FLOPs)")
            panels[2].xaxis.set_major_formatter(lambda value, _: _in_words(value))
        panels[0].set_yticks(range(len(methods)), ["\n".join(head) for head in heads])
        panels[0].set_ylim(len(methods) - 0.45, -0.55)
        for axes in panels:
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.xaxis.get_major_locator().set_params(nbins=4)
        time_axis(panels[1], "Time")
        add_legend(figure, handles, parts)
    return figure


def seconds(run: Run) -> FloatArray:
    """(4,) seconds that a run spent on :data:`TIMES`, from the times between its events.

    The time before the first event of an attempt, when nothing is written down, belongs to none of them.
    """
    spent = dict.fromkeys(TIMES, 0.0)
    before: dict[int, float] = {}
    for event in run.events():
        kind, attempt, now = event["event"], event["attempt"], float(event["time"])
        since = now - before.get(attempt, now)
        if kind in ("costs", "round"):
            spent["rounds"] += since
        elif kind == "probes":
            spent["probes"] += float(event["seconds"])
            spent["ends of tasks"] += max(0.0, since - float(event["seconds"]))
        elif kind == "task":
            spent["ends of tasks"] += since
        elif kind == "checkpoint":
            spent["saving"] += since
        before[attempt] = now
    return np.array([spent[name] for name in TIMES])


def _metric(run: Run, key: str) -> float:
    value = run.metric(key)
    return np.nan if value is None else float(value)


def _duration(value: float) -> str:
    divisor, unit = time_unit(value)
    return f"{value / divisor:.3g} {unit}"


def _in_words(value: float) -> str:
    """A large number with the prefix of its power of 1000.

    >>> _in_words(2.5e9), _in_words(0)
    ('2.5 G', '0')
    """
    power = next((p for p in range(6, 0, -1) if abs(value) >= 1000**p), 0)
    return f"{value / 1000**power:.3g} {' kMGTPE'[power]}".rstrip()


def _bars(axes: Axes, tables: Sequence[FloatArray], words: Callable[[float], str], colours: Sequence[str]) -> list[Any]:
    """Stacked bars of tables (S, parts); the total in words at their ends, with a whisker of one s.d. over seeds.

    Args:
        colours: of the parts.

    Returns:
        A handle for each part.
    """
    from matplotlib.patches import Patch

    looks: list[dict[str, Any]] = [
        {"facecolor": colour, "hatch": hatch} for colour, hatch in zip(colours, HATCHES, strict=False)
    ]
    ends = [float(t.mean(axis=0).sum() + spread(t.sum(axis=1)[:, None])[0]) for t in tables]
    longest = max((end for end in ends if not np.isnan(end)), default=1.0) or 1.0
    for row, table in enumerate(tables):
        if np.isnan(table).any():
            axes.text(0.02 * longest, row, "n/a", va="center")
            continue
        start = 0.0
        for value, look in zip(table.mean(axis=0).tolist(), looks, strict=True):
            axes.barh(row, value, left=start, height=0.6, edgecolor="white", lw=0.4, **look)
            start += value
        if len(table) > 1:
            axes.errorbar(start, row, xerr=ends[row] - start, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
        axes.text(ends[row] + 0.03 * longest, row, words(start), va="center")
    axes.set_xlim(0, 1.4 * longest)
    return [Patch(edgecolor="white", lw=0.4, **look) for look in looks]
