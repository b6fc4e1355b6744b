"""SLCA: a slow encoder and a fast head, and at each task's end a head aligned with class Gaussians for evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.blocks.statistics import Form, class_means
from fedcl.cards import Card, option
from fedcl.local.optim import Group
from fedcl.strategy import Arrays, Server, Step, cross_entropy

from ..federated.finetune import new_or_known
from ._post_hoc import GaussianHead, Sgd, Use


def shrunk(means: Tensor, born: Tensor, task: int) -> Tensor:
    """Class means times ``0.9 + 0.1 (t_c + 1) / (t + 1)``: those of older tasks are drawn towards 0.

    Args:
        means: (C, d).
        born: (C,) int64, the task t_c of each class.
        task: the present task t, from 0.

    >>> shrunk(torch.ones(2, 1), torch.tensor([0, 1]), 1).flatten().tolist()
    [0.949999988079071, 1.0]
    """
    return means * (0.9 + 0.1 * (born + 1).to(means.dtype) / (task + 1))[:, None]


def normalised_cross_entropy(
    logits: Tensor, labels: Tensor, classes: Tensor, born: Tensor, temperature: float
) -> Tensor:
    """Cross entropy of ``o / (tau n)``, n the mean over tasks of the norm of an image's logits of that task.

    Args:
        logits: (B, C).
        labels: (B,) int64.
        classes: (C,) or (B, C) bool, those that compete.
        born: (C,) int64, the task of each class.
        temperature: tau.
    """
    inside = torch.where(classes, logits, 0.0)
    tasks = torch.unique(born[classes if classes.dim() == 1 else classes.any(dim=0)])
    norms = torch.stack([torch.linalg.vector_norm(inside[:, born == t], dim=1) for t in tasks], dim=1)
    competing = torch.stack([classes[..., born == t].any(dim=-1).expand(len(logits)) for t in tasks], dim=1)
    mean = norms.sum(dim=1) / competing.sum(dim=1)
    # As in the released code: logits that are all zero stay so.
    return cross_entropy(logits / (temperature * (mean[:, None] + 1e-7)), labels, classes)


def reverse_cross_entropy(logits: Tensor, labels: Tensor, classes: Tensor, floor: float = 1e-4) -> Tensor:
    """``-mean_i sum_c p_ic log(max(onehot_ic, floor))``, which is ``-log(floor) (1 - p_iy)`` (SLCA++).

    Args:
        logits: (B, C).
        labels: (B,) int64, each in ``classes``.
        classes: (C,) or (B, C) bool, what the softmax runs over.

    >>> logits = torch.zeros(1, 3)
    >>> round(reverse_cross_entropy(logits, torch.tensor([0]), torch.tensor([True, True, False])).item(), 4)
    4.6052
    """
    p = torch.where(classes, logits, torch.finfo(logits.dtype).min).softmax(dim=-1)
    right = p.gather(-1, labels[:, None]).squeeze(-1)
    loss: Tensor = -math.log(floor) * (1.0 - right).mean()
    return loss


class SLCA(GaussianHead):
    """Slow learner with classifier alignment."""

    name = "slca"
    neutral = {"encoder_lr": 1.0, "compete": "known"}
    yields = ("task_loss",)
    common_clock = "shrinks the means of older tasks and normalises logits task by task"
    card = Card(
        title="SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
        authors="Zhang, Wang, Kang, Chen, Wei",
        venue="ICCV",
        year=2023,
        bibtex="""@inproceedings{zhang2023slca,
  title = {{SLCA}: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model},
  author = {Zhang, Gengwei and Wang, Liyuan and Kang, Guoliang and Chen, Ling and Wei, Yunchao},
  booktitle = {ICCV},
  year = {2023}
}""",
        certainty="Read in the released code: rates, masked loss, 256 draws a class, means of older tasks shrunk, "
        "logits normalised task by task, aligned head for evaluation alone. Federated (averaging of the slow learner, "
        "pooled Gaussians, alignment at the server) is ours.",
        leaves_client=(
            ("counts", "classes", "sum", "end of a task"),
            ("sums", "classes x features, float64", "sum", "end of a task"),
            ("outer", "classes x features x features, float64", "sum", "end of a task (covariance=full)"),
            ("squares", "classes x features, float64", "sum", "end of a task (covariance=diagonal)"),
            ("scatter", "features x features, float64", "sum", "end of a task (covariance=shared)"),
        ),
        server_state="counts, sums and second moments of all classes so far; the task of each class",
        cost="One forward pass over the task's images and one upload at the end of a task; a head trained at the "
        "server.",
        deviations="SLCA++ with its low-rank adapters is not offered, only its losses and rate: `encoder_lr=0.1 "
        "reverse=0.1`. A mini-batch of the alignment is a part of a random order of all draws. Tasks may have "
        "different numbers of classes: the task of a class is recorded, where the code divides its number.",
        notes="For pretrained encoders (`init`): with one drawn at random and `encoder_lr=0.01` hardly anything is "
        "learned. Counts of images a class leave the client. The paper's head rate is 0.01 (`optimiser.lr`), momentum "
        "0.9, weight decay 5e-4. Rows of old classes get no gradient, but weight decay where it is set. Fills the task "
        "loss unless another strategy of the stack has one of its own. Old classes keep the Gaussian of their task.",
    )

    @dataclass(frozen=True)
    class Options:
        encoder_lr: float = option(0.01, "learning rate of all but the head, as a share of the head's")
        compete: Literal["new", "known"] = option("new", "classes of the cross entropy: those of the task, or all")
        reverse: float = option(0.0, "weight of the reverse cross entropy; 0.1 in SLCA++")
        draws: int = option(256, "features drawn a class")
        shrink: bool = option(True, "means of older tasks are drawn towards 0, by at most a tenth")
        temperature: float = option(0.1, "of the normalised logits; 0 trains on the logits as they are")
        epochs: int = option(5, "passes over the drawn features")
        lr: float = option(0.01, "learning rate of the alignment, falls as a cosine")
        momentum: float = option(0.9, "momentum of the alignment")
        weight_decay: float = option(5e-4, "weight decay of the alignment")
        batch_size: int = option(256, "drawn features a step")
        jitter: float = option(1e-5, "added to each variance of a feature")
        covariance: Form = option("full", "a matrix a class, its diagonal alone, or one matrix for all classes")
        use: Use = option("evaluation", "what the new head is for: evaluation alone, or the next task starts from it")

        def __post_init__(self) -> None:
            for key in ("encoder_lr", "reverse", "temperature", "jitter"):
                if not 0 <= getattr(self, key) < math.inf:
                    raise ValueError(f"{key} must be at least 0, not {getattr(self, key)}")
            if self.draws < 1:
                raise ValueError(f"draws must be at least 1, not {self.draws}")
            self.recipe()

        def recipe(self) -> Sgd:
            """How the head is aligned."""
            return Sgd(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, cosine=True)

    # client

    def groups(self) -> Sequence[Group]:
        return (Group(lambda name: not name.startswith("head."), lr_scale=self.options.encoder_lr),)

    def task_loss(self, step: Step) -> Tensor:
        classes = step.among(new_or_known(step) if self.options.compete == "new" else step.known)
        loss = cross_entropy(step.output.logits, step.y, classes)
        if self.options.reverse:
            loss = loss + self.options.reverse * reverse_cross_entropy(step.output.logits, step.y, classes)
        return loss

    # server

    def calibrated(self, server: Server, moments: Arrays) -> Arrays:
        if server.task == 0:
            return {}
        born, means = server.state["born"], class_means(moments)
        if self.options.shrink:
            means = shrunk(means, born.to(means.device), server.task)
        features, labels = self.draw(server, moments, means, self.options.draws, self.options.jitter)

        def loss(logits: Tensor, y: Tensor, classes: Tensor) -> Tensor:
            if not self.options.temperature:
                return cross_entropy(logits, y, classes)
            return normalised_cross_entropy(logits, y, classes, born, self.options.temperature)

        return self.fit_head(server, features, labels, self.options.recipe(), loss)
