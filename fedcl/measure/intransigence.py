"""Intransigence of a finished run against a finished reference that was trained on all data so far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import RunFailed, UsageError
from ..metrics.streams import intransigence, per_task_intransigence
from ..records.runs import Run, as_run

BOUNDS = ("cumulative", "joint")
SAME = ("dataset", "seed", "num_tasks", "test_counts")
"""Keys of ``summary.json`` that two runs must share: then both have the same test images in the same columns."""


@dataclass(frozen=True)
class Intransigence:
    """What a run lacks against a reference when it learns a task, in [-1, 1]; None where undefined.

    Attributes:
        mean: over the tasks.
        per_task: ``I_k = a*_k - R[k, k]``, (T,), negative where the run is the better one.
    """

    mean: float | None
    per_task: list[float | None]


def intransigence_of(run: str | Path, reference: str | Path) -> Intransigence:
    """Intransigence of a run, see :func:`fedcl.metrics.streams.intransigence`.

    Args:
        run: its folder.
        reference: folder of a run of the same stream and seed with ``strategy=cumulative`` (the federated bound) or
            ``strategy=joint`` (the centralised one), or with ``scenario=cumulative`` over the stream.

    Raises:
        UsageError: a folder without a finished run, a reference that is no bound, or runs of different streams.
    """
    ours, bound = _read("run", run), _read("reference", reference)
    if not {*bound.strategy} & {*BOUNDS} and bound.summary.get("scenario") != "cumulative":
        allowed = f"a run with strategy {' or '.join(BOUNDS)}, not {bound.label}"
        raise UsageError("reference", str(reference), allowed)
    for key in SAME:
        mine, theirs = ours.summary.get(key), bound.summary.get(key)
        if mine != theirs:
            raise UsageError("reference", str(reference), f"a run with the same {key}: {mine}, not {theirs}")
    diagonal = [row[k] for k, row in enumerate(bound.matrix)]
    return Intransigence(intransigence(ours.matrix, diagonal), per_task_intransigence(ours.matrix, diagonal))


def _read(key: str, folder: str | Path) -> Run:
    try:
        return as_run(Path(folder))
    except RunFailed as error:
        raise UsageError(key, str(folder), f"the folder of a finished run; {error}") from error
