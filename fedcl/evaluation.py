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


@torch.no_grad()
def predict(node: Node, predictor: Predictor, store: TensorStore, rows: Ints, owner: Strategy) -> Ints:
    """Predicted class positions of rows of a store, by the rule of ``owner``.

    Raises:
        RunFailed: scores are not a number, or have another shape than (B, C).
    """
    found = []
    for part in torch.split(torch.from_numpy(rows).to(store.device), node.config.evaluate.batch_size):
        if node.stop():
            raise Interrupted("interrupted during evaluation")
        with node.autocast(), blame(owner, "predict"):
            scores = owner.predict(predictor, store.batch(part, node.dtype))
        if scores.shape != (len(part), len(predictor.known)):
            raise RunFailed(
                f"evaluation: predict returned scores of shape {tuple(scores.shape)}, "
                f"expected {(len(part), len(predictor.known))}"
            )
        if bool(torch.isnan(scores[:, predictor.known]).any()):
            raise RunFailed("evaluation: the scores of known classes are not a number")
        found.append(scores.masked_fill(~predictor.known, -torch.inf).argmax(dim=1))
    return torch.cat(found).cpu().numpy() if found else np.zeros(0, dtype=np.int64)


def head_correct(node: Node, arrays: Arrays, known: Tensor, store: TensorStore, rows: Ints) -> int:
    """How many rows of a store a model's head gets right.

    The head, whatever the stack predicts with: a client's model has no statistics of the server yet.
    """
    found = predict(node, Predictor(arrays, {}, known, NamedModels(node, {})), store, rows, Strategy())
    return int((found == store.labels[rows]).sum())


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

    def known(self, task: int) -> Tensor:
        """(C,) bool mask of the classes seen up to ``task``, C the width of the head."""
        seen = list(self.stream.known(task))
        width = self.stream.num_classes if self.node.config.model.head_allocate == "all" else len(seen)
        mask = torch.zeros(width, dtype=torch.bool, device=self.node.store.device)
        mask[seen] = True
        return mask

    def predictor(self, arrays: Arrays, strategies: dict[str, Arrays], known: Tensor) -> Predictor:
        """What the owner of ``predict`` sees."""
        owner = self.node.stack.owners["predict"]
        state = strategies.get(owner.name, {}) if owner else {}
        return Predictor(arrays, state, known, NamedModels(self.node, {}))

    def predict(self, predictor: Predictor, store: TensorStore, rows: Ints) -> Ints:
        """Predicted class positions of rows of a store by the rule of the stack; see :func:`predict`."""
        return predict(self.node, predictor, store, rows, self.node.stack.owners["predict"] or Strategy())

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

    def newcomers(self, predictor: Predictor) -> dict[str, Any] | None:
        """The global model on the images of the clients that never train: their own test images where there are some,
        else all that they hold. Each client's (correct, total) by task, or None without such clients.
        """
        never = self.split.held_out
        if never is None:
            return None
        tests = never.rows if never.test is None else never.test
        on_test = never.test_store == "test"
        store, labels = (self.test, self.stream.test_labels) if on_test else (self.node.store, self.stream.train_labels)
        rows = np.unique(np.concatenate([ids for task in tests for ids in task]))
        hit = np.zeros(len(labels), dtype=bool)
        hit[rows] = self.predict(predictor, store, rows) == labels[rows]
        clients = range(never.clients)
        return {
            "correct": [[int(hit[task[c]].sum()) for task in tests] for c in clients],
            "total": [[len(task[c]) for task in tests] for c in clients],
        }

    def own_test(self) -> tuple[TensorStore, Ints]:
        """The store that personal test rows are of, and its labels."""
        if self.split.test_store == "test":
            return self.test, self.stream.test_labels
        return self.node.store, self.stream.train_labels

    def by_head(self, arrays: Arrays, known: Tensor, task: int, client: int) -> tuple[int, int] | None:
        """(correct, total) of a model's head on a client's own test images of one task; None without such images."""
        tests = self.split.test
        if tests is None or not self.node.config.evaluate.personal or not len(tests[task][client]):
            return None
        rows = tests[task][client]
        return head_correct(self.node, arrays, known, self.own_test()[0], rows), len(rows)

    def personal(
        self, arrays: Arrays, strategies: dict[str, Arrays], known: Tensor, upto: int
    ) -> dict[str, Any] | None:
        """Each client's (correct, total) on its own test images of every task, or None where there are none.

        A client with private parts is tested with them; without any, one pass serves all clients.
        """
        tests = self.split.test
        if tests is None or not self.node.config.evaluate.personal:
            return None
        store, labels = self.own_test()
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
