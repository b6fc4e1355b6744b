"""EFC: features move freely but where old logits would change; old classes are rehearsed by drifting Gaussians."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.blocks.feature_drift import class_slots, drawn_features
from fedcl.blocks.losses import cross_entropy
from fedcl.cards import Card, option
from fedcl.masks import own_head
from fedcl.strategy import Broadcast, Server, Step

from ._elastic import BIBTEX, LEAVES, Elastic, ElasticOptions


class EFC(Elastic):
    """Elastic feature consolidation: an elastic feature space and Gaussian prototypes in the cross entropy."""

    name = "efc"
    aliases = ("elastic_feature_consolidation",)
    neutral = {"weight": 0.0, "damping": 0.0, "rehearsal": 0, "rotation": False, "batch_norm": "same", "task": "known"}
    card = Card(
        title="Elastic Feature Consolidation for Cold Start Exemplar-Free Incremental Learning",
        authors="Magistri, Trinci, Soutif-Cormerais, van de Weijer, Bagdanov",
        venue="ICLR",
        year=2024,
        bibtex=BIBTEX,
        certainty="Read in the released code: feature matrix, elastic term (lambda 10, eta 0.1), the asymmetric cross "
        "entropy over 64 prototypes and current samples, covariances that stay and means that drift (sigma 0.2), "
        "rotations in the first task. The federated form is ours: sums over clients, exact over any partition.",
        leaves_client=LEAVES,
        server_state="a Gaussian a class (mean and factor of its covariance, float64), the feature matrix, the global "
        "model of the previous task's end",
        cost="One more forward pass a step; mean and (features x features) factor of each old class, the matrix and "
        "the previous model down once a task; three passes over the task's images at its end.",
        deviations="The released code takes the current samples of the mixed batch from the mini-batch before; here "
        "they are drawn, with replacement, from the present one, as a federated round begins without one before.",
        notes="Set model.head_bias=false: the paper's heads have no bias (one does not enter the feature matrix). "
        "BatchNorm keeps its statistics after the first task (`batch_norm=eval`). Counts of images a class leave the "
        "client. A class of one image gets the jitter as its covariance, one without any is not rehearsed. The paper's "
        "learning rates, 1e-3 in the first task and 1e-4 after it with Adam, are optimiser.schedule=step, per=task. "
        "Rotations cost four times the images in the first task, and the paper leaves them out on ImageNet.",
    )

    @dataclass(frozen=True)
    class Options(ElasticOptions):
        rehearsal: int = option(64, "n + m: prototypes and current samples in the cross entropy over all classes")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.rehearsal < 0:
                raise ValueError(f"rehearsal must be at least 0, not {self.rehearsal}")

    # client

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if terms and self.options.rehearsal:
            terms["prototypes"] = self.rehearsed(step)
        return terms

    def rehearsed(self, step: Step) -> Tensor:
        """Cross entropy over all known classes of n prototypes of old classes and m samples of this batch."""
        size, means = (self.options.rehearsal,), step.down["means"]
        learned = F.pad(step.down["learned"], (0, len(step.known) - len(means)))
        wanted = class_slots(step.known & (step.new | learned), step.uniform(size, "slots"))
        old = ~step.new[wanted]
        rows = torch.where(old, wanted, 0)
        noise = step.normal((*size, means.shape[1]), "prototypes")
        prototypes = drawn_features(means[rows], step.down["factors"][rows], noise)
        picked = step.integers(len(step.y), size, "current")
        features = torch.where(old[:, None], prototypes, step.output.features[picked])
        labels = torch.where(old, wanted, step.y[picked])
        logits = F.linear(features, step.params["head.weight"], step.params.get("head.bias"))
        classes = step.known if step.heads is None else own_head(step.known, labels, step.heads)
        return cross_entropy(logits, labels, classes)

    # server

    def broadcast(self, server: Server) -> Broadcast:
        if not server.state:
            return Broadcast({})
        like = server.arrays["head.weight"]
        sent = {n: server.state[n].to(like.dtype) for n in ("matrix", "means", "factors")}
        return Broadcast({**sent, "learned": server.state["counts"] > 0}, scope="task")
