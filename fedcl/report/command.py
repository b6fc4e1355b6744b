"""What ``fedcl report`` does between its arguments and what it prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunFailed, UsageError
from ..records.files import write_atomic, writing
from ..records.runs import find_runs
from .layout import MOST_BYTES, Page, render
from .several import comparison_page
from .single import run_page

FILE = "report.html"


@dataclass(frozen=True)
class Written:
    """A report.

    Attributes:
        path: of the file.
        size: its bytes.
        notes: folders that were left out and why, one line each.
    """

    path: Path
    size: int
    notes: tuple[str, ...]

    def said(self) -> str:
        """What the user is told: where it is, and how to look at it."""
        link = self.path.resolve().as_uri()
        return f"{self.path}  ({self.size / 1e6:.1f} MB; needs no network)\nopen it in a browser: {link}"


def write_report(paths: Sequence[Path], out: Path | None = None, across_protocols: bool = False) -> Written:
    """Writes the report of the finished runs under some folders: of the one run, or a comparison.

    Without ``out`` a run's report is ``report.html`` in its own folder, a comparison's in the folder that was given, or
    in the one that holds all that were given.

    Args:
        paths: as for :func:`fedcl.records.runs.find_runs`.
        out: HTML file to write.
        across_protocols: compare runs of different protocols too.

    Raises:
        UsageError: no run's folder, runs of different protocols, or ``out`` is no HTML file.
        RunFailed: no run is finished, or the file cannot be written.
    """
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError("--out", str(out), "must end in .html")
    found = find_runs(paths)
    left_out = [f"left out: {broken.folder}: {broken.why}" for broken in found.broken]
    if not found.runs:
        raise RunFailed("; ".join(["no run is finished", *left_out]))
    if len(found.runs) == 1:
        (run,) = found.runs
        place = run.folder / FILE
        page: Page = run_page(run, found.broken)
    else:
        place = Path(os.path.commonpath([path.resolve() for path in paths])) / FILE
        place = paths[0] / FILE if len(paths) == 1 else _near(place)
        compared = page = comparison_page(found, across_protocols)
        left_out = [f"left out: {run.folder}: {run.why}" for run in compared.left_out]
    text = render(page).encode()
    if len(text) > MOST_BYTES:
        raise RunFailed(f"the report would have {len(text) / 1e6:.1f} MB, more than 5: report fewer runs at once")
    path = out or place
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return Written(path, len(text), tuple(left_out))


def _near(path: Path) -> Path:
    """The path from here, where that is shorter."""
    relative = Path(os.path.relpath(path))
    return relative if ".." not in relative.parts else path
