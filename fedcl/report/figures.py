"""Pictures of runs as parts of a page: SVG where it is small, else PNG."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import FedclError
from ..plots import KINDS, Options, draw
from ..plots.methods import methods_of, over_seeds, seen_accuracy
from ..records.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"

CAPTIONS = {
    "accuracy": "Accuracy on the test images of the tasks seen so far, after each task.",
    "matrix": "Accuracy matrix: rows after training on a task, columns tested on a task. The stepped line parts the "
    "tasks already learned from those still to come.",
    "forgetting": "What each task, and each class, lost from its best accuracy to the end, in percentage points.",
    "clients": "Clients on test images of their own. Left: their mean, and where four fifths of them lie. Right: each "
    "client after the last task, with quartiles and extremes.",
    "split": "Training images by class, client and task, rebuilt from the settings.",
    "bytes": "Accuracy on seen tasks against bytes sent so far by all clients and to them; a marker a task.",
    "memory": "Final accuracy against the memory budget of a client.",
    "features": "Features of test images after some of the tasks, on two principal components that all panels share. "
    "Lines show where the means of the classes came from.",
    "drift": "How far the features of old images have moved, and how wrong the class means of old tasks have become.",
    "probes": "The model against probes of its frozen encoder: the gap is what the head loses, not the representation.",
    "costs": "Bytes sent, time by what it went into, and work of the training. Time is that of the machine of the run.",
}
WIDE = 4.5  # inches
SCREEN = 150  # pixels an inch of a PNG


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        kind: of plot.
        caption, alt: text under it, and for those who cannot see it.
        width: in inches.
        svg: markup with ids of its own.
        figure: what it was drawn from.
    """

    kind: str
    caption: str
    alt: str
    width: float
    svg: str
    figure: Figure

    @property
    def wide(self) -> bool:
        """Whether it takes the width of the page."""
        return self.width > WIDE

    def png(self) -> str:
        """As a ``data:`` address."""
        from ..plots.style import picture

        self.figure.set_dpi(SCREEN)
        return f"data:image/png;base64,{base64.b64encode(picture(self.figure, 'png')).decode()}"


@dataclass(frozen=True)
class Drawn:
    """Pictures, and of each other kind why it is not there."""

    pictures: tuple[Picture, ...]
    missing: tuple[tuple[str, str], ...]


def pictures_of(runs: Sequence[Run], kinds: Sequence[str]) -> Drawn:
    """All kinds of plots that some runs have what it takes for."""
    found, missing = [], []
    for kind in kinds:
        try:
            found.append(_drawn(kind, runs))
        except FedclError as error:
            missing.append((kind, _why(str(error), runs)))
        except KeyError as error:  # of a run that an older version has made
            missing.append((kind, f"the summary has no {error}"))
    return Drawn(tuple(found), tuple(missing))


def _why(message: str, runs: Sequence[Run]) -> str:
    """The message in one line, with runs by their names rather than by their place on this machine."""
    for run in runs:
        message = message.replace(str(run.folder), f"{run.name}, seed {run.seed}")
    return " ".join(message.split())


def _drawn(kind: str, runs: Sequence[Run]) -> Picture:
    from ..plots.style import picture

    figure = draw(kind, runs, Options(title=""))
    width = float(figure.get_figwidth())
    several = KINDS[kind].shows == "methods" and len({run.seed for run in runs}) > 1
    caption = CAPTIONS[kind] + (_spread_note(kind) if several else "")
    return Picture(kind, caption, _alt(kind, runs), width, inline_svg(picture(figure, "svg"), f"plot-{kind}"), figure)


def inline_svg(drawn: bytes, prefix: str) -> str:
    """Matplotlib's SVG as markup within a page: no header, no style that reaches beyond it, ids with a prefix.

    Its size is left to the page; the drawing is said in words beside it.
    """
    ET.register_namespace("", SVG)
    root = ET.fromstring(drawn)
    used = set(re.findall(r"#([\w.:-]+)", drawn.decode()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for node in root.iter():
        name = node.attrib.pop("id", None)
        if name in used:
            node.set("id", f"{prefix}-{name}")
        if LINK in node.attrib:
            target = node.attrib.pop(LINK)
            node.set("href", f"#{prefix}-{target[1:]}" if target.startswith("#") else target)
        for key, value in node.attrib.items():
            if "url(#" in value or "\n" in value or "font-family" in value:
                value = re.sub(r"url\(#", f"url(#{prefix}-", value)
                value = re.sub(r"font-family:[^;]*;? ?", "", value)
                node.set(key, " ".join(value.split()))
        if node.tag != f"{{{SVG}}}text" and node.text is not None and not node.text.strip():
            node.text = None
        if node.tail is not None and not node.tail.strip():
            node.tail = None
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return ET.tostring(root, encoding="unicode")


def _spread_note(kind: str) -> str:
    return {
        "matrix": " Means over seeds.",
        "clients": " The clients of all seeds together.",
        "accuracy": " Bands are one standard deviation over seeds.",
        "drift": " Bands are one standard deviation over seeds.",
        "probes": " Bands are one standard deviation over seeds.",
    }.get(kind, " Means over seeds; whiskers are one standard deviation.")


def _alt(kind: str, runs: Sequence[Run]) -> str:
    text = f"{KINDS[kind].summary[0].upper()}{KINDS[kind].summary[1:]}."
    if kind not in ("accuracy", "bytes", "probes"):
        return text
    ends = []
    for method in methods_of(runs):
        curve = 100 * over_seeds(method, seen_accuracy, "number of tasks").mean(axis=0)
        first, last = (f"{value:.1f} %" if np.isfinite(value) else "undefined" for value in curve[[0, -1]])
        ends.append(f"{method.label}: {first} after the first task, {last} after the last")
    return f"{text} {'; '.join(ends)}."
