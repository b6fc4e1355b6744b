"""What ``fedcl bench`` does between its arguments and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Interrupted, RunFailed
from .measure import OURS, Result, bench, take_part
from .report import place, text, write
from .workloads import SCALED, SCALING, chosen, engine_only, settings

FOLDER = Path("bench")


@dataclass(frozen=True)
class Measured:
    """What a call of ``fedcl bench`` found.

    Attributes:
        results: one a workload.
        content: what ``--json`` prints: one result, or a list of them for ``all``.
        files: what was written.
    """

    results: list[Result]
    content: Any
    files: list[Path]

    @property
    def text(self) -> str:
        """For a terminal."""
        return "\n".join([text(self.results), *(f"written: {path}" for path in self.files)])

    def check(self) -> None:
        """Raises RunFailed where fedcl itself has no number; a peer without one is no error."""
        for result in self.results:
            points = [result] if result["workload"] != SCALING else [*result["cohort"], *result["width"]]
            for point in points:
                if point["seconds_per_round"][OURS] is None:
                    raise RunFailed(f"fedcl failed in {point['workload']}: {point['reasons'][OURS]}")


def measure_all(
    workload: str,
    rounds: int,
    peers: str | None,
    overrides: Sequence[str],
    device: str | None,
    out: Path | None,
    *,
    write_default: bool,
    quiet: bool,
) -> Measured:
    """Checks all arguments, then measures.

    Args:
        workload, rounds, peers, overrides, device, out: as on the command line.
        write_default: whether files are written where ``out`` is None, into the folder ``bench``.
        quiet: tell only of contestants that are missing or failed.

    Raises:
        UsageError: wrong arguments; nothing has run.
        RunFailed: a file cannot be written.
        Interrupted: by the user.
    """
    names, engine = chosen(workload), engine_only(overrides)
    players = {name: take_part(peers, name) for name in names}
    for name in names:
        given = [("engine.device", device)] if device else []
        settings(SCALED if name == SCALING else name, [*engine, *given])
    folder = place(out or FOLDER) if out is not None or write_default else None

    def say(line: str) -> None:
        if not quiet or "failed" in line or "not installed" in line:
            print(line, file=sys.stderr, flush=True)

    try:
        results = [bench(name, rounds, players[name], engine, device, say) for name in names]
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written and no contestant is left running") from None
    files = write(results, workload, folder) if folder is not None else []
    return Measured(results, results if workload == "all" else results[0], files)
