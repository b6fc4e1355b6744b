"""What a benchmark found, for people: tables, bar and line charts, and the JSON beside them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..plots.style import COLOURS, DASHES, MARKERS, new_figure
from ..records.files import to_json, write_atomic
from .measure import CONTESTANTS, NOT_ASKED, OURS, Result
from .workloads import SCALING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"cohort": "Clients in the cohort", "width": "Hidden units of the perceptron"}
"""What ``scaling`` varies."""

LABELS = {
    OURS: "fedcl", "loop": "bare PyTorch loop", "pfl": "pfl", "flower-ray": "Flower Ray",
    "flower-ray-kept": "Flower Ray (kept)",
}  # fmt: skip


def place(folder: Path) -> Path:
    """The folder for the files, made where it is missing.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", str(folder), f"cannot be written: {error.strerror}") from error
    return folder


def write(results: Sequence[Result], name: str, folder: Path) -> list[Path]:
    """Writes ``NAME.json`` (what ``--json`` prints), ``NAME.png`` and ``NAME.svg``; returns their paths.

    Raises:
        RunFailed: a file cannot be written.
    """
    content = to_json(list(results) if name == "all" else results[0], indent=2)
    pictures = scaling_chart(results[0]) if name == SCALING else bar_chart(results)
    paths = []
    for suffix, data in (("json", content.encode() + b"\n"), *pictures.items()):
        paths.append(folder / f"{name}.{suffix}")
        write_atomic(paths[-1], data)
    return paths


