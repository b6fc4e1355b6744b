"""What an accuracy is of: the stack's own rule, or a probe of the encoder, where no head can have learned a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import registry
from ..errors import Interrupted, UsageError
from ..metrics.moments import ClassMoments
from ..metrics.probes import NEIGHBOURS, fit_linear, knn_scores, nearest_mean_scores
from ..settings import schema as settings
from ..strategy import Predictor, Strategy
from ..streams.labels import labelled_somewhere

if TYPE_CHECKING:
    from ..federation.node import Node
    from ..strategy import Arrays
    from ..stream import Scenario, Split
    from .evaluation import Evaluator, Ints

PROBED = ("knn", "linear", "nearest_mean")
"""Values of ``evaluate.predict`` that judge features, whatever the stack predicts with."""

Scores = Callable[[Tensor], Tensor]
"""Features (N, d) to scores (N, C)."""


def settle_evaluation(config: settings.Config, scenario: type[Scenario], split: Split) -> settings.Config:
    """The settings with ``evaluate.predict`` resolved and with the probes that the scenario is about.

    Raises:
        UsageError: the head is to be judged although no image is labelled, or a probe where clients have tasks of their
            own.
    """
    evaluate = config.evaluate
    named = labelled_somewhere(split)
    if evaluate.predict == "head" and not named:
        allowed = f"must be {', '.join(PROBED[:-1])} or {PROBED[-1]}: no image is labelled, so that no head learns"
        raise UsageError("evaluate.predict", "head", allowed, PROBED)
    predict = evaluate.predict
    if predict == "auto":
        predict = "head" if named else "knn"
    if predict in PROBED and config.time.order != "common":
        allowed = f"must be common with evaluate.predict={predict}: a probe judges tasks that all have in common"
        raise UsageError("time.order", config.time.order, allowed, ("common",))
    changed = [registry.load("scenarios", name, "scenario.of") for name in config.scenario.of]
    own = [name for one in (scenario, *changed) for name in one.probes] if config.time.order == "common" else []
    probes = list(dict.fromkeys([*evaluate.probes, *own]))
    return replace(config, evaluate=replace(evaluate, predict=predict, probes=probes))


@dataclass(frozen=True)
class Judged(Predictor):
    """A predictor whose scores are those of a probe.

    Attributes:
        judge: has the probe as its ``predict``.
    """

    judge: Strategy = field(default_factory=Strategy)


class Judge(Strategy):
    """A probe that was fitted to the features of a model, in the place of the stack's rule."""

    name = "probe"

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        width = len(predictor.known)
        return self.scores(predictor.forward(x).features)[:, :width]


def judge(evaluator: Evaluator, arrays: Arrays, task: int) -> Judge:
    """The probe that ``evaluate.predict`` names, fitted to labelled training images of the classes known after a task.

    At most ``evaluate.probe_samples`` of each class and task, the same ones as the probes of that name train on. Their
    labels are the experimenter's: no client sees them.
    """
    from .probing import panel_rows

    node, stream = evaluator.node, evaluator.stream
    config = node.config
    stages = [stage.train_ids for stage in stream.stages[: task + 1]]
    rows, _ = panel_rows(stages, stream.train_labels, config.evaluate.probe_samples, config.seed, "probe", "train")
    rows = rows[np.isin(stream.train_labels[rows], stream.known(task))]
    features = features_of(node, arrays, rows)
    labels = torch.from_numpy(stream.train_labels[rows]).to(features.device)
    return Judge(fitted(config.evaluate.predict, features, labels, stream.num_classes))


def fitted(probe: str, features: Tensor, labels: Tensor, classes: int) -> Scores:
    """The scores of one of :data:`PROBED` on training features (N, d) with labels (N,)."""
    if probe == "knn":
        return lambda x: knn_scores(x, features, labels, classes, min(NEIGHBOURS, len(labels)))
    if probe == "linear":
        return fit_linear(features, labels, classes).scores
    moments = ClassMoments.of(F.normalize(features, dim=1), labels, classes)
    return lambda x: nearest_mean_scores(F.normalize(x, dim=1), moments)


@torch.no_grad()
def features_of(node: Node, arrays: Arrays, rows: Ints) -> Tensor:
    """Features (N, d) of rows of the training store.

    Raises:
        Interrupted: the user asked to stop.
    """
    found = []
    for part in torch.split(torch.from_numpy(rows).to(node.store.device), node.config.evaluate.batch_size):
        if node.stop():
            raise Interrupted("interrupted during evaluation")
        with node.autocast():
            out = node.forward(arrays, node.store.batch(part, node.dtype), "eval")
        found.append(out.features.to(node.dtype))
    return torch.cat(found)


def told(evaluator: Evaluator) -> str:
    """What the accuracies of a run are of, for its summary."""
    node = evaluator.node
    evaluate, owner = node.config.evaluate, node.stack.owners["predict"]
    among = "" if evaluate.top == 1 else f", right where the class is among the {evaluate.top} best"
    if evaluate.predict not in PROBED:
        return ("the head" if owner is None else f"strategy {owner.name}") + among
    most = f"{evaluate.probe_samples}" if evaluate.probe_samples else "all"
    return (
        f"a {evaluate.predict} probe of frozen features, trained on {most} training images of each class and task with "
        f"the experimenter's labels{among}"
    )
