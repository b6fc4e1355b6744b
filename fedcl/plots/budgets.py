"""What accuracy costs: in bytes sent, and in bytes of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compare.groups import shown
from ..errors import RunFailed, UsageError
from ..metrics.matrix import FloatArray
from ..records.runs import Run
from .curves import band, percent_axis, with_gaps
from .methods import Method, describe, over_seeds, seen_accuracy, spread, told
from .style import COLOURS, COLUMN, INK, add_legend, line_look, new_figure
from .units import byte_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drawing import Options


def bytes_figure(methods: Sequence[Method], options: Options) -> Figure:
    """Accuracy on seen tasks against bytes sent so far, up and down, of all clients; a marker ends each task.

    The last marker is the final accuracy against everything sent. What sends nothing (a centralised bound) is a level
    line at its final accuracy.

    Raises:
        RunFailed: a run is too old to say how many bytes each task took.
    """
    curves = [100 * over_seeds(method, seen_accuracy, "number of tasks") for method in methods]
    sent = [over_seeds(method, _sent, "number of tasks") for method in methods]
    labels = [
        f"{name} (sends nothing)" if np.isnan(table).all() else name
        for name, table in zip(with_gaps(told(methods), curves), sent, strict=True)
    ]
    with new_figure(COLUMN, 2.35, describe(methods, options.title), labels) as figure:
        axes = figure.subplots()
        handles: list[Any] = []
        for index, (curve, table) in enumerate(zip(curves, sent, strict=True)):
            mean, half = curve.mean(axis=0), spread(curve)
            if np.isnan(table).all():
                handles.append(_level(axes, mean[-1], half[-1], index))
                continue
            places = table.mean(axis=0)
            handles += axes.plot(places, mean, **line_look(index), ms=3.5, zorder=3)
            if len(curve) > 1:
                band(axes, places, mean, half, index)
            axes.plot(places[-1], mean[-1], ls="", **_only_marker(index), ms=7, mec="black", mew=0.8, zorder=4)
        percent_axis(axes)
        defined = np.concatenate([table[~np.isnan(table)] for table in sent])
        byte_axis(axes, defined, "Sent so far, up and down")
        axes.set_ylabel("Accuracy on seen tasks (%)")
        add_legend(figure, handles, labels)
    return figure


def memory_figure(methods: Sequence[Method], options: Options) -> Figure:
    """Final average accuracy against the memory budget of a client, one line a stack, whiskers of one s.d. over seeds.

    The budget is the option in bytes of a strategy of the stack, or ``options.key``: a setting, or a number of
    ``summary.json`` (``costs.exemplar_bytes.clients`` is what clients really hold). Methods without it are level lines.

    Raises:
        UsageError: no run has such a number, or a stack has two budgets and none was chosen.
    """
    finals = [100 * over_seeds(m, lambda run: [run.metric("average_accuracy")], "summaries")[:, 0] for m in methods]
    places = [_budget(method, options.key) for method in methods]
    if all(place is None for place in places):
        allowed = "is a number in none of these runs; a memory budget is for example options.replay.budget"
        raise UsageError("--key", options.key or "options.STRATEGY.budget", allowed)
    stacks: dict[str, list[tuple[float, FloatArray]]] = {}
    flat = []
    for method, place, final in zip(methods, places, finals, strict=True):
        if place is None:
            flat.append((method.label, final))
        else:
            stacks.setdefault(_apart_from_budget(method, options.key), []).append((place, final))
    labels = [*stacks, *(f"{name} (no such memory)" for name, _ in flat)]
    with new_figure(COLUMN, 2.35, describe(methods, options.title), labels) as figure:
        axes = figure.subplots()
        handles: list[Any] = []
        for index, points in enumerate(stacks.values()):
            points.sort(key=lambda point: point[0])
            budgets = [place for place, _ in points]
            mean = [float(final.mean()) for _, final in points]
            half = [_deviation(final) for _, final in points]
            if any(half):
                axes.errorbar(budgets, mean, yerr=half, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
            handles += axes.plot(budgets, mean, **line_look(index), ms=5, zorder=3)
        for index, (_, final) in enumerate(flat, start=len(stacks)):
            handles.append(_level(axes, float(final.mean()), _deviation(final), index))
        percent_axis(axes)
        drawn = np.unique([place for place in places if place is not None])
        if not options.key or "budget" in options.key:
            byte_axis(axes, drawn, "Memory budget of a client", drawn)
        elif "bytes" in options.key:
            byte_axis(axes, drawn, options.key, drawn)
        else:
            axes.set_xlabel(options.key)
        axes.set_ylabel("Final average accuracy (%)")
        add_legend(figure, handles, labels)
    return figure


def _budget(method: Method, key: str) -> float | None:
    """The place of a method on the axis: mean over its seeds; None where a run has no such number."""
    found = []
    for run in method.runs.values():
        name = key or budget_key(run)
        value = setting(run, name) if name else None
        if value is None and name:
            value = run.metric(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        found.append(float(value))
    return sum(found) / len(found)


def _apart_from_budget(method: Method, key: str) -> str:
    """The label of a method without its place on the axis."""
    run = next(iter(method.runs.values()))
    hidden = key or budget_key(run)
    others = [f"{name.rpartition('.')[2]}={shown(value)}" for name, value in method.settings.items() if name != hidden]
    return f"{run.label} ({', '.join(others)})" if others else run.label


def _deviation(values: FloatArray) -> float:
    return float(spread(values[:, None])[0])


def budget_key(run: Run) -> str:
    """The dotted name of the option in bytes of the run's stack; "" if there is none.

    Raises:
        UsageError: there are two.
    """
    found = []
    for name in run.strategy:
        units = _units(name)
        found += [f"options.{name}.{option}" for option, unit in units.items() if unit == "bytes"]
        if not units:  # a plugin that is not loaded: what the run was given is all that is known
            found += [key for key in run.settings if key == f"options.{name}.budget"]
    if len(found) > 1:
        raise UsageError("--key", "", f"{run.label} has {' and '.join(found)}; choose one", found)
    return found[0] if found else ""


def setting(run: Run, key: str) -> float | None:
    """The number that a setting has in a run, the option's default where it was not given; None if there is none."""
    value = run.settings.get(key)
    if value is None and key.startswith("options.") and key.split(".")[1] in run.strategy:
        _, name, option = key.split(".", 2)
        value = _defaults(name).get(option)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _options_class(name: str) -> Any:
    from .. import registry

    try:
        return registry.load("strategies", name).Options
    except UsageError:
        return None


