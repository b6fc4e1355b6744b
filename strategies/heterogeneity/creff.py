"""CReFF: the server makes features whose head gradients match the clients', and trains the head again on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl import random
from fedcl.blocks.statistics import sample_gaussians, widen
from fedcl.cards import Card, option
from fedcl.errors import RunFailed, UsageError
from fedcl.strategy import Arrays, Broadcast, ClientContext, Predictor, Server, Step, cross_entropy

from ..calibration._post_hoc import PostHoc, Sgd, fit, head_logits, keep_rows
from ._head_gradients import class_gradients, gradient_distance, mean_gradients, one_hot

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


class CReFF(PostHoc):
    """Federated features stand for all clients' images of a class, equally many of each, when the head is trained."""

    name = "creff"
    family = "heterogeneity"
    stackable = True
    common_clock = "matches gradients of a head over the same classes at all clients"
    reductions = {"gradients": "sum", "holders": "sum"}
    tried_with = {"options.creff.features": 5, "options.creff.steps": 3, "options.creff.epochs": 2}
    card = Card(
        title="Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with Federated "
        "Features",
        authors="Shang, Lu, Huang, Wang",
        venue="IJCAI",
        year=2022,
        bibtex="""@inproceedings{shang2022creff,
  title = {Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with Federated Features},
  author = {Shang, Xinyi and Lu, Yang and Huang, Gang and Wang, Hanzi},
  booktitle = {IJCAI},
  year = {2022}
}""",
        certainty="Rounds, sizes and rates are those of the released code, as the specification gives them; the "
        "distance by rows of the head, without its bias, is that of dataset condensation, from memory. Momentum and "
        "weight decay, here 0, are not in the specification. The stream of tasks is ours.",
        leaves_client=(
            ("gradients", "classes x classes x features, float64", "sum", "each round"),
            ("holders", "classes", "sum", "each round"),
        ),
        server_state="federated features, `features` a class; the re-trained head; the task of each class",
        cost="One more forward pass a step; the re-trained head down and its gradients by class up, each round; at the "
        "server 100 steps on the features and 300 epochs of a linear head, each round.",
        deviations="A class's mean gradient is that of all images of the local training, in the run's own augmentation "
        "(data.augment), where the released code draws 10 times 32 images in the siamese augmentation of dataset "
        "condensation. Gradients of classes that a client does not hold are sent as zeros.",
        notes="The model that clients train has the plain averaged head; the re-trained one predicts, from the first "
        "round on and at clients too. Gradients are those of the encoder as it was sent, so the head is one round "
        "behind the encoder that it predicts with. They tell which classes a client holds. Features of a class whose "
        "images nobody of a round holds stay as they are: those of earlier tasks are then as old as the encoder of "
        "their last round. Images of a memory in the stack are left out of the gradients. Classes that no client has "
        "had yet keep their first row.",
    )

    @dataclass(frozen=True)
    class Options:
        features: int = option(100, "federated features a class")
        steps: int = option(100, "steps on the federated features a round")
        feature_lr: float = option(0.1, "learning rate of the federated features")
        epochs: int = option(300, "passes over the federated features that re-train the head")
        lr: float = option(0.01, "learning rate of the head")
        momentum: float = option(0.0, "momentum of the head's training")
        weight_decay: float = option(0.0, "weight decay of the head's training")
        batch_size: int = option(32, "federated features a step of the head's training")

        def __post_init__(self) -> None:
            if self.features < 1:
                raise ValueError(f"features must be at least 1, not {self.features}")
            if self.steps < 0:
                raise ValueError(f"steps must be at least 0, not {self.steps}")
            if not 0 < self.feature_lr < float("inf"):
                raise ValueError(f"feature_lr must be above 0, not {self.feature_lr}")
            self.recipe()

        def recipe(self) -> Sgd:
            """How the head is trained."""
            return Sgd(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, cosine=False)

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            raise UsageError("model.head", config.model.head, f"linear: {self.name} matches gradients of its rows")
        if config.model.feature_norm != "none":
            allowed = f"none: the features of {self.name} are those that the head multiplies"
            raise UsageError("model.feature_norm", config.model.feature_norm, allowed)

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        like, width = ctx.received["head.weight"], len(ctx.known)
        return {
            "gradients": torch.zeros(width, *like.shape, dtype=like.dtype, device=like.device),
            "images": torch.zeros(width, dtype=like.dtype, device=like.device),
        }

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        carried, rows = step.carried, step.batch.rows("stream")
        features, y = step.forward(step.x[rows], "received").features.detach(), step.y[rows]
        logits = F.linear(features, step.down["head.weight"], step.down.get("head.bias"))
        classes = step.among(step.known).expand(len(step.y), -1)[rows]
        return {
            "gradients": carried["gradients"] + class_gradients(features, logits, y, classes),
            "images": carried["images"] + one_hot(y, logits).sum(dim=0),
        }

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        images, held = ctx.carried["images"].double(), ctx.carried["images"] > 0
        means = ctx.carried["gradients"].double() / images.clamp(min=1)[:, None, None]
        return {"gradients": means, "holders": held.to(torch.int64)}, ctx.state

    # server

    def begin_task(self, server: Server) -> Arrays:
        state, like, width = super().begin_task(server), server.arrays["head.weight"], len(server.known)
        made = state.get("features", like.new_zeros(0, self.options.features, like.shape[1]))
        head = self.first_head(server)
        before = {n: state.get(n, a[:0]) for n, a in head.items()}
        return {
            **state,
            "features": widen(made, width),
            "filled": widen(state.get("filled", torch.zeros(0, dtype=torch.bool, device=like.device)), width),
            **{n: torch.cat([before[n], a[len(before[n]) :]]) for n, a in head.items()},
        }

    def first_head(self, server: Server) -> Arrays:
        """A head that has not been trained, drawn anew each round."""
        seed, positions = random.fold(*server.key, self.name, "rows"), list(range(len(server.known)))
        names = [n for n in server.arrays if n.startswith("head.")]
        drawn = {n: server.model.head.initial_rows(n.removeprefix("head."), positions, seed) for n in names}
        return {n: a.to(server.arrays[n]) for n, a in drawn.items()}

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast(self.head(server.state))

    def head(self, state: Arrays) -> Arrays:
        """The arrays of the re-trained head."""
        return {n: a for n, a in state.items() if n.startswith("head.")}

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        holders = server.uploads.get("holders")
        if holders is None or not bool((holders > 0).any()):
            return server.arrays, server.state
        features, filled = self.matched(server, holders.to(server.known.device))
        head = self.retrained(server, features, filled)
        return server.arrays, {**server.state, "features": features, "filled": filled, **head}

    def matched(self, server: Server, holders: Tensor) -> tuple[Tensor, Tensor]:
        """The federated features (C, m, d) after this round's steps, and which classes (C,) have any."""
        state, options = server.state, self.options
        held = torch.nonzero(holders > 0).flatten()
        weight, bias = state["head.weight"], state.get("head.bias")
        target = (server.uploads["gradients"].to(weight.device)[held] / holders[held, None, None]).to(weight.dtype)
        classes = self.among(server, server.known, held).expand(len(held), -1)
        nothing = torch.zeros(len(holders), weight.shape[1])
        name = (*server.key, self.name, "features")
        first = sample_gaussians(nothing, nothing + 1, options.features, *name, jitter=0.0, dtype=weight.dtype)
        known = state["filled"][held, None, None]
        features = torch.where(known, state["features"][held], first.to(weight.device)[held])
        for _ in range(options.steps):
            features.requires_grad_()
            distance = gradient_distance(mean_gradients(features, held, weight, bias, classes), target, classes)
            (slope,) = torch.autograd.grad(distance, features)
            features = (features - options.feature_lr * slope).detach()
        if not bool(features.isfinite().all()):
            raise RunFailed(f"the features of {self.name} have diverged: take a smaller options.creff.feature_lr")
        filled = state["filled"] | (holders > 0)
        return state["features"].index_copy(0, held, features.detach()), filled

    def retrained(self, server: Server, features: Tensor, filled: Tensor) -> Arrays:
        """A new head, trained on the features of all classes that have some."""
        labels = torch.nonzero(filled).flatten().repeat_interleave(features.shape[1])
        inputs = features[filled].flatten(0, 1)

        def loss(head: Arrays, places: Tensor) -> Tensor:
            y = labels[places]
            return cross_entropy(head_logits(server.model, head, inputs[places]), y, self.among(server, filled, y))

        start = self.first_head(server)
        name = (*server.key, self.name, "order")
        fitted = fit(start, loss, len(labels), self.options.recipe(), *name)
        return {n: keep_rows(server.state[n], a, filled) for n, a in fitted.items()}

    # anywhere

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        arrays = {**predictor.arrays, **self.head(predictor.state)}
        logits: Tensor = predictor.models.apply("head", arrays, (predictor.forward(x).features,), "eval")
        return logits
