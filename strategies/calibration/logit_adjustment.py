"""Logit adjustment: class priors enter the loss, or leave the scores of a model that was trained without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fedcl.blocks.class_counts import adjusted
from fedcl.blocks.statistics import widen
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Predictor, Step, cross_entropy

from ._counts import Counting, Counts

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


class LogitAdjustment(Counting):
    """CE(o + tau log pi, y) in training; or plain training and argmax of o - tau log pi."""

    name = "logit_adjustment"
    family = "calibration"
    stackable = True
    yields = ("predict",)
    neutral = {"tau": 0.0}
    card = Card(
        title="Long-tail learning via logit adjustment",
        authors="Menon, Jayasumana, Rawat, Jain, Veit, Kumar",
        venue="ICLR",
        year=2021,
        bibtex="""@inproceedings{menon2021long,
  title = {Long-tail learning via logit adjustment},
  author = {Menon, Aditya Krishna and Jayasumana, Sadeep and Rawat, Ankit Singh and Jain, Himanshu and Veit, Andreas and
            Kumar, Sanjiv},
  booktitle = {ICLR},
  year = {2021}
}""",
        certainty="Both forms are standard. With tau=1 the loss is balanced softmax; with counts=local it "
        "is like FedLC's calibration.",
        leaves_client=(("counts", "classes", "sum", "start of a task, with counts=global"),),
        server_state="with counts=global: images a class of all tasks so far",
        cost="None; with counts=global one number a class up and down a task.",
        notes="A class without an image counts as one with a single image. mode=post_hoc changes the scores "
        "of the global model by the priors of all tasks so far, needs counts=global and stands beside any loss. In a "
        "class-incremental stream the priors of the images seen are not those of the last task, which is "
        "what biases a model there.",
    )

    @dataclass(frozen=True)
    class Options:
        tau: float = option(1.0, "strength of the adjustment")
        mode: Literal["loss", "post_hoc"] = option("loss", "in the training loss, or at prediction")
        counts: Counts = option(
            "local", "images a class of the client in this task, or of all clients and tasks so far"
        )

        def __post_init__(self) -> None:
            if not 0 <= self.tau < float("inf"):
                raise ValueError(f"tau must be at least 0, not {self.tau}")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        if self.options.mode == "post_hoc":  # any loss may train the model, but only these scores are adjusted
            self.yields = ("task_loss",)

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        super().check(config, stream, split)
        if self.options.mode == "post_hoc" and self.counts == "local":
            allowed = "global with mode=post_hoc: the server has no counts of its own"
            raise UsageError("options.logit_adjustment.counts", "local", allowed, ("global",))

    def task_loss(self, step: Step) -> Tensor:
        logits = step.output.logits
        if self.options.mode == "loss":
            logits = adjusted(logits, self.of(step), self.options.tau)
        return cross_entropy(logits, step.y, step.among(step.known))

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        logits = predictor.forward(x).logits
        if self.options.mode == "loss" or "counts" not in predictor.state:
            return logits
        return adjusted(logits, widen(predictor.state["counts"], logits.shape[-1]), -self.options.tau)
