"""Probes of the frozen global encoder after every task: what the representation still knows, whatever the head says.

A task's values stand in the state's records, so that a resumed run keeps them. Probes that compare with earlier models
read the features that these models gave to a fixed panel of test images, kept in the run folder.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import random
from ..errors import Interrupted, RunFailed
from ..metrics.matrix import forgetting
from ..metrics.moments import ClassMoments
from ..records.checkpoint import Damaged, pack_tensors, unpack_tensors
from ..streams.labels import distinct, labelled_somewhere
from .probe_values import HISTORY, PROBES, Values

if TYPE_CHECKING:
    from ..data.store import TensorStore
    from ..records.runfolder import RunFolder
    from ..strategy import Arrays
    from .evaluation import Evaluator

Ints = npt.NDArray[np.int64]
PROBES_CSV = "probes.csv"


@dataclass(frozen=True)
class Frozen:
    """What the model gives for images: features (N, d), logits (N, C); their labels (N,) and tasks (N,)."""

    features: Tensor
    logits: Tensor
    labels: Tensor
    tasks: Tensor

    def where(self, kept: Tensor) -> Frozen:
        """The images of a mask or of row numbers."""
        return Frozen(self.features[kept], self.logits[kept], self.labels[kept], self.tasks[kept])


def panel_rows(ids: Sequence[Ints], labels: Ints, most: int, *stream: object) -> tuple[Ints, Ints]:
    """Rows and their tasks: of each class of each task at most ``most``, the same ones whenever they are asked for.

    Args:
        ids: rows of a store by task.
        labels: of the store, (N,).
        most: 0 for all.
        stream: name of the random stream.
    """
    rows, tasks = [], []
    for task, own in enumerate(ids):
        for label in np.unique(labels[own]).tolist():
            found = own[labels[own] == label]
            if most and len(found) > most:
                found = np.sort(found[random.permutation(len(found), *stream, task, label)[:most]])
            rows.append(found)
            tasks.append(np.full(len(found), task, dtype=np.int64))
    empty = [np.zeros(0, dtype=np.int64)]
    return np.concatenate(rows or empty), np.concatenate(tasks or empty)


@dataclass(frozen=True)
class Probing:
    """The probes that the settings name.

    Attributes:
        folder: where features are kept between tasks.
    """

    evaluator: Evaluator
    folder: RunFolder

    @property
    def names(self) -> list[str]:
        """Probes in the order of the settings."""
        return self.evaluator.node.config.evaluate.probes

    @cached_property
    def panels(self) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """(rows, tasks) of the training images and of the test images that probes of single pairs look at."""
        stream, config = self.evaluator.stream, self.evaluator.node.config
        most = config.evaluate.probe_samples
        train = panel_rows(
            [s.train_ids for s in stream.stages], stream.train_labels, most, config.seed, "probe", "train"
        )
        test = panel_rows([s.test_ids for s in stream.stages], stream.test_labels, most, config.seed, "probe", "test")
        return train, test

    def measure(self, arrays: Arrays, task: int, earlier: list[dict[str, Values]]) -> dict[str, Values]:
        """Values by probe and name after a task; logged as an event.

        Args:
            arrays: the model to be evaluated.
            earlier: the values after each task before.

        Raises:
            RunFailed: a feature is not a number.
            Interrupted: the user asked to stop.
        """
        begun = perf_counter()
        taken = Measurement(self, arrays, task, earlier)
        with torch.no_grad():
            found = {name: {n: _finite(v) for n, v in PROBES[name](taken).items()} for name in self.names}
            if HISTORY & set(self.names):
                kept = {"features": taken.panel.features, "means": taken.means(task)}
                self.folder.write(_kept_name(task), pack_tensors(kept))
        seconds = round(perf_counter() - begun, 4)
        self.folder.log({"event": "probes", "task": task, "round": None, "seconds": seconds, "values": found})
        return found

    def past(self, task: int) -> dict[str, Tensor] | None:
        """What :meth:`measure` kept after an earlier task; None, and a warning, where it cannot be read."""
        path = self.folder.path / _kept_name(task)
        try:
            kept = unpack_tensors(path.read_bytes())
        except (OSError, Damaged) as error:
            text = f"{path} cannot be read ({error}): what probes compare with task {task + 1} is undefined"
            self.folder.log({"event": "warning", "message": text})
            return None
        return {n: a.to(self.evaluator.node.store.device) for n, a in kept.items()}

    def frozen(self, arrays: Arrays, store: TensorStore, labels: Ints, rows: Ints, tasks: Ints) -> Frozen:
        """One pass of the model over rows of a store.

        Raises:
            RunFailed: a feature is not a number.
        """
        node = self.evaluator.node
        features, logits = [], []
        for part in torch.split(torch.from_numpy(rows).to(store.device), node.config.evaluate.batch_size):
            if node.stop():
                raise Interrupted("interrupted during probes")
            with node.autocast():
                out = node.forward(arrays, store.batch(part, node.dtype), "eval")
            features.append(out.features.to(node.dtype))
            logits.append(out.logits.to(node.dtype))
        found = torch.cat(features) if features else torch.zeros(0, node.model.feature_dim, device=store.device)
        if not bool(found.isfinite().all()):
            raise RunFailed("evaluation: the features of the global model are not numbers")
        scores = torch.cat(logits) if logits else found.new_zeros(0, 1)
        places = [torch.from_numpy(a).to(store.device) for a in (labels[rows], tasks)]
        return Frozen(found, scores, places[0], places[1])


class Measurement:
    """The features that the probes of one task share; what no probe asks for is not computed."""

    def __init__(self, probing: Probing, arrays: Arrays, task: int, earlier: list[dict[str, Values]]) -> None:
        self.probing, self.arrays, self.task, self.earlier = probing, arrays, task, earlier
        self.known = probing.evaluator.known(task)
        self.classes = probing.evaluator.stream.num_classes
        self._past: dict[int, dict[str, Tensor] | None] = {}

    @cached_property
    def train(self) -> Frozen:
        """The panel of training images of the tasks so far."""
        rows, tasks = self.probing.panels[0]
        evaluator, seen = self.probing.evaluator, tasks <= self.task
        labels = evaluator.stream.train_labels
        return self.probing.frozen(self.arrays, evaluator.node.store, labels, rows[seen], tasks[seen])

    @cached_property
    def _tests(self) -> tuple[Frozen, int]:
        """All test images of the tasks so far, then the panel's that are still to come; how many the former are."""
        evaluator = self.probing.evaluator
        stages = evaluator.stream.stages[: self.task + 1]
        rows = np.concatenate([s.test_ids for s in stages])
        tasks = np.concatenate([np.full(len(s.test_ids), s.index, dtype=np.int64) for s in stages])
        seen = len(rows)
        if HISTORY & set(self.probing.names):
            panel, owners = self.probing.panels[1]
            later = owners > self.task
            rows, tasks = np.concatenate([rows, panel[later]]), np.concatenate([tasks, owners[later]])
        labels = evaluator.stream.test_labels
        return self.probing.frozen(self.arrays, evaluator.test, labels, rows, tasks), seen

    @cached_property
    def test(self) -> Frozen:
        """All test images of the tasks so far."""
        found, seen = self._tests
        return found.where(torch.arange(seen, device=found.labels.device))

    @cached_property
    def panel(self) -> Frozen:
        """The panel of test images: of all tasks of the stream where a probe compares models, else of those so far."""
        found, seen = self._tests
        stages = self.probing.evaluator.stream.stages[: self.task + 1]
        # A test image may stand in several tasks, so its place is looked up within its own.
        place: dict[tuple[int, int], int] = {}
        for stage in stages:
            for row in stage.test_ids.tolist():
                place[stage.index, row] = len(place)
        rows, tasks = self.probing.panels[1]
        old = [place[key] for key in zip(tasks.tolist(), rows.tolist(), strict=True) if key in place]
        return found.where(torch.tensor([*old, *range(seen, len(found.labels))], device=found.labels.device).long())

    @cached_property
    def seen_panel(self) -> Frozen:
        """The panel of test images of the tasks so far."""
        return self.panel.where(self.panel.tasks <= self.task)

    @cached_property
    def named(self) -> bool:
        """Whether any training image is labelled, so that the head knows what its classes look like."""
        return labelled_somewhere(self.probing.evaluator.split)

    def _of_classes(self, wanted: Ints) -> Frozen:
        """The test images of some classes, in later tasks or in none."""
        evaluator = self.probing.evaluator
        labels = evaluator.stream.test_labels
        rows = distinct([*(s.test_ids for s in evaluator.stream.stages), evaluator.stream.unnamed[0]])
        rows = rows[np.isin(labels[rows], wanted)]
        return self.probing.frozen(self.arrays, evaluator.test, labels, rows, np.full(len(rows), self.task))

    @cached_property
    def unknown(self) -> Frozen:
        """All test images of classes that are not known yet, whether clients hold images of them or not."""
        stream = self.probing.evaluator.stream
        return self._of_classes(np.setdiff1d(np.arange(stream.num_classes), stream.known(self.task)))

    @cached_property
    def shown_classes(self) -> Ints:
        """The classes that the training images of the tasks so far are of, named or not, ascending."""
        stream = self.probing.evaluator.stream
        return distinct([stream.train_labels[s.train_ids] for s in stream.stages[: self.task + 1]])

    @cached_property
    def shown(self) -> Frozen:
        """All test images of the classes shown so far; where every class gets a name, those of the tasks so far."""
        unnamed = len(self.probing.evaluator.stream.unnamed[0])
        return self._of_classes(self.shown_classes) if unnamed else self.test

    @cached_property
    def train_moments(self) -> ClassMoments:
        """Of the training features."""
        return ClassMoments.of(self.train.features, self.train.labels, self.classes)

    @cached_property
    def unit_moments(self) -> ClassMoments:
        """Of the training features, each of unit length."""
        return ClassMoments.of(F.normalize(self.train.features, dim=1), self.train.labels, self.classes)

    def means(self, task: int) -> Tensor:
        """Means (C, d) float64 of the classes, over the training images of one task."""
        own = self.train.where(self.train.tasks == task)
        return ClassMoments.of(own.features, own.labels, self.classes).means

    def past(self, task: int) -> dict[str, Tensor] | None:
        """What was kept after an earlier task."""
        if task not in self._past:
            self._past[task] = self.probing.past(task)
        return self._past[task]

    def by_task(self, scores: Tensor | None) -> Values:
        """Accuracy of scores (N, C) on the test images: overall, of each task so far, and how much was forgotten."""
        hits = None if scores is None else (scores.argmax(dim=1) == self.test.labels).to(torch.float64)
        found: Values = {"accuracy": float(hits.mean()) if hits is not None and len(hits) else None}
        for task in range(self.task + 1):
            own = self.test.tasks == task
            found[f"task_{task}"] = float(hits[own].mean()) if hits is not None and bool(own.any()) else None
        return found

    def triangle(self, probe: str, now: Values) -> list[list[float | None]]:
        """The values ``task_0`` .. of a probe after each task so far, None above the diagonal."""
        rows = [*(values[probe] for values in self.earlier), now]
        return [[row.get(f"task_{j}") for j in range(len(rows))] for row in rows]

    def with_forgetting(self, probe: str, scores: Tensor | None) -> Values:
        """:meth:`by_task` with the forgetting of the probe's own accuracy matrix."""
        found = self.by_task(scores)
        return {**found, "forgetting": forgetting(self.triangle(probe, found))}

    def heads(self, of: Frozen) -> Tensor:
        """Logits with those of unknown classes at -inf, and those of other tasks where tasks are known."""
        return self.own_task(of, of.logits.masked_fill(~self.known, -torch.inf))

    def own_task(self, of: Frozen, scores: Tensor) -> Tensor:
        """Scores (N, C) with classes of other tasks at -inf where an image's task is known; else as they are."""
        heads = self.probing.evaluator.heads
        if heads is None:
            return scores
        return scores.where(heads[: scores.shape[1]] == heads[of.labels][:, None], -torch.inf)


def probes_csv(tasks: list[dict[str, dict[str, Any]]]) -> bytes:
    """``probes.csv``: task, probe, name, value; an undefined value is an empty cell.

    >>> probes_csv([{"knn": {"accuracy": 0.5, "forgetting": None}}]).decode().splitlines()
    ['task,probe,name,value', '0,knn,accuracy,0.5', '0,knn,forgetting,']
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("task", "probe", "name", "value"))
    for task, probes in enumerate(tasks):
        for probe, values in probes.items():
            writer.writerows([task, probe, n, "" if v is None else repr(v)] for n, v in values.items())
    return text.getvalue().encode()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _kept_name(task: int) -> str:
    return f"probes/task-{task:03d}.safetensors"
