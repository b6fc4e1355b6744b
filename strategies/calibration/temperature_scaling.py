"""Temperature scaling: logits are divided by the one number that makes their confidence right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.errors import RunFailed, UsageError
from fedcl.strategy import Arrays, ClientContext, Finished, Server

from ._post_hoc import PostHoc, head_logits, public_features

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream

POINTS = 201
"""Temperatures of the grid, evenly spaced in their logarithm."""


def negative_log_likelihood(logits: Tensor, labels: Tensor, classes: Tensor, temperature: Tensor) -> Tensor:
    """Sum over images of ``-log softmax(o / T)_y`` for each temperature.

    Args:
        logits: (n, C), n may be 0.
        labels: (n,) int64.
        classes: (C,) or (n, C) bool, what the softmax runs over.
        temperature: (m,).

    Returns:
        (m,) float64.

    >>> two = torch.tensor([True, True])
    >>> negative_log_likelihood(torch.zeros(1, 2), torch.tensor([0]), two, torch.ones(1)).tolist()
    [0.6931471805599453]
    """
    masked = torch.where(classes, logits.double(), torch.finfo(torch.float64).min / 1e10)
    totals = [F.cross_entropy(masked / t, labels, reduction="sum") for t in temperature.double()]
    return torch.stack(totals)


def best_temperature(logits: Tensor, labels: Tensor, classes: Tensor, low: float, high: float) -> float:
    """The temperature in [low, high] of the least negative log-likelihood (Guo et al. 2017), found by bisection.

    The likelihood is concave in ``1 / T``. Where it has no maximum inside, as with images that are all classified
    right, the bound is taken; where the temperature does not matter, 1.

    Args:
        logits: (n, C), n at least 1.
        labels: (n,) int64.
        classes: (C,) or (n, C) bool, what the softmax runs over.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> two = torch.tensor([True, True])
    >>> round(best_temperature(logits, torch.tensor([0, 0, 0, 1]), two, 0.1, 10.0), 4)  # 2 / log 3
    1.8205
    """
    inside = torch.where(classes, logits.double(), 0.0)
    right = inside.gather(1, labels[:, None]).squeeze(1)

    def slope(inverse: float) -> float:
        p = torch.where(classes, logits.double() * inverse, torch.finfo(torch.float64).min).softmax(dim=1)
        return float(((p * inside).sum(dim=1) - right).sum())

    least, most = 1 / high, 1 / low
    flat, steep = slope(least), slope(most)
    if flat >= 0 or steep <= 0:
        return 1.0 if flat >= 0 and steep <= 0 else high if flat >= 0 else low
    for _ in range(80):
        middle = math.sqrt(least * most)
        least, most = (middle, most) if slope(middle) < 0 else (least, middle)
    return 1 / math.sqrt(least * most)


class TemperatureScaling(PostHoc):
    """One temperature for the global model, at the end of each task; predictions stay, their confidence changes."""

    name = "temperature_scaling"
    neutral = {}
    reductions = {"losses": "sum"}
    tried_with = {"partition.public": 0.2}
    card = Card(
        title="On Calibration of Modern Neural Networks",
        authors="Guo, Pleiss, Sun, Weinberger",
        venue="ICML",
        year=2017,
        bibtex="""@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {ICML},
  year = {2017}
}""",
        certainty="Certain: the negative log-likelihood of held-out images is minimised over one number. It is convex "
        "in 1 / T; bisection finds what the paper's L-BFGS finds. Which images, in a federation, is ours.",
        leaves_client=(("losses", f"{POINTS} sums of losses, float64", "sum", "end of a task (data=clients)"),),
        server_state="the task of each class; the temperature of the last task",
        cost="One forward pass over the server's images, or (data=clients) over the clients', which get a head and "
        "send a number for each temperature of a grid.",
        notes="Held-out images are the server's own (`partition.public`), of all tasks so far. `data=clients` needs "
        "none: clients send the losses of their training images at 201 temperatures between the bounds, whose sums are "
        "exact; but a model is too sure of images it was trained on, and only those of the present task are at hand. "
        "The temperature divides weight and bias (or scale) of the evaluated head, so that accuracy stays; the next "
        "task starts from the head as it was. No effect where another strategy predicts without the head.",
    )

    @dataclass(frozen=True)
    class Options:
        data: Literal["public", "clients"] = option("public", "images: the server's own, or the clients' for training")
        low: float = option(0.05, "smallest temperature")
        high: float = option(20.0, "largest temperature")

        def __post_init__(self) -> None:
            if not 0 < self.low < 1 < self.high < math.inf:
                raise ValueError(f"low and high must be on both sides of 1, above 0, not {self.low} and {self.high}")

        def grid(self) -> Tensor:
            """The temperatures that clients measure, (POINTS,) float64."""
            return torch.logspace(math.log10(self.low), math.log10(self.high), POINTS, dtype=torch.float64)

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head == "nearest_mean":
            raise UsageError("model.head", "nearest_mean", f"a head whose logits {self.name} can divide")
        key = "options.temperature_scaling.data"
        if self.options.data == "public" and (split.public is None or not config.labels.public):
            raise UsageError(key, "public", "needs labelled images at the server: set partition.public")
        if self.options.data == "clients" and config.federation.passes == "once":
            raise UsageError(key, "clients", "public: images that are seen once have passed at the end of a task")

    # client

    def measure(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Sums of this client's losses over the grid of temperatures."""
        head = {n: a for n, a in ctx.down.items() if n.startswith("head.")}
        losses = torch.zeros(POINTS, dtype=torch.float64)
        for x, y in ctx.batches():
            logits = head_logits(ctx.model, head, ctx.forward(x).features)
            found = negative_log_likelihood(logits, y, ctx.among(ctx.known, y), self.options.grid())
            losses = losses.to(found.device) + found
        return {"losses": losses}, ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        arrays = self.standing(server)
        head = {n: a for n, a in arrays.items() if n.startswith("head.")}
        temperature = (
            self.of_clients(server, head) if self.options.data == "clients" else self.of_public(server, arrays)
        )
        divided = {"head.scale"} if "head.scale" in head else {"head.weight", "head.bias"}
        new = {n: a / temperature if n in divided else a for n, a in head.items()}
        state = {**server.state, "temperature": torch.tensor(temperature, dtype=torch.float64)}
        return self.left(server, new, state, "evaluation")

    def of_public(self, server: Server, arrays: Arrays) -> float:
        """The temperature of the server's own images."""
        features, labels = public_features(server, arrays)
        if not len(labels):
            raise RunFailed("temperature_scaling has no labelled image at the server: set partition.public")
        with torch.no_grad():
            logits = head_logits(server.model, {n: a for n, a in arrays.items() if n.startswith("head.")}, features)
        competing = self.among(server, server.known, labels)
        return best_temperature(logits, labels, competing, self.options.low, self.options.high)

    def of_clients(self, server: Server, head: Arrays) -> float:
        """The temperature of the grid with the least sum of the clients' losses; of equal ones that nearest to 1."""
        losses = server.exchange(self.measure, down=head).get("losses")
        if losses is None:
            return 1.0
        grid = self.options.grid()
        best = torch.nonzero(losses.cpu() == losses.min().cpu()).flatten()
        return float(grid[best[grid[best].log().abs().argmin()]])
