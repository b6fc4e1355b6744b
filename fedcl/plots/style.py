"""The look shared by all pictures: settings, colours, figure size by text, ticks, legends, atomic saving."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcl.records import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 300  # pixels an inch of every PNG
COLUMN, PAGE = 3.5, 7.0  # inches: a column and a page of a paper in two columns
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "----", "++++")
GREY = "#D9D9D9"
INK = "#444444"
TITLE_SIZE = 9.0  # points
TEXT_SIZE = 8.0  # points
FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""What can be written, with the metadata that is left out: the same data gives the same bytes."""


def style() -> dict[str, Any]:
    """The matplotlib settings shared by all pictures, for ``matplotlib.rc_context``."""
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
        "font.size": TEXT_SIZE,
        "axes.labelsize": TEXT_SIZE,
        "axes.titlesize": TEXT_SIZE,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E5E5E5",
        "grid.linewidth": 0.6,
        "hatch.color": "#7F7F7F",
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": TEXT_SIZE,
        "lines.linewidth": 1.5,
        "savefig.dpi": "figure",
        # Text stays text: it can be searched, and the fonts of a PDF are embedded.
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "svg.hashsalt": "fedcl",
        # Names of runs and files may hold "$".
        "text.parse_math": False,
    }


@contextmanager
def new_figure(width: float, height: float, title: str, labels: Sequence[str]) -> Iterator[Figure]:
    """Figure of ``width`` x ``height`` inches, taller by the lines of the title and of the legend of ``labels``."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style()):
        lines = wrap(title, (width - 0.2) * 72, TITLE_SIZE) if title else []
        rows = legend_rows(labels, width)
        height += (len(lines) * TITLE_SIZE * 1.3 + rows * TEXT_SIZE * 1.5) / 72
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        if lines:
            figure.suptitle("\n".join(lines), x=0.1 / width, ha="left", fontsize=TITLE_SIZE)
        yield figure


def label_lines(label: str, width: float) -> list[str]:
    """Lines of a legend entry in a figure of ``width`` inches."""
    # A leading underscore would hide the entry; the line sample and margins take 60 points.
    return wrap(f" {label}" if label.startswith("_") else label, width * 72 - 60, TEXT_SIZE)


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many legend entries fit beside one another into ``width`` inches."""
    if any(len(label_lines(label, width)) > 1 for label in labels):
        return 1
    widest = max((text_width(label, TEXT_SIZE) for label in labels), default=1.0)
    # Line sample, its distance from the text, and the gap between columns.
    return max(1, min(len(labels), int(width * 72 // (widest + 52))))


def legend_rows(labels: Sequence[str], width: float) -> int:
    """Lines of text that a legend of ``labels`` takes."""
    columns = legend_columns(labels, width)
    return -(-len(labels) // columns) if columns > 1 else sum(len(label_lines(label, width)) for label in labels)


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the panels, in as many columns as fit."""
    width = figure.get_figwidth()
    texts = ["\n".join(label_lines(label, width)) for label in labels]
    columns = legend_columns(labels, width)
    figure.legend(handles, texts, loc="outside lower left", ncols=columns, handlelength=2.8, columnspacing=1.2)


def line_look(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line number ``index``: apart in colour and in grey."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "ls": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


@lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Points that a line of text is wide."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    font.set_size(size, 72)
    font.set_text(text)
    # FreeType measures in 1/64 of a point at 72 dots an inch; hinting at another size moves it a little.
    return float(font.get_width_height()[0] / 64 / 0.97)


def wrap(text: str, width: float, size: float) -> list[str]:
    """Lines of ``text`` at most ``width`` points wide, broken at spaces, else inside names, else anywhere."""

    def fits(line: str) -> bool:
        return text_width(line.rstrip(), size) <= width

    lines = [""]
    for word in re.findall(r"[^ ]+ *|^ +", text.replace("\n", " ")):  # a no-break space does not part words
        parts = [word]
        if not fits(word):
            parts = re.findall(r"[^+_/,.:-]+[+_/,.:-]*\s*|[+_/,.:-]+\s*", word)
        for part in parts:
            for piece in [part] if fits(part) else part:
                if fits(lines[-1] + piece):
                    lines[-1] += piece
                else:
                    lines.append(piece)
    return [line.rstrip() for line in lines]


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis.

    >>> shortened("rainbow", 5), shortened("cat", 5)
    ('rain…', 'cat')
    """
    return text if len(text) <= most else text[: most - 1] + "…"


def task_ticks(tasks: int, start: int, width: float = 6.0) -> tuple[list[int], list[str]]:
    """Positions (the first task is at ``start``) and labels, as many as fit into an axis of ``width`` inches."""
    most = max(2, int(width * 72 / ((0.64 * len(str(tasks)) + 0.8) * TEXT_SIZE)))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, tasks) if tasks / s <= most or s == tasks)
    shown = [task for task in range(1, tasks + 1) if step == 1 or task == 1 or task % step == 0]
    if len(shown) > 1 and step > 1 and shown[1] - shown[0] < 0.5 * step:
        del shown[1]
    return [task - 1 + start for task in shown], [str(task) for task in shown]


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour; black and white text contrast alike at 0.18 (WCAG 2)."""
    rgb = np.array(colour[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def picture(figure: Figure, kind: str) -> bytes:
    """The figure as ``png``, ``svg`` or ``pdf``; the same data gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(style()):
        figure.savefig(out, format=kind, metadata=FORMATS[kind])
    return out.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format of the path's suffix, whole or not at all."""
    files.write_atomic(path, picture(figure, path.suffix[1:]))
