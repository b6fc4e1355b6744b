"""Balanced softmax: the cross entropy of logits that are shifted by the logarithm of the class counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.blocks.class_counts import balanced_softmax
from fedcl.cards import Card, option
from fedcl.strategy import Step

from ._counts import Counting, Counts


class BalancedSoftmax(Counting):
    """Trains for a test set in which all classes are equally frequent; predicts by the plain logits."""

    name = "balanced_softmax"
    family = "calibration"
    stackable = True
    card = Card(
        title="Balanced Meta-Softmax for Long-Tailed Visual Recognition",
        authors="Ren, Yu, Sheng, Ma, Zhao, Yi, Li",
        venue="NeurIPS",
        year=2020,
        bibtex="""@inproceedings{ren2020balanced,
  title = {Balanced Meta-Softmax for Long-Tailed Visual Recognition},
  author = {Ren, Jiawei and Yu, Cunjun and Sheng, Shunan and Ma, Xiao and Zhao, Haiyu and Yi, Shuai and
            Li, Hongsheng},
  booktitle = {NeurIPS},
  year = {2020}
}""",
        certainty="Loss read in released code. The paper's meta sampler is not here. Whose counts are taken "
        "in a federation is a choice: a client's own (as FedETF and FedRoD do), or all clients'.",
        leaves_client=(("counts", "classes", "sum", "start of a task, with counts=global"),),
        server_state="with counts=global: images a class of all tasks so far",
        cost="None; with counts=global one number a class up and down a task.",
        notes="A class without an image counts as one with a single image. Old classes without any image in "
        "the present task get the largest margin of all, so that their logits are hardly pushed down.",
    )

    @dataclass(frozen=True)
    class Options:
        counts: Counts = option(
            "local", "images a class of the client in this task, or of all clients and tasks so far"
        )

    def task_loss(self, step: Step) -> Tensor:
        return balanced_softmax(step.output.logits, step.y, self.of(step), step.among(step.known))