def text(results: Sequence[Result]) -> str:
    """All results as tables for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=110, highlight=False)
    for result in results:
        points = [result] if result["workload"] != SCALING else [p for axis in AXES for p in result[axis]]
        for point in points:
            table = Table(box=SIMPLE_HEAD, title=heading(point), title_justify="left")
            table.add_column("")
            for column in ("seconds a round", "lowest to highest", "times fedcl", "first round", "peak memory"):
                table.add_column(column, justify="right")
            for name in CONTESTANTS:
                if point["reasons"].get(name) != NOT_ASKED:
                    table.add_row(LABELS[name], *row(point, name))
            console.print(table)
    console.print(machine_line(results[0]))
    return out.getvalue().rstrip()


def heading(result: Result) -> str:
    """Workload, what is varied, and what it ran on."""
    varied = "".join(f", {axis} {result[axis]}" for axis in AXES if axis in result)
    how = engine_line(result)
    where = f"{result['rounds']} rounds on {result['device'] or 'no device'}" + (f", fedcl: {how}" if how else "")
    return f"{result['workload']}{varied}: median of {where}"


def row(result: Result, name: str) -> list[str]:
    """The cells of one contestant; why there is no number stands in place of the first."""
    seconds = result["seconds"][name]
    if seconds is None:
        return [short(result["reasons"][name]), "", "", "", ""]
    ratio = 1.0 if name == OURS else result["ratio"][name]
    memory = result["peak_memory_mb"][name]
    return [
        f"{result['seconds_per_round'][name]:.3g} s",
        f"{min(seconds):.3g} to {max(seconds):.3g}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{result['first_round'][name]:.3g} s",
        "-" if memory is None else f"{memory:.0f} MB",
    ]


def short(reason: str) -> str:
    """The first words of a reason; standard error has all of it.

    >>> short("not installed: there is no pfl; pip ..."), short("ValueError: x")
    ('not installed', 'failed')
    """
    for known in ("not installed", NOT_ASKED):
        if reason.startswith(known):
            return known
    return "failed"


def machine_line(result: Result) -> str:
    """GPU, processor and versions in one line."""
    machine = result["machine"]
    found = machine["versions"]
    named = ", ".join(f"{name} {found[name]}" for name in ("torch", "flwr", "ray", "pfl") if found[name])
    gpu = f"{machine['gpu']}; " if machine["gpu"] else ""
    return f"{gpu}{machine['cpu']}, {machine['cpus_usable']} processors; {named}"


def engine_line(result: Result) -> str:
    """How fedcl computed, in words; empty where it did not."""
    engine = result["engine"] or {}
    return ", ".join(str(engine[key]) for key in ("path", "dtype", "memory_format") if key in engine)


def bar_chart(results: Sequence[Result]) -> dict[str, bytes]:
    """Seconds a round as bars, one panel a workload, as PNG and SVG.

    A bar is the median, its whisker goes from the lowest to the highest round; who has no number has no bar.
    """
    title = f"Seconds a round on the same work, median of {results[0]['rounds']} rounds. {machine_line(results[0])}"
    with new_figure(6.4 if len(results) == 1 else 3.8 * len(results), 2.7, title, []) as figure:
        panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
        asked = [name for name in CONTESTANTS if any(r["reasons"].get(name) != NOT_ASKED for r in results)]
        for axes, result in zip(panels, results, strict=True):
            _bars(axes, result, asked)
        return _pictures(figure)


def _bars(axes: Axes, result: Result, names: Sequence[str]) -> None:
    found = {name: seconds for name in names if (seconds := result["seconds"][name])}
    longest = max((max(seconds) for seconds in found.values()), default=1.0)
    for position, name in enumerate(names):
        if name not in found:
            axes.text(0.02 * longest, position, short(result["reasons"][name]), va="center")
            continue
        middle, seconds = result["seconds_per_round"][name], found[name]
        colour = COLOURS[list(CONTESTANTS).index(name)]
        axes.barh(position, middle, height=0.62, color=colour, zorder=2)
        whisker = [[middle - min(seconds)], [max(seconds) - middle]]
        axes.errorbar(middle, position, xerr=whisker, fmt="none", ecolor="#333333", elinewidth=1, capsize=2, zorder=3)
        ratio = result["ratio"].get(name)
        label = f"{middle:.3g} s" + (f" ({ratio:.2g}x)" if ratio is not None else "")
        axes.text(max(seconds) + 0.02 * longest, position, label, va="center")
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.45 * longest)  # room for the labels
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("Seconds a round (less is better)")
    axes.set_title(f"{result['workload']}\nfedcl: {engine_line(result) or '-'}", loc="left")


def scaling_chart(result: Result) -> dict[str, bytes]:
    """Seconds a round and peak memory against what was varied, as PNG and SVG; all but memory is logarithmic."""
    shown = [name for name in CONTESTANTS if any(p["seconds"][name] for axis in AXES for p in result[axis])]
    what = f"Cost against cohort and model size, perceptron, median of {result['rounds']} rounds."
    with new_figure(8.6, 5.6, f"{what} {machine_line(result)}", [""]) as figure:
        panels = figure.subplots(2, len(AXES), squeeze=False)
        for column, (axis, name) in enumerate(AXES.items()):
            rows = (("seconds_per_round", "Seconds a round"), ("peak_memory_mb", "Peak memory (MB)"))
            for panel, (key, label) in zip(panels[:, column], rows, strict=True):
                _lines(panel, result[axis], axis, key, shown)
                panel.set_ylabel(label)
            panels[-1, column].set_xlabel(name)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), handlelength=3.2)
        return _pictures(figure)


def _lines(panel: Axes, points: Sequence[Mapping[str, Any]], axis: str, key: str, shown: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name in shown:
        index = list(CONTESTANTS).index(name)
        found = [(p[axis], p[key][name]) for p in points if p[key][name] is not None]
        (line,) = panel.plot([x for x, _ in found], [y for _, y in found], ms=5, lw=1.8, label=LABELS[name])
        line.set(color=COLOURS[index], marker=MARKERS[index], ls=DASHES[index])
    values = [p[axis] for p in points]
    panel.set_xscale("log")
    panel.set_xticks(values, [str(v) for v in values], minor=False)
    panel.set_xticks([], minor=True)
    if key == "peak_memory_mb":
        panel.set_ylim(bottom=0)
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")


def _pictures(figure: Figure) -> dict[str, bytes]:
    import matplotlib

    found = {}
    # Neither date, version nor random ids: the same data gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "fedcl"}):
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            out = io.BytesIO()
            figure.savefig(out, format=suffix, metadata=metadata)
            found[suffix] = out.getvalue()
    return found
