"""What the encoder makes of a few test images after each task: kept where ``evaluate.features`` asks for it.

``features/task-000.safetensors`` holds the features of the same images after task 0, as float16 shares of the largest
value (half a megabyte for 500 images of 512 features), with their labels and tasks. It is for pictures, not metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ..errors import RunFailed
from ..metrics.matrix import FloatArray
from ..records.checkpoint import Damaged, pack_tensors, unpack_tensors
from .probing import Probing, panel_rows

if TYPE_CHECKING:
    from ..strategy import Arrays


@dataclass(frozen=True, eq=False)
class Features:
    """Features (N, d) of test images after a task; their class positions (N,) and the tasks (N,) they belong to."""

    values: FloatArray
    labels: npt.NDArray[np.int64]
    tasks: npt.NDArray[np.int64]


def keep_features(probing: Probing, arrays: Arrays, task: int, most: int) -> None:
    """Writes the features of the test images of all tasks after a task.

    Args:
        arrays: the model to be evaluated.
        most: images; every class of every task has its share, and at least one.

    Raises:
        RunFailed: a feature is not a number.
    """
    stream = probing.evaluator.stream
    tests = [s.test_ids for s in stream.stages]
    shares = sum(len(np.unique(stream.test_labels[ids])) for ids in tests)
    seed = probing.evaluator.node.config.seed
    rows, tasks = panel_rows(tests, stream.test_labels, max(1, most // max(1, shares)), seed, "features")
    with torch.no_grad():
        found = probing.frozen(arrays, probing.evaluator.test, stream.test_labels, rows, tasks)
    largest = found.features.abs().max().to(torch.float32) if len(rows) else torch.ones(())
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny)
    kept = {
        "features": (found.features / scale).to(torch.float16), "scale": scale, "labels": found.labels,
        "tasks": found.tasks,
    }  # fmt: skip
    probing.folder.write(_name(task), pack_tensors(kept))


def read_features(folder: Path, task: int) -> Features:
    """What :func:`keep_features` wrote into a run folder.

    Raises:
        RunFailed: it is not there or damaged.
    """
    path = folder / _name(task)
    if not path.is_file():
        raise RunFailed(f"{folder} has no {_name(task)}: evaluate.features=500 keeps the features of 500 test images")
    try:
        kept = unpack_tensors(path.read_bytes())
    except (OSError, Damaged) as error:
        raise RunFailed(f"{path} is damaged ({error})") from error
    values = (kept["features"].to(torch.float64) * kept["scale"].to(torch.float64)).numpy()
    return Features(values, kept["labels"].numpy(), kept["tasks"].numpy())


def _name(task: int) -> str:
    return f"features/task-{task:03d}.safetensors"
