"""What ``fedcl compare`` does between its arguments and what it prints."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..records.files import write_atomic
from .compute import compare
from .metric import DEFAULT
from .render import FORMATS, SUFFIXES, remarks, terminal


def compare_folders(
    folders: Sequence[Path],
    metrics: str | None,
    by: str | None,
    baseline: str | None,
    format_name: str | None,
    out: Path | None,
    across_protocols: bool,
) -> str:
    """The comparison as text, which is also written to ``out`` where it is given.

    Args:
        folders, baseline, out, across_protocols: as on the command line.
        metrics, by: names with commas between them.
        format_name: one of ``FORMATS``; None: by the ending of ``out``, else for a terminal.

    Raises:
        UsageError: wrong arguments, no finished run, or runs of different protocols.
        RunFailed: ``out`` cannot be written.
    """
    chosen = format_name or _format_of(out)
    if chosen not in FORMATS:
        raise UsageError("--format", chosen, f"must be one of {', '.join(FORMATS)}", FORMATS)
    found = compare(folders, DEFAULT if metrics is None else _names(metrics), _names(by), baseline, across_protocols)
    if chosen == "terminal" and out is None and sys.stdout.isatty():
        text = terminal(found, shutil.get_terminal_size().columns)
    else:
        text = FORMATS[chosen](found)
    if chosen == "csv":
        for line in remarks(found):
            print(f"fedcl: {line}", file=sys.stderr)
    if out is not None:
        write_atomic(out, text.encode() + b"\n")
    return text


def _format_of(out: Path | None) -> str:
    if out is None:
        return "terminal"
    if out.suffix not in SUFFIXES:
        allowed = f"its ending must be one of {', '.join(SUFFIXES)}, or give --format"
        raise UsageError("--out", str(out), allowed)
    return SUFFIXES[out.suffix]


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
