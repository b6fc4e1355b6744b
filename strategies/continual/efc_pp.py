"""EFC++: the encoder learns the new classes alone; after each task the server trains all heads on class Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl import random as counter
from fedcl.blocks.feature_drift import drawn_features
from fedcl.blocks.losses import cross_entropy
from fedcl.cards import Card, option
from fedcl.errors import RunFailed
from fedcl.strategy import Arrays, Broadcast, Server, Step

from ._elastic import BIBTEX, LEAVES, Elastic, ElasticOptions

HEAD = ("head.weight", "head.bias")


class EFCPlusPlus(Elastic):
    """Elastic feature consolidation with the heads re-balanced after each task, at the server."""

    name = "efc_pp"
    neutral = {
        "weight": 0.0, "damping": 0.0, "epochs": 0, "rotation": False, "batch_norm": "same", "task": "known",
        "old_heads": "train",
    }  # fmt: skip
    card = Card(
        title="Elastic Feature Consolidation for Cold Start Exemplar-Free Incremental Learning",
        authors="Magistri, Trinci, Soutif-Cormerais, van de Weijer, Bagdanov",
        venue="ICLR",
        year=2024,
        bibtex=BIBTEX,
        certainty="Read in the released code of EFC, which holds both: the backbone's losses, old heads that are not "
        "trained, the drift of the means, and re-balancing with 50 epochs, rate 1e-3 and batches of 256. That it uses "
        "Adam, as the rest of the code does, is a guess. The federated form is ours: the server has no features of "
        "the new classes and draws them from their pooled Gaussians too.",
        leaves_client=LEAVES,
        server_state="a Gaussian a class (mean and factor of its covariance, float64), the feature matrix, the global "
        "model of the previous task's end",
        cost="One more forward pass a step; the feature matrix and the previous model down once a task; three passes "
        "over the task's images at its end, and the server trains the head.",
        notes="Set model.head_bias=false: the paper's heads have no bias. BatchNorm keeps its statistics after the "
        "first task (`batch_norm=eval`). An epoch of the re-balancing is as many draws as there are images of the new "
        "classes, spread evenly over all classes. The feature matrix is measured with the re-balanced heads. Counts of "
        "images a class leave the client. Rotations cost four times the images in the first task, and the paper leaves "
        "them out on ImageNet.",
    )

    @dataclass(frozen=True)
    class Options(ElasticOptions):
        epochs: int = option(50, "epochs of the re-balancing")
        lr: float = option(1e-3, "learning rate of the re-balancing")
        batch_size: int = option(256, "draws a step of the re-balancing")
        old_heads: Literal["keep", "train"] = option("keep", "rows of old classes in local training: kept, or trained")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.epochs < 0:
                raise ValueError(f"epochs must be at least 0, not {self.epochs}")
            if not 0 < self.lr < float("inf"):
                raise ValueError(f"lr must be above 0, not {self.lr}")
            if self.batch_size < 1:
                raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")

    # client

    def after_step(self, step: Step, params: Arrays) -> Arrays:
        if self.options.old_heads == "train" or step.task == 0:
            return params
        # Weight decay and momentum would move rows that have no gradient.
        kept = {n: torch.where(_rows(step.new, a), a, step.received[n]) for n, a in params.items() if n in HEAD}
        return {**params, **kept}

    # server

    def broadcast(self, server: Server) -> Broadcast:
        if not server.state:
            return Broadcast({})
        return Broadcast({"matrix": server.state["matrix"].to(server.arrays["head.weight"].dtype)}, scope="task")

    def rebalanced(self, server: Server, state: Arrays, images: int) -> Arrays:
        """All heads after training on draws of the class Gaussians."""
        classes = torch.nonzero(state["counts"] > 0).flatten()
        if server.task == 0 or not self.options.epochs or not images:
            return {}
        like = server.arrays["head.weight"]
        head = {n: server.arrays[n].detach().clone().requires_grad_() for n in HEAD if n in server.arrays}
        optimiser = torch.optim.Adam(head.values(), lr=self.options.lr)
        labels = classes.repeat(math.ceil(images / len(classes)))
        generator = torch.Generator().manual_seed(counter.key(*server.key, self.name) & (2**63 - 1))
        competing = torch.zeros_like(server.known).index_fill(0, classes, value=True)
        for _ in range(self.options.epochs):
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            for drawn in torch.split(labels[order], self.options.batch_size):
                noise = torch.randn(len(drawn), like.shape[1], generator=generator, dtype=torch.float64)
                features = drawn_features(state["means"][drawn], state["factors"][drawn], noise.to(like.device))
                logits = F.linear(features.to(like.dtype), head["head.weight"], head.get("head.bias"))
                optimiser.zero_grad()
                torch.autograd.backward(cross_entropy(logits, drawn, competing))
                optimiser.step()
        found = {n: a.detach() for n, a in head.items()}
        if not all(bool(a.isfinite().all()) for a in found.values()):
            raise RunFailed(f"re-balancing has diverged: take a smaller options.efc_pp.lr than {self.options.lr:g}")
        return found


def _rows(classes: Tensor, array: Tensor) -> Tensor:
    """A mask of classes (C,) in the shape of an array's rows."""
    return classes.view(-1, *[1] * (array.dim() - 1))
