"""What EFC and EFC++ share: the elastic term, the first task's rotations, class Gaussians that drift along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fedcl.blocks.feature_drift import drift_sums, elastic, feature_matrix, nearness
from fedcl.blocks.losses import cross_entropy
from fedcl.blocks.statistics import class_covariances, class_means, class_moments, widen
from fedcl.cards import option
from fedcl.errors import RunFailed, UsageError
from fedcl.models.model import FedModel
from fedcl.models.rotation import RotationHead, turned
from fedcl.strategy import Arrays, ClientContext, Finished, Phase, Server, Step, Strategy

from ..federated.finetune import new_or_known

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


BIBTEX = """@inproceedings{magistri2024efc,
  title = {Elastic Feature Consolidation for Cold Start Exemplar-Free Incremental Learning},
  author = {Magistri, Simone and Trinci, Tomaso and Soutif-Cormerais, Albin and {van de Weijer}, Joost and
            Bagdanov, Andrew D.},
  booktitle = {ICLR},
  year = {2024}
}"""

LEAVES = (
    ("counts", "new classes", "sum", "end of a task"),
    ("sums", "new classes x features, float64", "sum", "end of a task"),
    ("outer", "new classes x features x features, float64", "sum", "end of a task"),
    ("lowest", "1", "min", "end of a task, after the first"),
    ("highest", "1", "max", "end of a task, after the first"),
    ("numerators", "old classes x features, float64", "sum", "end of a task, after the first"),
    ("denominators", "old classes, float64", "sum", "end of a task, after the first"),
    ("matrix", "features x features, float64", "sum", "end of a task"),
    ("images", "1", "sum", "end of a task"),
)
"""What leaves a client, for the cards."""


@dataclass(frozen=True)
class ElasticOptions:
    """Options of EFC and EFC++.

    Raises:
        ValueError: one is out of its range.
    """

    weight: float = option(10.0, "lambda of the elastic term, along the empirical feature matrix")
    damping: float = option(0.1, "eta of the elastic term, along all directions")
    sigma: float = option(0.2, "width of the weights by which features around a class mean move it")
    jitter: float = option(1e-5, "added to each variance of a feature")
    rotation: bool = option(True, "the first task learns four rotations of each image as classes of their own")
    batch_norm: Literal["eval", "same"] = option("eval", "statistics of BatchNorm after the first task: kept, or not")
    task: Literal["new", "known"] = option("new", "classes of the cross entropy: the new ones, or all known")

    def __post_init__(self) -> None:
        for name in ("weight", "damping", "jitter"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        # The largest weight is exp(1 / (2 sigma^2)), which has to be finite.
        if not 0.03 <= self.sigma < float("inf"):
            raise ValueError(f"sigma must be at least 0.03, not {self.sigma}")


class Elastic(Strategy):
    """What EFC and EFC++ share: the elastic term, the first task, Gaussians of classes that drift with the features."""

    family = "continual"
    stackable = True
    needs_previous = True
    yields = ("task_loss",)
    revisits = "to measure features at the end of the task"
    common_clock = "measures features and the classes that are new to all clients at once"
    reductions = {
        "counts": "sum", "sums": "sum", "outer": "sum", "lowest": "min", "highest": "max", "numerators": "sum",
        "denominators": "sum", "matrix": "sum", "images": "sum",
    }  # fmt: skip

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            raise UsageError("model.head", config.model.head, f"linear: {self.name} needs the head's derivative")
        if config.model.feature_norm != "none":
            allowed = f"none: {self.name} needs the derivative of a head that takes features as they are"
            raise UsageError("model.feature_norm", config.model.feature_norm, allowed)

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        return {"rotation": RotationHead(model.feature_dim)} if self.options.rotation else {}

    # client

    def phases(self, ctx: ClientContext) -> Sequence[Phase]:
        if ctx.task == 0:
            return (Phase(),)
        unused = f"extra.{self.name}."
        return (Phase(trains=lambda name: not name.startswith(unused), batch_norm=self.options.batch_norm),)

    def task_loss(self, step: Step) -> Tensor:
        classes = step.among(new_or_known(step) if self.options.task == "new" else step.known)
        if step.task > 0 or not self.options.rotation:
            return cross_entropy(step.output.logits, step.y, classes)
        if step.x.shape[-1] != step.x.shape[-2]:
            raise UsageError(f"options.{self.name}.rotation", True, "false: these images are not square")
        output = step.forward(turned(step.x))
        logits = torch.cat([output.logits, step.apply("rotation", output.features)], dim=1)
        labels = torch.cat([step.y + turns * len(step.known) for turns in range(4)])
        return cross_entropy(logits, labels, classes.expand(len(step.y), -1).repeat(4, 4))

    def loss(self, step: Step) -> dict[str, Tensor]:
        if "matrix" not in step.down:
            return {}
        anchor = step.forward(step.x, "stage:previous").features
        terms = self.options.weight, self.options.damping
        return {"elastic": elastic(step.output.features, anchor, step.down["matrix"], *terms)}

    def measure(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Moments of the classes in ``down["fresh"]``; the extremes of the nearness to the means of all others."""
        fresh = ctx.down["fresh"]
        place = torch.full((len(ctx.known),), -1, dtype=torch.int64, device=fresh.device)
        place[fresh] = torch.arange(len(fresh), device=fresh.device)
        rows = ctx.ids[place[ctx.labels] >= 0]
        images = ((x, place[y]) for x, y in ctx.batches(rows)) if len(rows) else ()
        found = class_moments(images, lambda x: ctx.forward(x).features, len(fresh), ctx.model.feature_dim)
        if "means" not in ctx.down:
            return found, ctx.state
        lowest = torch.full((), torch.inf, dtype=torch.float64, device=fresh.device)
        highest = -lowest
        for x, _ in ctx.batches() if len(ctx.ids) else ():
            near = nearness(ctx.forward(x, "stage:previous").features, ctx.down["means"], ctx.down["matrix"])
            lowest, highest = torch.minimum(lowest, near.min()), torch.maximum(highest, near.max())
        return {**found, "lowest": lowest, "highest": highest}, ctx.state

    def drift(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """How the features around each mean of ``down["means"]`` have moved since the previous task."""
        means = ctx.down["means"]
        moved = torch.zeros_like(means), torch.zeros_like(means[:, 0])
        for x, _ in ctx.batches() if len(ctx.ids) else ():
            before, after = ctx.forward(x, "stage:previous").features, ctx.forward(x).features
            bounds = ctx.down["lowest"], ctx.down["highest"]
            more = drift_sums(before, after, means, ctx.down["matrix"], *bounds, self.options.sigma)
            moved = moved[0] + more[0], moved[1] + more[1]
        return {"numerators": moved[0], "denominators": moved[1]}, ctx.state

    def matrices(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The sum of this client's feature matrices over all known classes, with the head in ``down`` if one is."""
        arrays = {**ctx.received, **{n: a for n, a in ctx.down.items() if n.startswith("head.")}}
        total = torch.zeros((), dtype=torch.float64, device=ctx.ids.device)
        total = total.expand(ctx.model.feature_dim, ctx.model.feature_dim)
        for x, _ in ctx.batches() if len(ctx.ids) else ():
            logits = ctx.forward(x, arrays).logits.to(torch.float64)
            total = total + feature_matrix(torch.where(ctx.known, logits, -torch.inf).softmax(1), arrays["head.weight"])
        return {"matrix": total, "images": torch.tensor(len(ctx.ids), device=total.device)}, ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        state = self.gaussians(server)
        learned = torch.nonzero(state["counts"] > 0).flatten()
        fresh = torch.nonzero(server.known & (state["counts"] == 0)).flatten()
        anchor = {"means": state["means"][learned], "matrix": server.state["matrix"]} if len(learned) else {}
        found = server.exchange(self.measure, down={**anchor, "fresh": fresh})
        if not found:
            return Finished(server.arrays), server.state
        if anchor:
            bounds = {n: found[n] for n in ("lowest", "highest")}
            moved = server.exchange(self.drift, down={**anchor, **bounds})
            # Where exchanges reach a few clients, each may reach others, and one nobody who holds images.
            if moved:
                state["means"][learned] += moved["numerators"] / moved["denominators"][:, None]
        counts = found["counts"]
        seen = fresh[counts > 0]
        state["counts"][seen], state["means"][seen] = counts[counts > 0], class_means(found)[counts > 0]
        state["factors"][seen] = self.factors(class_covariances(found)[counts > 0])
        head = self.rebalanced(server, state, int(counts.sum()))
        measured = server.exchange(self.matrices, down=head)
        if measured:
            state["matrix"] = measured["matrix"] / measured["images"]
        else:
            size = server.model.feature_dim
            state["matrix"] = server.state.get("matrix", state["means"].new_zeros(size, size))
        return Finished({**server.arrays, **head} if head else server.arrays), state

    def gaussians(self, server: Server) -> Arrays:
        """Copies of counts (C,), means (C, d) and factors (C, d, d) of all classes; 0 where a class has none yet."""
        size, width = server.model.feature_dim, len(server.known)
        like = torch.zeros(0, dtype=torch.float64, device=server.known.device)
        start = {"counts": like.long(), "means": like.new_zeros(0, size), "factors": like.new_zeros(0, size, size)}
        return {n: widen(server.state.get(n, a), width).clone() for n, a in start.items()}

    def factors(self, covariances: Tensor) -> Tensor:
        """Lower triangles L with ``L L^T`` the covariances (C, d, d) and the jitter."""
        jitter = self.options.jitter * torch.eye(covariances.shape[-1]).to(covariances)
        found, wrong = torch.linalg.cholesky_ex(covariances + jitter)
        if bool(wrong.any()):
            allowed = f"options.{self.name}.jitter={self.options.jitter:g} is too small for it"
            raise RunFailed(f"the covariance of a class's features is not positive definite: {allowed}")
        factors: Tensor = found
        return factors

    def rebalanced(self, server: Server, state: Arrays, images: int) -> Arrays:
        """Another head, ``head.*``, from the Gaussians; {} leaves it as it is."""
        return {}
