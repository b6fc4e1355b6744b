"""A comparison as text: for a terminal, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping

from ..records.files import to_json
from .metric import Metric
from .results import Comparison, Estimate, Pair
from .words import p_text


def terminal(comparison: Comparison, width: int = 120) -> str:
    """Tables and sentences of at most ``width`` columns; long names are folded."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    for metric in comparison.metrics:
        table = Table(box=SIMPLE_HEAD, title=metric.title + _direction(metric), title_justify="left", pad_edge=False)
        table.add_column("method", overflow="fold")
        for column in _columns(comparison):
            table.add_column(column, justify="right")
        for label, cells in _rows(comparison, metric):
            table.add_row(Text(label), *(Text(cell) for cell in cells))
        console.print(table)
        for pair in comparison.pairs_of(metric.key):
            console.print(Text(pair.words), soft_wrap=True)
        console.print()
    for line in remarks(comparison):
        console.print(Text(line), soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def markdown(comparison: Comparison) -> str:
    """A table and a list of sentences for each metric; names are escaped."""
    lines: list[str] = []
    for metric in comparison.metrics:
        columns = ["method", *_columns(comparison)]
        lines += [f"**{_marked(metric.title + _direction(metric))}**", ""]
        lines += [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
        lines += [f"| {' | '.join(map(_marked, [label, *cells]))} |" for label, cells in _rows(comparison, metric)]
        lines += ["", *(f"- {_marked(pair.words)}" for pair in comparison.pairs_of(metric.key)), ""]
    lines += [f"- {_marked(line)}" for line in remarks(comparison)]
    return "\n".join(lines).strip("\n")


def latex(comparison: Comparison) -> str:
    """Two tables for the package booktabs: methods by metrics (mean and deviation), and the pairs."""
    heads = " & ".join(_tex(metric.title) for metric in comparison.metrics)
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{lr{'r' * len(comparison.metrics)}}}",
        "\\toprule",
        f"Method & $n$ & {heads} \\\\",
        "\\midrule",
    ]
    for method in comparison.methods:
        cells = [_tex_cell(metric, comparison.estimates[metric.key][method.label], len(method.seeds))
                 for metric in comparison.metrics]  # fmt: skip
        lines.append(f"{_tex(method.label)} & {len(method.seeds)} & {' & '.join(cells)} \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    if comparison.pairs:
        lines += ["", "\\begin{tabular}{lllrrrr}", "\\toprule",
                  "Metric & Method & Against & Difference & "
                  f"{100 * comparison.level:g}\\,\\% interval & $n$ & Holm $p$ \\\\", "\\midrule"]  # fmt: skip
        units = {metric.key: metric for metric in comparison.metrics}
        lines += [_tex_pair(units[pair.metric], pair) for pair in comparison.pairs]
        lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, *(f"% {line}" for line in remarks(comparison))])


COLUMNS = (
    "kind", "metric", "method", "against", "n", "mean", "deviation", "low", "high", "bootstrap_low", "bootstrap_high",
    "rank", "p", "holm_p", "verdict",
)  # fmt: skip


def as_csv(comparison: Comparison) -> str:
    """One row a method and metric (kind ``method``), then one a pair (kind ``pair``); plain numbers, empty = none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for metric in comparison.metrics:
        for method in comparison.methods:
            e = comparison.estimates[metric.key][method.label]
            writer.writerow(["method", metric.key, method.label, None, e.n, e.mean, e.deviation, e.low, e.high,
                             e.bootstrap_low, e.bootstrap_high, e.rank, None, None, None])  # fmt: skip
    for pair in comparison.pairs:
        writer.writerow(["pair", pair.metric, pair.first, pair.other, len(pair.seeds), pair.mean, None, pair.low,
                         pair.high, pair.bootstrap_low, pair.bootstrap_high, None, pair.p, pair.holm_p,
                         pair.verdict])  # fmt: skip
    return text.getvalue().rstrip("\n")


def as_json(comparison: Comparison) -> str:
    """One object, see :meth:`fedcl.compare.results.Comparison.as_object`."""
    return to_json(comparison.as_object(), indent=2)


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "terminal": terminal, "markdown": markdown, "latex": latex, "csv": as_csv, "json": as_json,
}  # fmt: skip
SUFFIXES = {".txt": "terminal", ".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know, and the folders that were left out, one line each."""
    notes = [f"note: {note}" for note in comparison.notes]
    notes += [f"left out: {run.folder}: {run.why}" for run in comparison.left_out]
    return [" ".join(note.split()) for note in notes]


def _columns(comparison: Comparison) -> list[str]:
    share = f"{100 * comparison.level:g} %"
    return ["seeds", "mean", "sd", f"{share} t", f"{share} bootstrap", "rank"]


def _rows(comparison: Comparison, metric: Metric) -> Iterator[tuple[str, list[str]]]:
    for method in comparison.methods:
        e = comparison.estimates[metric.key][method.label]
        rank = "-" if e.rank is None else f"{e.rank:.2f}"
        yield method.label, [str(e.n), metric.number(e.mean), metric.number(e.deviation),
                             _interval(metric, e.low, e.high), _interval(metric, e.bootstrap_low, e.bootstrap_high),
                             rank]  # fmt: skip


def _interval(metric: Metric, low: float | None, high: float | None) -> str:
    return "-" if low is None else f"{metric.number(low)} to {metric.number(high)}"


def _direction(metric: Metric) -> str:
    return f", {metric.better} is better" if metric.better else ""


def _marked(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", " ".join(text.split()))


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "<": r"\textless{}",
    ">": r"\textgreater{}", '"': r"\textquotedbl{}",
    # After the end of a row these would be its optional argument and its star.
    "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def _tex_cell(metric: Metric, estimate: Estimate, seeds: int) -> str:
    if estimate.mean is None:
        return "--"
    spread = "" if estimate.deviation is None else f" $\\pm$ {_tex_number(metric, estimate.deviation)}"
    fewer = f" ($n={estimate.n}$)" if estimate.n != seeds else ""
    return f"{_tex_number(metric, estimate.mean)}{spread}{fewer}"


def _tex_number(metric: Metric, value: float) -> str:
    text = metric.number(value)
    return f"$-${text[1:]}" if text.startswith("-") else text


def _tex_pair(metric: Metric, pair: Pair) -> str:
    gap = "--" if pair.mean is None else _tex_number(metric, pair.mean)
    around = "--"
    if pair.low is not None and pair.high is not None:
        around = f"[{_tex_number(metric, pair.low)}, {_tex_number(metric, pair.high)}]"
    p = "identical" if pair.verdict == "identical" else "--" if pair.holm_p is None else _tex_p(pair.holm_p)
    cells = [_tex(metric.title), _tex(pair.first), _tex(pair.other), gap, around, str(len(pair.seeds)), p]
    return f"{' & '.join(cells)} \\\\"


def _tex_p(p: float) -> str:
    return f"${p_text(p).removeprefix('= ')}$"
