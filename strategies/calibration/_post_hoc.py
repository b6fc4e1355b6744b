"""What the stages after a task's training share: they leave the encoder alone and give the server another head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from fedcl import random
from fedcl.blocks.statistics import (
    MOMENT_SUMS,
    add_moments,
    class_covariances,
    class_moments,
    sample_gaussians,
    widen,
    within_covariance,
)
from fedcl.cards import Card
from fedcl.errors import RunFailed, UsageError
from fedcl.models.model import FedModel, run
from fedcl.strategy import Arrays, ClientContext, Finished, Server, Strategy, cross_entropy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream

Use = Literal["evaluation", "training"]

DECOUPLING = Card(
    title="Decoupling Representation and Classifier for Long-Tailed Recognition",
    authors="Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis",
    venue="ICLR",
    year=2020,
    bibtex="""@inproceedings{kang2020decoupling,
  title = {Decoupling Representation and Classifier for Long-Tailed Recognition},
  author = {Kang, Bingyi and Xie, Saining and Rohrbach, Marcus and Yan, Zhicheng and Gordo, Albert and
            Feng, Jiashi and Kalantidis, Yannis},
  booktitle = {ICLR},
  year = {2020}
}""",
)
"""The paper of which several stages are."""


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent on stored features.

    Attributes:
        epochs: passes over the features.
        cosine: the rate falls from ``lr`` to 0 over the epochs, one value an epoch.
    """

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    cosine: bool

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must be at least 0, not {self.epochs}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, not {self.weight_decay}")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch.

        >>> Sgd(4, 1.0, 0.0, 0.0, 1, True).rate(2)
        0.5
        """
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs)) if self.cosine else self.lr


def head_logits(model: FedModel, head: Arrays, features: Tensor) -> Tensor:
    """Logits (n, C) of features (n, d) by a head of the given arrays, named ``head.*``."""
    own = {n.removeprefix("head."): a for n, a in head.items()}
    logits: Tensor = functional_call(model.head, own, (features,))
    return logits


def public_features(server: Server, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Features (n, d) and labels (n,) int64 of the server's own labelled images of known classes; n may be 0."""
    like = server.arrays["head.weight"]
    features = [like.new_zeros(0, server.model.feature_dim)]
    labels = [torch.zeros(0, dtype=torch.int64, device=like.device)]
    for x, y in server.public.batches() if server.public else ():
        inside = (y >= 0) & server.known[y.clamp(min=0)]
        with torch.no_grad():
            features.append(run(server.model, arrays, x, train=False).features[inside])
        labels.append(y[inside])
    return torch.cat(features), torch.cat(labels)


