"""iCaRL: herded exemplars, distillation by sigmoids, and the nearest mean of exemplars; exemplars stay at clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.blocks.losses import cross_entropy, distillation
from fedcl.blocks.memory import BudgetOptions, Rehearsal, herding, keep
from fedcl.blocks.statistics import class_sums, widen
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.masks import by_head
from fedcl.strategy import Arrays, ClientContext, Finished, Predictor, Server, Step

from ..prototype.nearest_mean import nearest_mean_scores

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def binary_distillation(logits: Tensor, labels: Tensor, teacher: Tensor, classes: Tensor, old: Tensor) -> Tensor:
    """Sigmoid cross entropy, mean over images and their classes (Rebuffi et al. 2017, algorithm 3).

    The target of an old class is the teacher's sigmoid, that of another class 1 for the label and 0 otherwise.

    Args:
        logits: (B, C).
        labels: (B,) int64.
        teacher: (B, C') logits, C' <= C; its gradient is stopped.
        classes: (C,) or (B, C) bool, those that have an output.
        old: (C,) bool, all below C'.

    >>> logits, old = torch.zeros(1, 2), torch.tensor([True, False])
    >>> round(binary_distillation(logits, torch.tensor([1]), logits[:, :1], ~(old & ~old), old).item(), 4)
    0.6931
    """
    old_targets = F.pad(teacher.detach().sigmoid(), (0, logits.shape[-1] - teacher.shape[-1]))
    one_hot = (labels[:, None] == torch.arange(logits.shape[-1], device=labels.device)).to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, torch.where(old, old_targets, one_hot), reduction="none")
    classes = classes.expand(terms.shape)
    mean: Tensor = torch.where(classes, terms, 0.0).sum() / classes.sum()
    return mean


class ICaRL(Rehearsal):
    """Herding towards the global class mean, distillation of old classes, nearest pooled mean of exemplars."""

    name = "icarl"
    family = "continual"
    stackable = True
    needs_previous = True
    revisits = "to choose the exemplars of the task at its end"
    neutral = {"budget": 0, "loss": "softmax", "weight": 0.0, "predict": "head"}
    reductions = {"stored": "sum", "sums": "sum", "counts": "sum"}
    card = Card(
        title="iCaRL: Incremental Classifier and Representation Learning",
        authors="Rebuffi, Kolesnikov, Sperl, Lampert",
        venue="CVPR",
        year=2017,
        bibtex="""@inproceedings{rebuffi2017icarl,
  title = {{iCaRL}: Incremental Classifier and Representation Learning},
  author = {Rebuffi, Sylvestre-Alvise and Kolesnikov, Alexander and Sperl, Georg and Lampert, Christoph H.},
  booktitle = {CVPR},
  year = {2017}
}""",
        certainty="Loss, herding and nearest mean of exemplars certain; `loss=softmax` is PyCIL's, with TARGET's "
        "weight 1. The federated form is ours: a client herds its own images towards the mean over all clients' "
        "images of the class (`herding=local`: over its own), and the means that predict are pooled over all clients' "
        "exemplars.",
        leaves_client=(
            ("sums", "classes x features, float64", "sum", "end of a task, twice: all images, then exemplars"),
            ("counts", "classes", "sum", "end of a task, twice"),
            ("stored", "1", "sum", "end of a task"),
        ),
        client_state="image ids within the byte budget (the images are the client's own) and their rank in the class",
        server_state="sums and counts of exemplars' features by class; the global model of the previous task's end",
        cost="One more forward pass a step, twice the images; passes over the task's images and the exemplars at a "
        "task's end.",
        notes="Exemplars come as a batch of their own with each step, not mixed in by their share. A budget of fewer "
        "images than a client has classes leaves some of them without exemplar. A class without exemplar at any client "
        "is never predicted; within a task its new classes have none yet. Clients that an exchange does not reach "
        "leave the class means as they were. Targets of old classes come from the old model alone, so `loss=sigmoid` "
        "refuses a stream with a task that brings no new class.",
    )

    @dataclass(frozen=True)
    class Options(BudgetOptions):
        loss: Literal["sigmoid", "softmax"] = option(
            "sigmoid", "sigmoid cross entropies as published, or cross entropy and distillation as in PyCIL"
        )
        weight: float = option(1.0, "weight of the distillation of loss=softmax")
        temperature: float = option(2.0, "temperature of the distillation of loss=softmax")
        herding: Literal["global", "local"] = option("global", "the class mean that exemplars follow")
        flip: bool = option(False, "means that predict are of exemplars and their mirror images")
        predict: Literal["exemplars", "head"] = option(
            "exemplars", "nearest mean of exemplars, or the head as in TARGET's baseline"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")
            if not 0 < self.temperature < float("inf"):
                raise ValueError(f"temperature must be above 0, not {self.temperature}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if self.options.loss == "sigmoid" and not all(stage.classes for stage in stream.stages):
            allowed = "a stream whose tasks all bring new classes: the others learn nothing from labels by sigmoids"
            raise UsageError("scenario.name", config.scenario.name, f"{allowed}; options.icarl.loss=softmax does")

    # client

    def task_loss(self, step: Step) -> Tensor:
        logits, old = step.output.logits, step.known & ~step.new
        teacher = step.forward(step.x, "stage:previous").logits if step.task else logits[:, :0]
        if self.options.loss == "sigmoid":
            return binary_distillation(logits, step.y, teacher, step.among(step.known), old & (step.task > 0))
        loss = cross_entropy(logits, step.y, step.among(step.known))
        if not step.task:
            return loss
        heads = by_head(old, step.heads, step.task)
        terms = [distillation(logits, teacher, group, self.options.temperature) for group in heads]
        total: Tensor = loss + self.options.weight * torch.stack(terms).sum()
        return total

    def features(self, ctx: ClientContext, x: Tensor) -> Tensor:
        """(B, d) normalised features of the received model, float64."""
        return F.normalize(ctx.forward(x).features.double(), dim=-1)

    def describe(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Sums and counts of normalised features of this task's images by class."""
        found = class_sums(ctx.batches(), lambda x: self.features(ctx, x), len(ctx.known), ctx.model.feature_dim)
        return {"sums": found[0], "counts": found[1]}, ctx.state

    def choose(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Ranks this task's images by herding and keeps the first of each class, as many as fit."""
        held = {n: a.to(ctx.ids.device) for n, a in ctx.state.items()} or {"ids": ctx.ids[:0], "rank": ctx.ids[:0]}
        limit = self.room(ctx.store.image_bytes)
        ids, rank = [held["ids"]], [held["rank"]]
        for label in torch.unique(ctx.labels).tolist() if limit else []:
            again = ctx.store.label_tensor[ids[0]] == label  # a class that comes back is ranked anew
            members = torch.unique(torch.cat([ids[0][again], ctx.ids[ctx.labels == label]]))
            ids[0], rank[0] = ids[0][~again], rank[0][~again]
            found = torch.cat([self.features(ctx, x) for x, _ in ctx.batches(members)])
            mean = found.mean(dim=0)
            # Not everybody need have been asked for the means: of a class that nobody asked had, there is none.
            if "means" in ctx.down and bool(ctx.down["means"][label].any()):
                mean = ctx.down["means"][label].to(found.device)
            order = herding(found, mean, min(limit, len(members)))
            ids.append(members[order])
            rank.append(torch.arange(len(order), device=order.device))
        offered, ranks = torch.cat(ids), torch.cat(rank)
        kept = keep(ranks, ctx.store.label_tensor[offered], limit, "class_balanced")
        stored = torch.tensor(len(kept), dtype=torch.int64)
        return {"stored": stored}, {"ids": offered[kept], "rank": ranks[kept]}

    def represent(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Sums and counts of normalised features of the exemplars by class."""

        def seen(x: Tensor) -> Tensor:
            found = self.features(ctx, x)
            return (found + self.features(ctx, x.flip(-1))) / 2 if self.options.flip else found

        ids = ctx.state.get("ids", ctx.ids[:0])
        found = class_sums(ctx.batches(ids.to(ctx.ids.device)), seen, len(ctx.known), ctx.model.feature_dim)
        return {"sums": found[0], "counts": found[1]}, ctx.state

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        down: Arrays = {}
        if self.options.herding == "global":
            found = server.exchange(self.describe)
            down = {"means": found["sums"] / found["counts"].clamp(min=1)[:, None]} if found else {}
        server.exchange(self.choose, down=down)
        found = server.exchange(self.represent, "all")
        return Finished(server.arrays), self.renewed(server, found)

    def renewed(self, server: Server, found: Arrays) -> Arrays:
        """Sums and counts of exemplars; those of classes of which none was reached stay as they were."""
        width = len(server.known)
        before = {n: widen(a, width) for n, a in server.state.items()}
        if not found or not int(found["counts"].sum()):
            return before
        if not before:
            return found
        fresh = found["counts"] > 0
        return {
            "sums": torch.where(fresh[:, None], found["sums"], before["sums"]),
            "counts": torch.where(fresh, found["counts"], before["counts"]),
        }

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        output = predictor.forward(x)
        if self.options.predict == "head" or "counts" not in predictor.state:
            return output.logits
        width = output.logits.shape[-1]
        counts = widen(predictor.state["counts"], width)
        means = F.normalize(widen(predictor.state["sums"], width), dim=-1).to(output.features.dtype)
        return nearest_mean_scores(F.normalize(output.features, dim=-1), means, counts)
