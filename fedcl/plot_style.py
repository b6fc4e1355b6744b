"""The look shared by all pictures: settings, colours, figure size by text, ticks, atomic saving."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150  # pixels an inch of every picture
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
GREY = "#D9D9D9"
TITLE_SIZE = 11.0  # points
TEXT_SIZE = 9.0  # points


def style() -> dict[str, Any]:
    """The matplotlib settings shared by all pictures, for ``matplotlib.rc_context``."""
    return {
        "font.size": TEXT_SIZE,
        "axes.labelsize": TEXT_SIZE + 1,
        "axes.titlesize": TEXT_SIZE + 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E5E5E5",
        "hatch.color": "#7F7F7F",
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "savefig.dpi": DPI,
        # Names of runs and files may hold "$".
        "text.parse_math": False,
    }


def label_lines(label: str, width: float) -> list[str]:
    """Lines of a legend entry in a figure of ``width`` inches."""
    # A leading underscore would hide the entry; the line sample and margins take 70 points.
    return wrap(f" {label}" if label.startswith("_") else label, width * 72 - 70, TEXT_SIZE)


@contextmanager
def new_figure(width: float, height: float, title: str, labels: Sequence[str]) -> Iterator[Figure]:
    """Figure of ``width`` x ``height`` inches, taller by the lines of the title and of the labels."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style()):
        lines = wrap(title, (width - 0.2) * 72, TITLE_SIZE)
        entries = sum(len(label_lines(label, width)) for label in labels)
        height += (len(lines) * TITLE_SIZE * 1.3 + entries * TEXT_SIZE * 1.5) / 72
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        figure.suptitle("\n".join(lines), x=0.1 / width, ha="left", fontsize=TITLE_SIZE)
        yield figure


def wrap(text: str, width: float, size: float) -> list[str]:
    """Lines of ``text`` at most ``width`` points wide, broken at spaces, else inside names, else anywhere."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    font.set_size(size, 72)

    def fits(line: str) -> bool:
        font.set_text(line.rstrip())
        # FreeType measures in 1/64 of a point at 72 dots an inch; hinting at another size moves it a little.
        return bool(font.get_width_height()[0] / 64 <= 0.97 * width)

    lines = [""]
    for word in re.findall(r"\S+\s*|^\s+", text.replace("\n", " ")):
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


def task_ticks(tasks: int, start: int) -> tuple[list[int], list[str]]:
    """Positions (the first task is at ``start``) and labels: every task up to 20, then 1 and multiples."""
    step = 1 if tasks <= 20 else 5 if tasks <= 60 else 10 * -(-tasks // 150)
    shown = [task for task in range(1, tasks + 1) if step == 1 or task == 1 or task % step == 0]
    return [task - 1 + start for task in shown], [str(task) for task in shown]


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour; black and white text contrast alike at 0.18 (WCAG 2)."""
    rgb = np.array(colour[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            # Without the version of matplotlib the same data gives the same bytes.
            figure.savefig(file, format="png", metadata={"Software": None})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