def fit(start: Arrays, loss: Callable[[Arrays, Tensor], Tensor], count: int, recipe: Sgd, *name: object) -> Arrays:
    """Minimises a loss over ``count`` samples by mini-batches.

    Args:
        start: what is fitted.
        loss: (arrays, (B,) int64 places of the samples) -> scalar.
        name: names the order of the samples, see :func:`fedcl.random.key`.

    Raises:
        RunFailed: the arrays are not finite at the end.
    """
    fitted = {n: a.detach().clone().requires_grad_() for n, a in start.items()}
    optimiser = torch.optim.SGD(
        fitted.values(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    device = next(iter(start.values())).device
    for epoch in range(recipe.epochs if count else 0):
        optimiser.param_groups[0]["lr"] = recipe.rate(epoch)
        order = torch.from_numpy(random.permutation(count, *name, epoch)).to(device)
        for places in torch.split(order, recipe.batch_size):
            optimiser.zero_grad()
            torch.autograd.backward(loss(fitted, places))
            optimiser.step()
    if not all(bool(torch.isfinite(a).all()) for a in fitted.values()):
        raise RunFailed(f"fitting the head has diverged with lr={recipe.lr:g}: take a smaller one")
    return {n: a.detach() for n, a in fitted.items()}


class PostHoc(Strategy):
    """Base of stages at the end of each task that change the head alone.

    The server state ``born`` (C,) int64 is the task in which each class was new.
    """

    family = "calibration"
    stackable = True

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head == "simplex":
            raise UsageError("model.head", "simplex", f"not a fixed head: {self.name} changes the head")

    def begin_task(self, server: Server) -> Arrays:
        born = server.state.get("born", torch.zeros(0, dtype=torch.int64, device=server.new.device))
        born = widen(born.to(server.new.device), len(server.new))
        return {**server.state, "born": torch.where(server.new, server.task, born)}

    def standing(self, server: Server) -> Arrays:
        """The model that would be evaluated without this stage: with what the stages before it in the stack did."""
        return server.evaluated

    def among(self, server: Server, classes: Tensor, labels: Tensor) -> Tensor:
        """Those of ``classes`` (C,) that each label (B,) competes with: those of its task, where tasks are known."""
        if not server.task_known:
            return classes
        born = server.state["born"]
        return classes & (born[labels][:, None] == born[None, :])

    def left(self, server: Server, head: Arrays, state: Arrays, use: Use) -> tuple[Finished, Arrays]:
        """What `finish_task` returns for a new head (arrays ``head.*``)."""
        standing = self.standing(server)
        if use == "evaluation":
            return Finished(server.arrays, evaluate={**standing, **head}), state
        # Where a stage before this one left a model of its own to be evaluated, that gets the new head too.
        evaluate = None if standing is server.arrays else {**standing, **head}
        return Finished({**server.arrays, **head}, evaluate=evaluate), state


class GaussianHead(PostHoc):
    """Base of stages that make a new head of class Gaussians, pooled exactly over all holders of a class.

    The server's state holds the moments of all known classes (:mod:`fedcl.blocks.statistics`); options have
    ``covariance``.
    """

    reductions = MOMENT_SUMS

    def count(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Moments of this client's features by class."""
        return class_moments(
            ctx.batches(),
            lambda x: self.features(ctx, x),
            len(ctx.known),
            ctx.model.feature_dim,
            self.options.covariance,
        ), ctx.state

    def features(self, ctx: ClientContext, x: Tensor) -> Tensor:
        """(B, d) features of images, whose Gaussians are wanted."""
        return ctx.forward(x).features

    def gathered(self, server: Server) -> Arrays:
        """The state with the moments of the images at hand."""
        found = server.exchange(self.count)
        # Where old images were counted again, by the present encoder, their earlier moments are superseded.
        earlier = {} if server.repeats and found else self.moments(server.state)
        moments, classes = add_moments(earlier, found), len(server.known)
        # Padded here too: where no client was reached that has images, nothing has made room for the new classes.
        return {**server.state, **{n: a if n == "scatter" else widen(a, classes) for n, a in moments.items()}}

    def moments(self, state: Arrays) -> Arrays:
        """The moments in a server state."""
        return {n: a for n, a in state.items() if n in MOMENT_SUMS}

    def draw(self, server: Server, moments: Arrays, means: Tensor, each: int, jitter: float) -> tuple[Tensor, Tensor]:
        """``each`` features of every class with an image, (n, d) of the head's type, and their labels (n,)."""
        classes = torch.nonzero(moments["counts"] > 0).flatten()
        if "scatter" in moments:
            shared = within_covariance(moments)
            spread = shared.expand(len(classes), *shared.shape)
        else:
            spread = class_covariances(moments)[classes]
        like = server.arrays["head.weight"]
        name = (*server.key, self.name, "draws")
        drawn = sample_gaussians(means[classes], spread, each, *name, jitter=jitter, dtype=like.dtype)
        return drawn.flatten(0, 1).to(like.device), classes.repeat_interleave(each).to(like.device)

    def fit_head(
        self,
        server: Server,
        features: Tensor,
        labels: Tensor,
        recipe: Sgd,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy,
    ) -> Arrays:
        """The head's arrays, fitted to features (n, d) and labels (n,); rows of classes without a label stay.

        Args:
            loss: of logits (B, C), labels (B,) and the competing classes, (C,) or (B, C) bool.
        """
        present = torch.zeros(len(server.known), dtype=torch.bool, device=labels.device)
        present[labels] = True
        start = {n: a for n, a in self.standing(server).items() if n.startswith("head.")}

        def batch_loss(head: Arrays, places: Tensor) -> Tensor:
            y = labels[places]
            return loss(head_logits(server.model, head, features[places]), y, self.among(server, present, y))

        name = (*server.key, self.name, "order")
        fitted = fit(start, batch_loss, len(labels), recipe, *name)
        return {n: keep_rows(start[n], a, present) for n, a in fitted.items()}

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        return server.arrays, self.gathered(server) if server.online else server.state

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        state = server.state if server.online else self.gathered(server)  # once seen, images have been counted
        moments = self.moments(state)
        if "counts" not in moments or not bool((moments["counts"] > 0).any()):
            return Finished(server.arrays), state
        return self.left(server, self.calibrated(server, moments), state, self.options.use)

    def calibrated(self, server: Server, moments: Arrays) -> Arrays:
        """The new head's arrays, of the pooled moments of all classes with an image so far."""
        raise NotImplementedError


def keep_rows(before: Tensor, after: Tensor, rows: Tensor) -> Tensor:
    """``after`` in the given rows (C,) bool of an array by class, ``before`` in the others; a scalar is ``after``.

    >>> keep_rows(torch.zeros(2), torch.ones(2), torch.tensor([True, False])).tolist()
    [1.0, 0.0]
    """
    return torch.where(rows.view(-1, *[1] * (after.dim() - 1)), after, before) if after.dim() else after
