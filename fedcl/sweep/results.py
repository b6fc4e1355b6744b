"""What a finished run says of itself, for the tables of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RunFailed
from ..records.runfolder import RunFolder

Finished = dict[str, Any]


def read_finished(folder: Path) -> Finished:
    """The summary of a finished run.

    Raises:
        RunFailed: it has none.
    """
    summary = RunFolder.view(folder).read_summary()
    if summary is None:
        raise RunFailed(f"{folder} holds no finished run")
    return summary


def number(finished: Finished | None, key: str) -> float | None:
    """A number of a summary; None where it is undefined or there is no summary."""
    value = None if finished is None else finished.get(key)
    return value if isinstance(value, int | float) else None
