"""TEEN: means of few-shot classes are pulled towards the base classes that they resemble; nothing is trained for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.blocks.closed_form import cosine_scores
from fedcl.blocks.losses import cross_entropy
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, Predictor, Server, Step

from ._pooled import ADAPT, STATISTICS, Adapt, FrozenAfter, by_class, means_of

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def calibrate(prototypes: Tensor, base: Tensor, new: Tensor, alpha: float, temperature: float) -> Tensor:
    """``c_n <- (1 - alpha) c_n + alpha normalize(sum_b w_b c_b)``, ``w_b = softmax_b(temperature cos(c_n, c_b))``.

    Args:
        prototypes: (C, d); normalised here.
        base: (C,) bool. Without any, nothing is calibrated; a base class whose prototype is 0 plays no part.
        new: (C,) bool, the classes to be calibrated.
        alpha: between 0 and 1.
        temperature: the paper's tau, by which cosines are multiplied.

    Returns:
        (C, d); rows of classes that are not new are the normalised prototypes.

    >>> c = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> calibrate(c, torch.tensor([True, False]), torch.tensor([False, True]), 0.25, 16.0).tolist()
    [[1.0, 0.0], [0.25, 0.75]]
    """
    unit = F.normalize(prototypes, dim=1)
    if not base.any():
        return unit
    likeness = torch.where(base, temperature * unit @ unit.mT, -torch.inf)
    towards = F.normalize(likeness.softmax(dim=1) @ unit, dim=1)
    return torch.where(new[:, None], (1 - alpha) * unit + alpha * towards, unit)


def cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``scale cos(f, w_c)``, the classifier of the base session: (B, d) features and (C, d) rows to (B, C)."""
    return scale * F.linear(F.normalize(features, dim=1), F.normalize(weight, dim=1))


class TEEN(FrozenAfter):
    """Nearest class mean by cosine; the server moves the means of later classes towards similar base classes."""

    name = "teen"
    family = "prototype"
    yields = ("task_loss",)
    common_clock = "calibrates the classes that come after everybody's first task"
    card = Card(
        title="Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration",
        authors="Wang, Zhou, Zhang, Zhan, Ye",
        venue="NeurIPS",
        year=2023,
        bibtex="""@inproceedings{wang2023teen,
  title = {Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration},
  author = {Wang, Qi-Wei and Zhou, Da-Wei and Zhang, Yi-Kai and Zhan, De-Chuan and Ye, Han-Jia},
  booktitle = {NeurIPS},
  year = {2023}
}""",
        certainty="Calibration, tau = 16 and alpha = 0.5 (0.1 on CIFAR-100) read in the released code, as is the "
        "cosine classifier with scale 16 (32 on larger images) of the base session. The federated form is exact: sums "
        "and counts add up, and the server calibrates.",
        leaves_client=STATISTICS,
        server_state="sums and counts of all classes so far, and which classes are base classes",
        cost="One forward pass over the task's images and one small upload at the end of a task.",
        notes="Made for few_shot streams: the first task is the base session, which trains encoder and cosine "
        "classifier; the encoder is frozen from then on, and rounds train the head alone, which no prediction uses "
        "after the first task (federation.rounds counts for all tasks). adapt=none keeps a pre-trained encoder (init=) "
        "as it is. alpha=0 is the nearest class mean by cosine. Fills the task loss, unless another strategy of the "
        "stack has one. Counts of images a class leave the client. Where images are seen once "
        "(federation.passes=once), those of a round are counted by the model of that round.",
    )

    @dataclass(frozen=True)
    class Options:
        alpha: float = option(0.5, "how far a new mean is moved towards the base classes; 0.1 on CIFAR-100")
        temperature: float = option(16.0, "tau, by which the cosines with the base classes are multiplied")
        scale: float = option(16.0, "by which the cosines of the classifier of the base session are multiplied")
        adapt: Adapt = option("first", ADAPT)

        def __post_init__(self) -> None:
            if not 0 <= self.alpha <= 1:
                raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")
            for name, value in (("temperature", self.temperature), ("scale", self.scale)):
                if not 0 < value < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {value}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        super().check(config, stream, split)
        if config.model.head not in ("linear", "cosine"):
            allowed = f"linear or cosine: {self.name} trains the rows of the head as a cosine classifier"
            raise UsageError("model.head", config.model.head, allowed)

    # client

    def task_loss(self, step: Step) -> Tensor:
        logits = cosine_logits(step.output.features, step.params["head.weight"], self.options.scale)
        return cross_entropy(logits, step.y, step.among(step.known))

    # server

    def begin_task(self, server: Server) -> Arrays:
        return server.state or {"base": server.known.clone()}

    def by_head(self, predictor: Predictor, x: Tensor) -> Tensor:
        features = predictor.forward(x).features
        return cosine_logits(features, predictor.arrays["head.weight"], self.options.scale)

    def scores(self, predictor: Predictor, features: Tensor) -> Tensor:
        means, counts = means_of(predictor)
        base = by_class(predictor, "base")
        found = calibrate(means, base, ~base, self.options.alpha, self.options.temperature)
        return cosine_scores(features, found.to(features.dtype), counts)
