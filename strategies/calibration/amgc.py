"""AMGC: a global head in closed-form expectation over class Gaussians, with wider ones for old classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedcl.blocks.statistics import Form, class_covariances, class_means, within_covariance
from fedcl.cards import Card, option
from fedcl.errors import RunFailed, UsageError
from fedcl.models.heads import normalised
from fedcl.strategy import Arrays, ClientContext, Server, Step, cross_entropy

from ..federated.finetune import new_or_known
from ._post_hoc import GaussianHead, Use

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def widened(spread: Tensor, by: Tensor) -> Tensor:
    """``S_k + lambda_k diag(S_k)`` of covariances (K, d, d) or variances (K, d); ``by`` (K,) holds the lambdas.

    >>> widened(torch.tensor([[2.0, 1.0]]), torch.tensor([0.5])).tolist()
    [[3.0, 1.5]]
    """
    if spread.dim() == 2:
        return spread * (1 + by[:, None])
    return spread + torch.diag_embed(by[:, None] * spread.diagonal(dim1=1, dim2=2))


def margins(weight: Tensor, spread: Tensor) -> Tensor:
    """``m_jk = 1/2 (w_j - w_k)^T S_k (w_j - w_k)`` of every class j for the Gaussian of every class k.

    Args:
        weight: (K, d) rows of the head.
        spread: (K, d, d) covariances, or (K, d) variances.

    Returns:
        (K, K), at least 0, with 0 on the diagonal; row k is for the Gaussian of class k.

    >>> margins(torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [0.5]])).tolist()
    [[0.0, 8.0], [1.0, 0.0]]
    """
    if spread.dim() == 2:
        apart = weight[None, :, :] - weight[:, None, :]
        return 0.5 * (apart.square() * spread[:, None, :]).sum(dim=-1)
    along = torch.bmm(weight.expand(len(spread), *weight.shape), spread)  # row j of block k is w_j S_k
    square = (along * weight).sum(dim=-1)  # w_j S_k w_j
    cross = (along * weight[:, None, :]).sum(dim=-1)  # w_j S_k w_k
    return 0.5 * (square - 2 * cross + square.diagonal()[:, None])


def expected_cross_entropy(weight: Tensor, bias: Tensor, means: Tensor, spread: Tensor, classes: Tensor) -> Tensor:
    """Upper bound of the cross entropy expected over class Gaussians, each class weighted alike (DBGC, AMarX).

    ``-1/K sum_k log( e^{w_k mu_k + b_k} / sum_j e^{w_j mu_k + b_j + m_jk} )``: the expectation of the exponential of a
    Gaussian is closed, and Jensen's inequality moves it into the logarithm.

    Args:
        weight, bias: (K, d) and (K,) of the head.
        means: (K, d).
        spread: (K, d, d) or (K, d).
        classes: (K, K) bool, row k: which classes compete where k is right; k is one of them.

    >>> none, eye = torch.zeros(2, 1), torch.eye(2)
    >>> round(expected_cross_entropy(eye[:, :1], none[:, 0], none, none, eye >= 0).item(), 4)
    0.6931
    """
    logits = means @ weight.mT + bias + margins(weight, spread)
    return cross_entropy(logits, torch.arange(len(means), device=means.device), classes)


class AMGC(GaussianHead):
    """Adaptive margin global classifier, solved at the server at the end of each task."""

    name = "amgc"
    neutral = {"distil": 0.0, "compete": "known", "steps": 0}
    needs_previous = True
    yields = ("task_loss",)
    common_clock = "widens the Gaussians of the classes that are old to all clients at once"
    card = Card(
        title="Adaptive Margin Global Classifier for Exemplar-Free Class-Incremental Learning",
        authors="Yao, Chang",
        venue="arXiv",
        year=2024,
        bibtex="""@misc{yao2024amgc,
  title = {Adaptive Margin Global Classifier for Exemplar-Free Class-Incremental Learning},
  author = {Yao, Zhongren and Chang, Xiaobin},
  howpublished = {arXiv:2409.13275},
  year = {2024}
}""",
        certainty="From a public page on the paper, derived again: the closed form, the enlarged variances of old "
        "classes and the margins they make are certain; lambda 1, 500 steps of Adam with rate 0.01, and the loss of "
        "the encoder (cross entropy over new classes and feature distillation of weight 10) are the specification's, "
        "not the paper's, which was not found.",
        leaves_client=(
            ("counts", "classes", "sum", "end of a task"),
            ("sums", "classes x features, float64", "sum", "end of a task"),
            ("outer", "classes x features x features, float64", "sum", "end of a task (covariance=full)"),
            ("squares", "classes x features, float64", "sum", "end of a task (covariance=diagonal)"),
            ("scatter", "features x features, float64", "sum", "end of a task (covariance=shared)"),
        ),
        server_state="counts, sums and second moments of all classes so far; the task of each class",
        cost="One forward pass more a step after the first task; one over the task's images and one upload at its end; "
        "at the server classes^2 x features^2 operations a step of the head.",
        deviations="The correction of old means for drift, which the specification names as possible, is left out.",
        notes="Counts of images a class leave the client; how many images a class has does not matter to the head. "
        "Fills the task loss unless another strategy of the stack has one of its own. The next task starts from the "
        "solved head (`use=training`). Classes without an image keep their row; one of a single image is a point.",
    )

    @dataclass(frozen=True)
    class Options:
        enlarge: float = option(1.0, "lambda: by which share of themselves the variances of old classes grow")
        steps: int = option(500, "full-batch steps of Adam on the head at the end of a task; 0 leaves it as trained")
        lr: float = option(0.01, "learning rate of these")
        distil: float = option(10.0, "weight of the squared distance of features to those of the previous task's model")
        compete: Literal["new", "known"] = option("new", "classes of the cross entropy: the new ones, or all known")
        covariance: Form = option("full", "a matrix a class, its diagonal alone, or one matrix for all classes")
        use: Use = option("training", "what the new head is for: the next task starts from it too, or evaluation alone")

        def __post_init__(self) -> None:
            for key in ("enlarge", "distil"):
                if not 0 <= getattr(self, key) < math.inf:
                    raise ValueError(f"{key} must be at least 0, not {getattr(self, key)}")
            if self.steps < 0:
                raise ValueError(f"steps must be at least 0, not {self.steps}")
            if not 0 < self.lr < math.inf:
                raise ValueError(f"lr must be above 0, not {self.lr}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            raise UsageError("model.head", config.model.head, f"linear: {self.name} solves for a linear head")

    # client

    def task_loss(self, step: Step) -> Tensor:
        classes = new_or_known(step) if self.options.compete == "new" else step.known
        return cross_entropy(step.output.logits, step.y, step.among(classes))

    def loss(self, step: Step) -> dict[str, Tensor]:
        if step.task == 0 or not self.options.distil:
            return {}
        before = step.forward(step.x, "stage:previous").features
        distance = (step.output.features - before.detach()).square().sum(dim=1).mean()
        return {"distillation": self.options.distil * distance}

    def features(self, ctx: ClientContext, x: Tensor) -> Tensor:
        # As the head sees them, since its solution is for the very features that its rows are multiplied with.
        return normalised(super().features(ctx, x), ctx.model.head.feature_norm)

    # server

    def calibrated(self, server: Server, moments: Arrays) -> Arrays:
        arrays = self.standing(server)
        head, device = arrays["head.weight"], arrays["head.weight"].device
        classes = torch.nonzero(moments["counts"].to(device) > 0).flatten()
        means = class_means(moments).to(device)[classes]
        if "scatter" in moments:
            shared = within_covariance(moments).to(device)
            spread = shared.expand(len(classes), *shared.shape)
        else:
            spread = class_covariances(moments).to(device)[classes]
        old = (server.known & ~server.new).to(device)[classes]
        enlarged = torch.where(old, self.options.enlarge, 0.0).to(means.dtype)
        everybody = torch.ones(len(server.known), dtype=torch.bool, device=device)
        competing = self.among(server, everybody, classes).expand(len(classes), -1)[:, classes]
        start = tuple(arrays[n].to(means.dtype)[classes] for n in ("head.weight", "head.bias") if n in arrays)
        solved = self.solve(start, means, widened(spread, enlarged), competing)
        return {
            n: arrays[n].index_copy(0, classes, a.to(head.dtype))
            for n, a in zip(("head.weight", "head.bias"), solved, strict=False)
        }

    def solve(self, start: tuple[Tensor, ...], means: Tensor, spread: Tensor, competing: Tensor) -> tuple[Tensor, ...]:
        """Weight, and bias where there is one, after Adam on :func:`expected_cross_entropy`."""
        head = [a.detach().clone().requires_grad_() for a in start]
        bias = head[1] if len(head) > 1 else means.new_zeros(len(means))
        optimiser = torch.optim.Adam(head, lr=self.options.lr)
        for _ in range(self.options.steps):
            optimiser.zero_grad()
            torch.autograd.backward(expected_cross_entropy(head[0], bias, means, spread, competing))
            optimiser.step()
        if not all(bool(torch.isfinite(a).all()) for a in head):
            raise RunFailed(f"the head's solution has diverged with lr={self.options.lr:g}: take a smaller one")
        return tuple(a.detach() for a in head)
