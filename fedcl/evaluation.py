"""Testing a model: one pass over all test images, rows of the accuracy matrix, and each client on its own test set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import Interrupted, RunFailed
from .strategy import Arrays, Predictor, Strategy
from .training import NamedModels, blame

if TYPE_CHECKING:
    from .data.store import TensorStore
    from .federation.node import Node
    from .stream import Split, Stream

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evaluator:
    """Predictions of a model with the stack's own rule.

    Attributes:
        test: the test images, labelled with class positions.
        width: classes the model can score.
    """

    node: Node
    stream: Stream
    split: Split
    test: TensorStore

    def predictor(self, arrays: Arrays, strategies: dict[str, Arrays], known: Tensor) -> Predictor:
        """What the owner of ``predict`` sees."""
        owner = self.node.stack.owners["predict"]
        state = strategies.get(owner.name, {}) if owner else {}
        return Predictor(arrays, state, known, NamedModels(self.node, {}))

    @torch.no_grad()
    def predict(self, predictor: Predictor, store: TensorStore, rows: Ints) -> Ints:
        """Predicted class positions of rows of a store.

        Raises:
            RunFailed: scores are not a number, or have another shape than (B, C).
        """
        owner = self.node.stack.owners["predict"] or Strategy()
        found = []
        dtype = self.node.dtype
        for part in torch.split(torch.from_numpy(rows).to(store.device), self.node.config.evaluate.batch_size):
            if self.node.stop():
                raise Interrupted("interrupted during evaluation")
            with self.node.autocast(), blame(owner, "predict"):
                scores = owner.predict(predictor, store.batch(part, dtype))
            if scores.shape != (len(part), len(predictor.known)):
                raise RunFailed(
                    f"evaluation: predict returned scores of shape {tuple(scores.shape)}, "
                    f"expected {(len(part), len(predictor.known))}"
                )
            if bool(torch.isnan(scores[:, predictor.known]).any()):
                raise RunFailed("evaluation: the scores of known classes are not a number")
            found.append(scores.masked_fill(~predictor.known, -torch.inf).argmax(dim=1))
        return torch.cat(found).cpu().numpy() if found else np.zeros(0, dtype=np.int64)

    def row(self, predictor: Predictor) -> tuple[list[int], list[int]]:
        """(correct, total) on the test images of every task; a task that cannot be tested has total 0."""
        stages = self.stream.stages
        rows = np.concatenate([s.test_ids for s in stages])
        hits = self.predict(predictor, self.test, rows) == self.stream.test_labels[rows]
        ends = np.cumsum([len(s.test_ids) for s in stages])[:-1]
        return [int(h.sum()) for h in np.split(hits, ends)], [len(s.test_ids) for s in stages]

    def validation(self, predictor: Predictor, task: int) -> tuple[int, int]:
        """(correct, total) on the held-out training images of all tasks up to ``task``."""
        rows = np.concatenate([s.validation_ids for s in self.stream.stages[: task + 1]])
        hits = self.predict(predictor, self.node.store, rows) == self.stream.train_labels[rows]
        return int(hits.sum()), len(rows)

    def personal(
        self, arrays: Arrays, strategies: dict[str, Arrays], known: Tensor, upto: int
    ) -> dict[str, Any] | None:
        """Each client's (correct, total) on its own test images of every task, or None where there are none.

        A client with private parts is tested with them; without any, one pass serves all clients.
        """
        tests = self.split.test
        if tests is None or not self.node.config.evaluate.personal:
            return None
        store, labels = (
            (self.test, self.stream.test_labels)
            if self.split.test_store == "test"
            else (self.node.store, self.stream.train_labels)
        )
        clients = len(tests[0])
        correct = [[0] * len(tests) for _ in range(clients)]
        total = [[len(task[c]) for task in tests] for c in range(clients)]
        hit = np.zeros(len(labels), dtype=bool)
        if not self.node.private:
            rows = np.unique(np.concatenate([ids for task in tests for ids in task]))
            hit[rows] = self.predict(self.predictor(arrays, strategies, known), store, rows) == labels[rows]
        for c in range(clients):
            if self.node.private:
                own = self.node.private_arrays(self.node.clients.get(c, upto), len(known))
                rows = np.unique(np.concatenate([task[c] for task in tests]))
                hit[rows] = (
                    self.predict(self.predictor({**arrays, **own}, strategies, known), store, rows) == labels[rows]
                )
            for j, task in enumerate(tests):
                correct[c][j] = int(hit[task[c]].sum())
        return {"correct": correct, "total": total}
