"""Accuracy by the clients' own clocks: each client's matrix in the order of its own tasks, and their mean.

``R_k[i, j]`` is the accuracy of the global model after client k's i-th own task on what its j-th own task is tested on;
only classes that the client knows by then may be predicted. Where all clients are in step this is the usual matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import Interrupted
from ..local.training import blame
from ..metrics.clients import summarise_client_matrices
from ..records.files import to_json
from ..strategy import Arrays, Models, Predictor, Strategy
from .evaluation import best
from .tallies import Table, ratio

if TYPE_CHECKING:
    from ..data.store import TensorStore
    from ..federation.node import Node
    from ..models.model import Output
    from ..streams.clocks import Clocks
    from .evaluation import Evaluator

Ints = npt.NDArray[np.int64]
Measured = list[list[Any]]
"""After a stage, [client, how many images of each of its own tasks are right] for each client that is there; JSON."""

CLIENT_MATRICES = "client_matrices.json"


@dataclass
class Remembered:
    """Models whose last forward pass on the same images is not done again."""

    models: Models
    last: tuple[Tensor, str | Arrays, tuple[Any, ...], Output] | None = None

    def __call__(
        self,
        x: Tensor,
        which: str | Arrays,
        mode: Literal["train", "eval"],
        taps: tuple[str, ...] = (),
        seed: Tensor | None = None,
    ) -> Output:
        how, last = (mode, taps, seed), self.last
        if last is None or last[0] is not x or last[1] is not which or last[2] != how:
            last = self.last = (x, which, how, self.models(x, which, mode, taps, seed))
        return last[3]

    def apply(
        self,
        module: str,
        which: str | Arrays,
        inputs: tuple[Tensor, ...],
        mode: Literal["train", "eval"],
        seed: Tensor | None = None,
    ) -> Any:
        """See :meth:`fedcl.strategy.Models.apply`."""
        return self.models.apply(module, which, inputs, mode, seed)


@torch.no_grad()
def predict_among(
    node: Node, predictor: Predictor, store: TensorStore, rows: Ints, owner: Strategy, masks: Sequence[Tensor]
) -> Ints:
    """Predicted class positions (M, N) of N rows of a store among the classes of each of M masks, by the rule of
    ``owner``; one pass of the model for all masks.

    Raises:
        RunFailed: the scores of a class that may be predicted are not a number, or of another shape than (B, C).
    """
    found = []
    for part in torch.split(torch.from_numpy(rows).to(store.device), node.config.evaluate.batch_size):
        if node.stop():
            raise Interrupted("interrupted during evaluation")
        x, models = store.batch(part, node.dtype), Remembered(predictor.models)
        labels, chosen = store.label_tensor[part], []
        for mask in masks:
            with node.autocast(), blame(owner, "predict"):
                scores = owner.predict(replace(predictor, known=mask, models=models), x)
            chosen.append(best(scores, mask, labels, node.config.evaluate.top))
        found.append(torch.stack(chosen))
    return torch.cat(found, dim=1).cpu().numpy() if found else np.zeros((len(masks), 0), dtype=np.int64)


@dataclass(frozen=True)
class OwnMatrices:
    """What a run with clocks of the clients' own measures after each stage, and what becomes of it."""

    evaluator: Evaluator
    clocks: Clocks

    @cached_property
    def rows(self) -> Ints:
        """All test rows of the stream, ascending."""
        return np.unique(np.concatenate([stage.test_ids for stage in self.evaluator.stream.stages]))

    @cached_property
    def labels(self) -> Ints:
        """Of :attr:`rows`."""
        return self.evaluator.stream.test_labels[self.rows]

    def cells(self, right: npt.NDArray[np.bool_]) -> Ints:
        """How many of the rows that ``right`` picks belong to each class, or to each task of the stream."""
        stream = self.evaluator.stream
        if self.clocks.tested == "classes":
            return np.bincount(self.labels[right], minlength=stream.num_classes)
        places = [np.searchsorted(self.rows, stage.test_ids) for stage in stream.stages]
        return np.array([int(right[place].sum()) for place in places], dtype=np.int64)

    def by_task(self, counts: Ints, client: int) -> list[int]:
        """The same numbers for each own task of a client."""
        return [int(sum(counts[cell] for cell in column)) for column in self.clocks.columns(client)]

    @cached_property
    def totals(self) -> list[list[int]]:
        """Test images of each own task of each client."""
        counts = self.cells(np.ones(len(self.rows), dtype=bool))
        return [self.by_task(counts, client) for client in range(len(self.clocks.classes))]

    @property
    def total(self) -> list[int]:
        """Test images of the i-th own tasks of all clients."""
        longest = max(map(len, self.totals))
        return [sum(own[i] for own in self.totals if len(own) > i) for i in range(longest)]

    def measure(self, predictor: Predictor, stage: int) -> tuple[Measured, list[npt.NDArray[np.bool_]]]:
        """What is right after a stage: for each client that is there, and at the server, which knows what any client
        does, for the test images of each task of the stream in the order of ``test_ids``."""
        node, clocks = self.evaluator.node, self.clocks
        width = len(predictor.known)
        known = {client: clocks.known(stage, client) for client in clocks.present(stage)}
        distinct = [*dict.fromkeys([clocks.server_known(stage), *known.values()])]
        owner = node.stack.owners["predict"] or Strategy()
        masks = [node.mask(width, classes) for classes in distinct]
        right = predict_among(node, predictor, self.evaluator.test, self.rows, owner, masks) == self.labels
        counts = {classes: self.cells(row) for classes, row in zip(distinct, right, strict=True)}
        places = [np.searchsorted(self.rows, s.test_ids) for s in self.evaluator.stream.stages]
        measured: Measured = [[client, self.by_task(counts[classes], client)] for client, classes in known.items()]
        return measured, [right[0][place] for place in places]

    def seen(self, measured: Measured, stage: int) -> float | None:
        """Accuracy on the own tasks so far, over their images, averaged over the clients that are there."""
        found = []
        for client, correct in measured:
            met = self.clocks.met(stage, client)
            count = sum(self.totals[client][:met])
            if count:
                found.append(sum(correct[:met]) / count)
        return float(np.mean(found)) if found else None

    def baseline(self, predictor: Predictor) -> list[float | None]:
        """Accuracy of an untrained model on the i-th own tasks, averaged over the clients."""
        node = self.evaluator.node
        owner, everything = node.stack.owners["predict"] or Strategy(), torch.ones_like(predictor.known)
        right = predict_among(node, predictor, self.evaluator.test, self.rows, owner, [everything])[0] == self.labels
        counts = self.cells(right)
        rows = [self.accuracies(client, self.by_task(counts, client)) for client in range(len(self.totals))]
        return averaged([[row] for row in rows])[0]

    def accuracies(self, client: int, correct: Sequence[int]) -> list[float | None]:
        """Of counts of a client's own tasks; None for a task without test images."""
        return [ratio(c, n) for c, n in zip(correct, self.totals[client], strict=True)]

    def matrices(self, records: Sequence[Measured]) -> dict[int, Table]:
        """Each client's rows measured so far; of clients that have been there."""
        found: dict[int, Table] = {}
        for measured in records:
            for client, correct in measured:
                found.setdefault(client, []).append(self.accuracies(client, correct))
        return dict(sorted(found.items()))

    def matrix(self, records: Sequence[Measured]) -> Table:
        """The mean of the clients' matrices; as many columns as the most own tasks that a client has."""
        return averaged(list(self.matrices(records).values()), len(self.total))

    def summary(self, records: Sequence[Measured]) -> dict[str, Any]:
        """Every metric of the clients' own matrices over clients: weighted mean, mean, deviation, worst tenth."""
        matrices = self.matrices(records)
        totals = [self.totals[client] for client in matrices]
        return {n: asdict(s) for n, s in summarise_client_matrices(list(matrices.values()), totals).items()}

    def written(self, records: Sequence[Measured]) -> bytes:
        """JSON: for each client its stages, tasks of the stream (null with classes of its own), original class ids of
        each own task, test images and matrix."""
        order = self.evaluator.stream.class_order
        clients = [
            {
                "client": client,
                "stages": [stage for stage, own in enumerate(self.clocks.own) if own[client] >= 0],
                "tasks": list(self.clocks.tasks[client]) if self.clocks.tasks else None,
                "classes": [[order[label] for label in task] for task in self.clocks.classes[client]],
                "test_counts": self.totals[client],
                "matrix": matrix,
            }
            for client, matrix in self.matrices(records).items()
        ]
        return to_json({"clients": clients}).encode() + b"\n"


def own_matrices(evaluator: Evaluator) -> OwnMatrices | None:
    """What measures by the clients' own clocks, where they have such clocks."""
    clocks = evaluator.split.own_clocks
    return None if clocks is None else OwnMatrices(evaluator, clocks)


def averaged(tables: Sequence[Table], columns: int | None = None) -> Table:
    """The mean of tables of different sizes: each entry over those that have it; None where none has.

    >>> averaged([[[1.0, 0.0], [0.5, 1.0]], [[0.5]]])
    [[0.75, 0.0], [0.5, 1.0]]
    """
    columns = max((len(row) for table in tables for row in table), default=0) if columns is None else columns
    out: Table = []
    for i in range(max(map(len, tables), default=0)):
        rows = [table[i] for table in tables if len(table) > i]
        entries = [[row[j] for row in rows if len(row) > j and row[j] is not None] for j in range(columns)]
        out.append([float(np.mean(entry)) if entry else None for entry in entries])  # type: ignore[arg-type]
    return out
