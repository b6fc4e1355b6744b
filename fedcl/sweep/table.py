"""What a sweep found, for a terminal and as plain objects."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import RunFailed
from ..tell.progress import duration, size
from .board import spread
from .job import Outcome
from .plan import Point
from .results import Finished, number, read_finished

METRICS = (
    ("accuracy", "average_accuracy"),
    ("mean over the tasks", "average_incremental_accuracy"),
    ("forgetting", "forgetting"),
)


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
        name, root: of the sweep.
        points: its runs.
        outcomes: how each ended; those that were done before are done.
        searched: the content of ``search.json``, or None.
    """

    name: str
    root: Path
    points: list[Point]
    outcomes: list[Outcome]
    searched: dict[str, Any] | None = None

    def as_objects(self) -> list[dict[str, Any]]:
        """For ``--json``: one object a run."""
        found = []
        for point, outcome in zip(self.points, self.outcomes, strict=True):
            finished = read_finished(point.folder) if outcome.status == "done" else None
            numbers = {key: number(finished, key) for _, key in METRICS}
            found.append({
                "variant": point.variant, "seed": point.seed, "settings": point.settings, "folder": str(point.folder),
                "status": outcome.status, "cause": outcome.cause, **numbers,
                **{key: number(finished, key) for key in ("bytes_up", "bytes_down", "wall_seconds")},
                "model_sha256": None if finished is None else finished.get("model_sha256"),
            })  # fmt: skip
        return found

    @property
    def text(self) -> str:
        """For a terminal: a table of the variants, what failed or was stopped, what to do next."""
        lines = [table(self.name, self.points, self.outcomes)]
        for point, outcome in zip(self.points, self.outcomes, strict=True):
            if outcome.status in ("failed", "stopped"):
                lines.append(f"{outcome.status:<9} {point.label}: {outcome.cause}")
        if self.searched is not None:
            lines += search_lines(self.searched, self.root)
        lines.append(f"results   {self.root}")
        if any(outcome.status == "done" for outcome in self.outcomes):
            lines.append(f"next      fedcl compare {shlex.quote(str(self.root))}")
            lines.append(f"          fedcl report {shlex.quote(str(self.root))}")
        return "\n".join(lines)

    @property
    def failed(self) -> list[tuple[Point, Outcome]]:
        """The points that failed."""
        return [(p, o) for p, o in zip(self.points, self.outcomes, strict=True) if o.status == "failed"]

    def check(self) -> None:
        """Raises RunFailed where a run failed."""
        failed = self.failed
        if failed:
            first = f"{failed[0][0].label}: {failed[0][1].cause}"
            raise RunFailed(f"{len(failed)} of {len(self.points)} runs failed; the first: {first}")


def planned_text(planned: Sequence[dict[str, Any]]) -> str:
    """A line for each run of a sweep that is only to be looked at."""
    lines = [f"{run['folder']}: {run['todo']}" for run in planned]
    return "\n".join([*lines, f"{len(planned)} runs, {sum(run['todo'] == 'run' for run in planned)} of them new"])


def search_lines(found: dict[str, Any], root: Path) -> list[str]:
    """What a search found and cost, for a terminal."""
    lines = []
    for method in found["methods"]:
        best = method["best"]
        chosen = ", ".join(f"{key}={value}" for key, value in best["settings"].items()) or "nothing to choose"
        lines.append(f"tuned     {method['method']}: {chosen} (validation {spread([best['value']])})")
    cost = found["budget"]
    failed = f" ({cost['failed']} failed)" if cost["failed"] else ""
    lines.append(
        f"budget    {cost['trials']} trials{failed}, {cost['rounds']} rounds, {cost['images']} images trained on, "
        f"{duration(cost['seconds'])}; judged by {found['judged_by']}; all in {root / 'search.json'}"
    )
    return lines


def table(name: str, points: Sequence[Point], outcomes: Sequence[Outcome]) -> str:
    """A row for each variant: n, mean and standard deviation over the seeds."""
    rows: dict[str, list[tuple[Point, Outcome]]] = {}
    for point, outcome in zip(points, outcomes, strict=True):
        rows.setdefault(point.variant, []).append((point, outcome))
    drawn = Table(box=SIMPLE_HEAD, title=f"{name}: mean ± standard deviation over seeds", title_justify="left")
    drawn.add_column("variant", overflow="fold")
    for column in ("n", *(title for title, _ in METRICS), "sent", "seconds"):
        drawn.add_column(column, justify="right")
    for variant, runs in rows.items():
        done: list[Finished] = [read_finished(p.folder) for p, o in runs if o.status == "done"]
        sent = [(number(f, "bytes_up") or 0) + (number(f, "bytes_down") or 0) for f in done]
        seconds = [number(f, "wall_seconds") or 0.0 for f in done]
        drawn.add_row(
            Text(variant), str(len(done)) if len(done) == len(runs) else f"{len(done)} of {len(runs)}",
            *(spread([number(f, key) for f in done]) for _, key in METRICS),
            size(int(sum(sent) / len(sent))) if done else "-", duration(sum(seconds) / len(seconds)) if done else "-",
        )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=min(170, 95 + max(map(len, rows)))).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
