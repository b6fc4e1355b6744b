"""What ``fedcl plot`` does between its arguments and the paths it prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from ..compare.groups import differing, group
from ..errors import RunFailed, UsageError
from ..measure.breakdown import CLASSES_CSV
from ..records import files
from ..records.runs import Run, find_runs
from .catalog import PlotKind, kind_of
from .drawing import Options, draw
from .style import FORMATS, picture

DEFAULT_FORMATS = ("png", "svg")
METHODS = ("pca", "tsne")


@dataclass(frozen=True)
class Drawn:
    """What was written, and one line for each thing the user should know: runs left out, parts that are missing."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def plot_folders(
    kind: str,
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    formats: str | None = None,
    by: str | None = None,
    method: str = "pca",
    key: str | None = None,
    title: str | None = None,
) -> Drawn:
    """Draws the runs under some folders, all in one picture or each in its own, as the kind says.

    A picture of one run goes to its folder ``plots``, one of several to ``plots`` in the folder that holds them all.

    Args:
        out: file to write in place of these; its ending may say the format.
        formats: among png, svg, pdf, with commas between them; None: by the ending of ``out``, else png and svg.
        by, key, method, title: see :class:`fedcl.plots.Options`; several names with commas between them.

    Raises:
        UsageError: wrong arguments, or a folder without runs.
        RunFailed: no run is finished, a run did not record what is drawn, or a picture cannot be written.
    """
    found_kind = kind_of(kind)
    if method not in METHODS:
        raise UsageError("--method", method, f"must be one of {', '.join(METHODS)}", METHODS)
    if method != "pca" and kind != "features":
        raise UsageError("--method", method, f"is for features; {kind} has none")
    if key is not None and kind != "memory":
        raise UsageError("--key", key, f"is for memory; {kind} has none")
    endings = _endings(out, formats)
    found = find_runs(folders)
    notes = [f"left out: {broken.folder}: {broken.why}" for broken in found.broken]
    if not found.runs:
        raise RunFailed("; ".join(notes) or "no run is finished")
    names = tuple(name.strip() for name in (by or "").split(",") if name.strip())
    options = Options(title, names, cast(Literal["pca", "tsne"], method), key or "")
    if found_kind.shows == "methods":
        return Drawn(
            _write(kind, found.runs, options, _place(out, found.runs, kind), endings),
            (*notes, *_notes(found_kind, found.runs, names)),
        )
    if out is not None and len(found.runs) > 1:
        allowed = f"{kind} draws each run apart: give one run, or leave --out out and each picture goes to its run"
        raise UsageError("--out", str(out), allowed)
    paths = [path for run in found.runs for path in _write(kind, [run], options, _place(out, [run], kind), endings)]
    return Drawn(tuple(paths), tuple(notes))


def _write(kind: str, runs: Sequence[Run], options: Options, place: Path, endings: Sequence[str]) -> tuple[Path, ...]:
    figure = draw(kind, runs, options)
    written = []
    for ending in endings:
        path = place.with_name(f"{place.name}.{ending}")
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, picture(figure, ending))
        written.append(path)
    return tuple(written)


def _place(out: Path | None, runs: Sequence[Run], kind: str) -> Path:
    """The file without its ending."""
    if out is not None:
        return out.with_name(out.stem) if out.suffix[1:] in FORMATS else out
    folders = [run.folder for run in runs]
    return (folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))) / "plots" / kind


def _endings(out: Path | None, formats: str | None) -> tuple[str, ...]:
    own = out.suffix[1:] if out is not None else ""
    if formats is None:
        if out is not None and own and own not in FORMATS:
            raise UsageError("--out", str(out), f"must end in .{', .'.join(FORMATS)}, or give --format", FORMATS)
        return (own,) if own else DEFAULT_FORMATS
    chosen = tuple(dict.fromkeys(name.strip().lower() for name in formats.split(",") if name.strip()))
    for name in chosen or (formats,):
        if name not in FORMATS:
            raise UsageError("--format", name, f"must be among {', '.join(FORMATS)}", FORMATS)
    return chosen


def _notes(kind: PlotKind, runs: Sequence[Run], by: Sequence[str]) -> list[str]:
    across = differing(run.protocol for run in runs)
    _, again = group(runs, by, across=bool(across))
    notes = [f"left out: {run.folder}: {run.why}" for run in again]
    if across and kind.name != "costs":
        notes.append(f"these runs follow different protocols; they differ in {', '.join(across)}")
    if kind.name == "forgetting" and not any((run.folder / CLASSES_CSV).is_file() for run in runs):
        notes.append(f"no forgetting by class: the runs are of a version that wrote no {CLASSES_CSV}")
    return notes
