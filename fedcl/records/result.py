"""What a run leaves for a script or a notebook: summary, matrix, model, data frames, plots."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..models.model import FedModel

SHOWN = (
    "average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "bytes_up", "bytes_down",
    "wall_seconds",
)  # fmt: skip
"""What the small table of a result shows."""


@dataclass(frozen=True)
class RunResult:
    """A run and where it lies. In a notebook it shows itself as a small table.

    Attributes:
        summary: the content of ``summary.json``.
        matrix: accuracy on task j after task i, None where undefined; the rows so far where the run was stopped.
        folder: the run folder.
    """

    summary: dict[str, Any]
    matrix: list[list[float | None]]
    folder: Path

    @property
    def model(self) -> FedModel:
        """The final global model as a module, in eval mode, its head as wide as the classes seen.

        Raises:
            RunFailed: the folder has no whole checkpoint.
        """
        from ..build import load_model

        return load_model(self.folder)

    def frame(self) -> pd.DataFrame:
        """The accuracy matrix: a row after each task, a column for each task tested, NaN where undefined.

        Raises:
            UsageError: pandas is not installed.
        """
        from .frames import matrix_frame

        return matrix_frame(self.matrix)

    def rounds_frame(self) -> pd.DataFrame:
        """A row for each round: losses, clients, samples, bytes, and accuracy where it was evaluated.

        Raises:
            UsageError: pandas is not installed.
        """
        from .frames import rounds_frame

        return rounds_frame(self.folder)

    def summary_frame(self) -> pd.DataFrame:
        """One row with the numbers and names of the summary, inner ones as ``outer.inner``.

        Raises:
            UsageError: pandas is not installed.
        """
        from .frames import summary_frame

        return summary_frame([(self.folder, self.summary)])

    def plot(self, kind: str) -> Figure:
        """A plot of the run as a matplotlib figure, which a notebook shows below the cell; the same kinds as
        ``fedcl plot``.

        Raises:
            UsageError: no such kind, or the run has not what it needs.
        """
        from .frames import figure_of

        return figure_of(kind, self.folder)

    def _repr_html_(self) -> str:
        s = self.summary
        title = f"{s.get('name')}: {' + '.join(s.get('strategy', []))}, seed {s.get('seed')}, {s.get('status')}"
        rows = [(key.replace("_", " "), html.escape(shown(key, s[key]))) for key in SHOWN if key in s]
        cells = "".join(f"<tr><th style='text-align:left'>{name}</th><td>{text}</td></tr>" for name, text in rows)
        place = html.escape(str(self.folder))
        return f"<table><caption>{html.escape(title)}</caption>{cells}</table><code>{place}</code>"


def shown(key: str, value: float | None) -> str:
    """A number of the summary for people.

    >>> shown("forgetting", 0.125), shown("bytes_up", 2048), shown("forgetting", None)
    ('12.5 %', '2.0 kB', '-')
    """
    from ..tell.progress import duration, percent, size

    if value is None:
        return "-"
    if key.startswith("bytes"):
        return size(int(value))
    return duration(value) if key.endswith("seconds") else percent(value)