def _units(name: str) -> dict[str, str]:
    import dataclasses

    cls = _options_class(name)
    return {f.name: str(f.metadata.get("unit", "")) for f in dataclasses.fields(cls)} if cls is not None else {}


def _defaults(name: str) -> dict[str, Any]:
    from ..cards import options_of

    return {row.name: row.default for row in options_of(_options_class(name))}


def _sent(run: Run) -> FloatArray:
    """(T,) bytes up and down until the end of each task; NaN for a run that sends nothing."""
    if run.summary.get("bytes_up") is None:
        return np.full(run.num_tasks, np.nan)
    tasks = run.summary.get("bytes_per_task")
    if not tasks:
        raise RunFailed(f"{run.folder} has no bytes_per_task in its summary: it is from an older version")
    if len(tasks) != run.num_tasks:
        raise RunFailed(f"{run.folder}: the bytes of {len(tasks)} stages are not those of {run.num_tasks} tasks")
    return np.cumsum(np.array(tasks, dtype=np.float64).sum(axis=1))


def _only_marker(index: int) -> dict[str, Any]:
    look = line_look(index)
    return {"color": look["color"], "marker": look["marker"]}


def _level(axes: Axes, height: float, half: float, index: int) -> Any:
    look = line_look(index)
    colour = COLOURS[index % len(COLOURS)]
    if half > 0:
        axes.axhspan(height - half, height + half, color=colour, alpha=0.12, lw=0)
    return axes.axhline(height, color=colour, ls=look["ls"], lw=1.2)
