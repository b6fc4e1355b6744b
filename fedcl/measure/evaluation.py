"""Testing a model: one pass over all test images, rows of the accuracy matrix, and each client on its own test set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import Interrupted, RunFailed
from ..local.training import NamedModels, blame
from ..masks import on_device
from ..strategy import Arrays, Predictor, Strategy
from .judging import PROBED, Judged, judge
from .newcomers import model_of_newcomer

if TYPE_CHECKING:
    from ..data.store import TensorStore
    from ..federation.node import Node
    from ..stream import Split, Stage, Stream

Ints = npt.NDArray[np.int64]


def best(scores: Tensor, known: Tensor, labels: Tensor, top: int) -> Tensor:
    """Predicted class positions (B,): of the best score, or the label itself where it is among the ``top`` best.

    Args:
        scores: (B, C).
        known: (C,) bool mask of the classes that may be predicted.
        labels: (B,) int64, read only where ``top`` is above 1.

    Raises:
        RunFailed: a known class's score is not a number, or the shape is another one.

    >>> scores, known = torch.tensor([[5.0, 2.0, 3.0, 9.0]]), torch.tensor([True, True, True, False])
    >>> [best(scores, known, torch.tensor([2]), top).item() for top in (1, 2)]
    [0, 2]
    """
    if scores.shape != (len(labels), len(known)):
        shapes = f"{tuple(scores.shape)}, expected {(len(labels), len(known))}"
        raise RunFailed(f"evaluation: predict returned scores of shape {shapes}")
    if bool(torch.isnan(scores[:, known]).any()):
        raise RunFailed("evaluation: the scores of known classes are not a number")
    scores = scores.masked_fill(~known, -torch.inf)
    first = scores.argmax(dim=1)
    if top == 1:
        return first
    ranked = scores.topk(min(top, int(known.sum())), dim=1).indices
    return torch.where((ranked == labels[:, None]).any(dim=1), labels, first)


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
        found.append(best(scores, predictor.known, store.label_tensor[part], node.config.evaluate.top))
    return torch.cat(found).cpu().numpy() if found else np.zeros(0, dtype=np.int64)


def predict_by_task(
    node: Node, predictor: Predictor, store: TensorStore, rows: Ints, owner: Strategy, heads: Tensor | None
) -> Ints:
    """As :func:`predict`; where tasks are known at test each row among the classes of its own task.

    Args:
        heads: (C,) int64, the task of each class; None: every row among ``predictor.known``.

    A row whose task has no class in ``predictor.known`` cannot be predicted: -1.
    """
    if heads is None:
        return predict(node, predictor, store, rows, owner)
    tasks = heads.cpu().numpy()[store.labels[rows]] if len(rows) else rows
    found = np.full(len(rows), -1, dtype=np.int64)
    width = len(predictor.known)
    for task in np.unique(tasks).tolist():
        own = predictor.known & (heads[:width] == task)
        if bool(own.any()):
            mine = tasks == task
            found[mine] = predict(node, replace(predictor, known=own), store, rows[mine], owner)
    return found


def head_correct(
    node: Node, arrays: Arrays, known: Tensor, store: TensorStore, rows: Ints, heads: Tensor | None = None
) -> int:
    """How many rows of a store a model's head gets right.

    The head, whatever the stack predicts with: a client's model has no statistics of the server yet.
    """
    predictor = Predictor(arrays, {}, known, NamedModels(node, {}))
    found = predict_by_task(node, predictor, store, rows, Strategy(), heads)
    return int((found == store.labels[rows]).sum())


def counted(hits: list[npt.NDArray[np.bool_]]) -> tuple[list[int], list[int]]:
    """(correct, total) of each task."""
    return [int(h.sum()) for h in hits], [len(h) for h in hits]


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

    def seen(self, task: int) -> tuple[int, ...]:
        """Class positions seen up to ``task``: by all clients in step, or by any one by its own clock."""
        clocks = self.split.own_clocks
        return self.stream.known(task) if clocks is None else clocks.server_known(task)

    def met(self, task: int) -> tuple[Stage, ...]:
        """The tasks that images to measure on are of: those up to ``task``; all, by clocks of the clients' own."""
        return self.stream.stages[: task + 1] if self.split.own_clocks is None else self.stream.stages

    def known_to(self, task: int, client: int) -> Tensor:
        """(C,) bool mask of the classes that a client knows after stage ``task``."""
        clocks, known = self.split.own_clocks, self.known(task)
        return known if clocks is None else self.node.mask(len(known), clocks.known(task, client))

    def known(self, task: int) -> Tensor:
        """(C,) bool mask of the classes seen up to ``task``, C the width of the head."""
        seen = list(self.seen(task))
        width = self.stream.num_classes if self.node.config.model.head_allocate == "all" else len(seen)
        mask = torch.zeros(width, dtype=torch.bool, device=self.node.store.device)
        mask[seen] = True
        return mask

    @cached_property
    def heads(self) -> Tensor | None:
        """(C,) int64: the task of each class where an image's task is known at test, else None."""
        return on_device(tuple(self.stream.heads), self.node.store.device)

    @cached_property
    def train(self) -> TensorStore:
        """The training images with the experimenter's labels, those included that no client sees."""
        return self.node.store.relabelled(self.stream.train_labels)

    @property
    def judged(self) -> bool:
        """Whether a probe of the features predicts, in the place of the stack's own rule."""
        return self.node.config.evaluate.predict in PROBED

    def predictor(
        self, arrays: Arrays, strategies: dict[str, Arrays], known: Tensor, task: int | None = None
    ) -> Predictor:
        """What the owner of ``predict`` sees, or a probe that was trained on the features of the images up to ``task``.

        Where tasks are known at test, a head that is not learned yet can be asked all the same: its rows are initial.
        """
        if self.judged and task is not None:
            return Judged(arrays, {}, known, NamedModels(self.node, {}), judge=judge(self, arrays, task))
        owner = self.node.stack.owners["predict"]
        if owner is None and self.heads is not None:
            width = self.stream.num_classes
            arrays = {n: self.node.grown(n, a, width, "initial") for n, a in arrays.items()}
            known = self.heads >= 0
        state = strategies.get(owner.name, {}) if owner else {}
        name = owner.name if owner else ""
        return Predictor(arrays, state, known, NamedModels(self.node, {}), strategy=name)

    def predict(self, predictor: Predictor, store: TensorStore, rows: Ints) -> Ints:
        """Predicted class positions of rows of a store by the rule of the stack; see :func:`predict`."""
        owner = self.node.stack.owners["predict"] or Strategy()
        owner = predictor.judge if isinstance(predictor, Judged) else owner
        return predict_by_task(self.node, predictor, store, rows, owner, self.heads)

    def hits(self, predictor: Predictor) -> list[npt.NDArray[np.bool_]]:
        """For each task, which of its test images are right, in the order of its ``test_ids``."""
        stages = self.stream.stages
        rows = np.concatenate([s.test_ids for s in stages])
        right = self.predict(predictor, self.test, rows) == self.stream.test_labels[rows]
        return np.split(right, np.cumsum([len(s.test_ids) for s in stages])[:-1])

    def row(self, predictor: Predictor) -> tuple[list[int], list[int]]:
        """(correct, total) on the test images of every task; a task that cannot be tested has total 0."""
        return counted(self.hits(predictor))

    def by_class(self, hits: list[npt.NDArray[np.bool_]], task: int) -> tuple[list[int], list[int]]:
        """(correct, total) of every class, (C,) each, on the test images of the tasks up to ``task``."""
        classes, stages = self.stream.num_classes, self.met(task)
        labels = np.concatenate([self.stream.test_labels[s.test_ids] for s in stages])
        right = np.bincount(labels[np.concatenate(hits[: len(stages)])], minlength=classes)
        total = np.bincount(labels, minlength=classes)
        if self.split.own_clocks is not None:
            unseen = np.isin(np.arange(classes), self.seen(task), invert=True)
            right[unseen] = total[unseen] = 0
        return right.tolist(), total.tolist()

    def validation(self, predictor: Predictor, task: int) -> tuple[int, int]:
        """(correct, total) on the held-out training images of all tasks up to ``task``; by clocks of the clients' own,
        on those of the classes that some client has met."""
        rows = np.concatenate([s.validation_ids for s in self.met(task)])
        if self.split.own_clocks is not None:
            rows = rows[np.isin(self.stream.train_labels[rows], self.seen(task))]
        hits = self.predict(predictor, self.train, rows) == self.stream.train_labels[rows]
        return int(hits.sum()), len(rows)

    def newcomers(
        self, predictor: Predictor, strategies: dict[str, Arrays] | None = None, last: int = 0
    ) -> dict[str, Any] | None:
        """The clients that never train, on their own test images where there are some, else on all that they hold: each
        with the model that the stack makes for it, else the global one. (correct, total) by task, or None without such
        clients.

        Args:
            strategies: the strategies' states at the server.
            last: the task that has just ended.
        """
        never = self.split.held_out
        if never is None:
            return None
        tests = never.rows if never.test is None else never.test
        on_test = never.test_store == "test"
        store, labels = (self.test, self.stream.test_labels) if on_test else (self.train, self.stream.train_labels)
        rows = np.unique(np.concatenate([ids for task in tests for ids in task]))
        hit = np.zeros(len(labels), dtype=bool)
        hit[rows] = self.predict(predictor, store, rows) == labels[rows]
        clients, correct = range(never.clients), []
        for c in clients:
            mine, model = hit, model_of_newcomer(self, predictor, strategies or {}, last, c)
            if model is not None:
                rows = np.unique(np.concatenate([task[c] for task in tests]))
                own = self.predictor(model, strategies or {}, self.known(last), last)
                mine = np.zeros_like(hit)
                mine[rows] = self.predict(own, store, rows) == labels[rows]
            correct.append([int(mine[task[c]].sum()) for task in tests])
        return {"correct": correct, "total": [[len(task[c]) for task in tests] for c in clients]}

    def own_test(self) -> tuple[TensorStore, Ints]:
        """The store that personal test rows are of, and its labels."""
        if self.split.test_store == "test":
            return self.test, self.stream.test_labels
        return self.train, self.stream.train_labels

    def by_head(self, arrays: Arrays, known: Tensor, task: int, client: int) -> tuple[int, int] | None:
        """(correct, total) of a model's head on a client's own test images of one task; None without such images."""
        tests = self.split.test
        if tests is None or not self.node.config.evaluate.personal or not len(tests[task][client]):
            return None
        rows = tests[task][client]
        return head_correct(self.node, arrays, known, self.own_test()[0], rows, self.heads), len(rows)

    def personal(self, arrays: Arrays, strategies: dict[str, Arrays], upto: int, last: int) -> dict[str, Any] | None:
        """Each client's (correct, total) on its own test images of every task, or None where there are none.

        A client with private parts, or one whose strategy predicts by its state, is tested with them; without any, one
        pass serves all clients that are in step. By its own clock a client is tested among the classes that it knows.

        Args:
            upto: the exchange whose client states count.
            last: the task that has just ended.
        """
        tests = self.split.test
        if tests is None or not self.node.config.evaluate.personal:
            return None
        store, labels = self.own_test()
        known, clients = self.known(last), len(tests[0])
        correct = [[0] * len(tests) for _ in range(clients)]
        total = [[len(task[c]) for task in tests] for c in range(clients)]
        hit = np.zeros(len(labels), dtype=bool)
        owners = self.node.stack.owners
        model, rule = owners["personal"], owners["predict"]
        by_state = model is not None or (rule is not None and rule.predicts_by_state)
        one_by_one = bool(self.node.private) or by_state or self.split.own_clocks is not None
        if not one_by_one:
            rows = np.unique(np.concatenate([ids for task in tests for ids in task]))
            hit[rows] = self.predict(self.predictor(arrays, strategies, known, last), store, rows) == labels[rows]
        for c in range(clients):
            if one_by_one:
                stored = self.node.clients.get(c, upto)
                merged = {**arrays, **self.node.private_arrays(stored, len(known))}
                if model is not None:
                    with blame(model, "personal"):
                        merged = model.personal(merged, self.node.state_of(model, stored, len(known)))
                own = self.node.state_of(rule, stored, len(known)) if rule is not None else {}
                rows = np.unique(np.concatenate([task[c] for task in tests]))
                mine = self.known_to(last, c)
                predictor = replace(self.predictor(merged, strategies, mine, last), client=c, own=own)
                # Before its first own task a client knows nothing that could be predicted.
                hit[rows] = bool(mine.any()) and (self.predict(predictor, store, rows) == labels[rows])
            for j, task in enumerate(tests):
                correct[c][j] = int(hit[task[c]].sum())
        return {"correct": correct, "total": total}
