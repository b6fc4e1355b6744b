"""OnPro: online prototypes kept apart, and replay that mixes images of classes whose prototypes are close."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.blocks.contrastive_losses import (
    class_contrast,
    class_prototypes,
    pair_and_class_contrast,
    prototype_equilibrium,
)
from fedcl.blocks.memory import MemoryOptions, Rehearsal
from fedcl.blocks.mixup import mixed, mixed_cross_entropy
from fedcl.blocks.statistics import widen
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.masks import own_head
from fedcl.strategy import Arrays, Batch, Broadcast, ClientContext, Finished, Server, Source, Step, cross_entropy

from ._feedback import Mixture, mixed_labels, mixture
from ._views import Views

if TYPE_CHECKING:
    from fedcl.models.model import Output


def turned_labels(labels: Tensor, kinds: int) -> Tensor:
    """(8N,) labels of :func:`turned_views`: each of the ``kinds`` is another one for each turn."""
    return torch.cat([labels + kinds * quarter for quarter in range(4)]).repeat(2)


def turned_views(first: Tensor, second: Tensor) -> Tensor:
    """(8N, C, H, W): the first views as they are and turned by 90, 180 and 270 degrees, then the second; H = W."""
    return torch.cat([torch.rot90(view, quarter, (-2, -1)) for view in (first, second) for quarter in range(4)])


def views_of(step: Step, source: str) -> Tensor:
    """(2, n) int64: the places of a source's images in the first view, and in the second."""
    places: Tensor = step.batch.rows(source)
    return places.view(step.batch.views, -1)[:2]


class OnPro(Views, Rehearsal):
    """Replay with contrasted prototypes of each batch, contrasted turned images, and mixtures of confusable classes."""

    name = "onpro"
    tried_with = {"model.projector_dim": 4}
    reductions = {**Rehearsal.reductions, "sums": "sum", "counts": "sum"}
    card = Card(
        title="Online Prototype Learning for Online Continual Learning",
        authors="Wei, Ye, Huang, Zhang, Shan",
        venue="ICCV",
        year=2023,
        bibtex="""@inproceedings{wei2023onpro,
  title = {Online Prototype Learning for Online Continual Learning},
  author = {Wei, Yujie and Ye, Jiaxin and Huang, Zhizhong and Zhang, Junping and Shan, Hongming},
  booktitle = {ICCV},
  year = {2023}
}""",
        certainty="All three losses, their weights of 1, temperatures 0.5 and 0.07 and the rules of mixing read in the "
        "released code; base 0.75 and chance 0.6 are its settings for CIFAR-10 (0.9 and 0.2 for CIFAR-100). As there, "
        "an image counts in the divisor of its own positives, and a mixture of two classes is a class of its own in "
        "the contrast. The federated form is ours.",
        leaves_client=(
            ("stored", "1", "sum", "end of a task"),
            ("sums", "classes x p, float64", "sum", "round, with pooled=true"),
            ("counts", "classes", "sum", "round, with pooled=true"),
        ),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        server_state="with pooled=true the prototypes of all classes so far",
        cost="About ten forward passes of an image: two views, each turned three times, mixed and unmixed.",
        deviations="The released code mixes before it augments, here both images are augmented first; its first view "
        "is not augmented; its cross entropy sees a third view, here both. It draws the images of a confusable pair "
        "from the whole memory and rounds the numbers of pairs, here they are from the replay batch and drawn one by "
        "one.",
        notes="Meant for images seen once: federation.passes=once, federation.batch_size=10. The memory offers the "
        "images of a round from its start on, so that classes new in it reach the cross entropy, which after the first "
        "task is of replayed images alone (of the stream's where the budget is 0). The first step of a round has no "
        "prototypes of a step before and mixes nothing, unless pooled=true: then the server pools the clients' "
        "prototypes of their last steps and sends them, so that a client mixes what all find confusable. Prototypes of "
        "classes that a client lacks are not negatives of its own. Images must be square, and the projector no wider "
        "than the features.",
    )

    @dataclass(frozen=True)
    class Options(MemoryOptions):
        batch_size: int = option(64, "memory images a step; 0 takes federation.batch_size", unit="images")
        per_class: int = option(7, "most memory images a step for each class seen; 0: no limit", unit="images")
        prototypes: float = option(1.0, "weight of the equilibrium of prototypes")
        instances: float = option(1.0, "weight of the contrast of turned images")
        temperature: float = option(0.5, "temperature of the prototypes")
        sharpness: float = option(0.07, "temperature of the turned images")
        similarity: float = option(1.0, "lambda_s, factor of the similarities of turned images; 0.5 on CIFAR-10")
        base: float = option(0.75, "share of the replay batch that is mixed at random, not by confusable classes")
        chance: float = option(0.6, "probability of mixing")
        most: float = option(0.6, "largest share of the second image in a random mixture")
        alpha: float = option(0.4, "share of the second image in a confusable pair: Beta(alpha, alpha)")
        pooled: bool = option(False, "the server pools the clients' prototypes and sends them (ours)")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.per_class < 0:
                raise ValueError(f"per_class must be at least 0, not {self.per_class}")
            for name in ("prototypes", "instances", "similarity"):
                if not 0 <= getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
            for name in ("temperature", "sharpness", "alpha"):
                if not 0 < getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
            for name in ("base", "chance", "most"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")

    # client

    def sources(self, ctx: ClientContext) -> list[Source]:
        _, height, width = ctx.store.shape
        if height != width:
            raise UsageError("data.name", f"{height}x{width}", f"square images: {self.name} turns them")
        held = self.remember(ctx)[1]["ids"]
        size = self.options.batch_size or ctx.batch_size
        if self.options.per_class:
            size = min(size, self.options.per_class * int(ctx.known.sum()))
        return [Source(held, size)] if len(held) else []

    def begin_round(self, ctx: ClientContext) -> Arrays:
        classes, like = len(ctx.known), next(iter(ctx.received.values()))
        width = [a for n, a in ctx.received.items() if n.startswith("projector.")][-1].shape[0]
        if width > ctx.model.feature_dim:
            allowed = f"at most {ctx.model.feature_dim}, the features of the encoder, for {self.name}"
            raise UsageError("model.projector_dim", width, allowed)
        if "means" not in ctx.down:
            return {"means": like.new_zeros(classes, width), "present": torch.zeros_like(ctx.known)}
        means, present = (widen(ctx.down[n], classes) for n in ("means", "present"))
        return {"means": means.to(like.dtype), "present": present}

    def prepare(self, batch: Batch) -> Batch:
        return batch.repeat(2)

    def task_loss(self, step: Step) -> Tensor:
        memory = views_of(step, self.name)
        if step.task == 0 or not memory.numel():
            rows = views_of(step, "stream").flatten()
            classes = step.among(step.known)
            return cross_entropy(
                step.output.logits[rows], step.y[rows], classes if classes.dim() == 1 else classes[rows]
            )
        pairs, output = self.replayed(step)
        count = memory.shape[1]
        upright = torch.cat([output.logits[:count], output.logits[4 * count : 5 * count]])
        labels = step.y[memory[0]][pairs.first].repeat(2), step.y[memory[0]][pairs.second].repeat(2)
        first, second = (step.known if step.heads is None else own_head(step.known, y, step.heads) for y in labels)
        return mixed_cross_entropy(upright, labels, pairs.share.repeat(2), (first, second))

    def loss(self, step: Step) -> dict[str, Tensor]:
        o = self.options
        stream, memory = views_of(step, "stream"), views_of(step, self.name)
        instances = step.output.logits.sum() * 0.0
        if stream.numel():  # else none of the stream's images has a label
            output = step.forward(turned_views(step.x[stream[0]], step.x[stream[1]]))
            labels = turned_labels(step.y[stream[0]], len(step.known))
            instances = pair_and_class_contrast(self.scores(step, output, "new"), labels)
        equilibrium = self.equilibrium(step, stream)
        if memory.numel():
            equilibrium = equilibrium + self.equilibrium(step, memory)
        if memory.numel() and step.task > 0:
            pairs, output = self.replayed(step)
            own = step.y[memory[0]]
            kinds = mixed_labels(own[pairs.first], own[pairs.second], pairs.share, len(step.known))
            labels = turned_labels(kinds, len(step.known) + len(own))
            instances = instances + class_contrast(self.scores(step, output, "replayed"), labels)
        return {"prototypes": o.prototypes * equilibrium, "instances": o.instances * instances}

    def replayed(self, step: Step) -> tuple[Mixture, Output]:
        """The mixtures of the replay batch and what the model gives for both their views, turned; once a step."""
        if self.name not in step.cache:
            o, memory = self.options, views_of(step, self.name)
            pairs = mixture(
                step,
                step.y[memory[0]],
                step.carried["means"],
                step.carried["present"],
                o.base,
                o.chance,
                o.most,
                o.alpha,
            )
            first, second = (mixed(step.x[rows], *pairs) for rows in memory)
            step.cache[self.name] = pairs, step.forward(turned_views(first, second))
        found: tuple[Mixture, Output] = step.cache[self.name]
        return found

    def equilibrium(self, step: Step, rows: Tensor) -> Tensor:
        """Of the prototypes of some images, places (2, n) by view."""
        z = F.normalize(self.embeddings(step), dim=-1)
        (first, counts), (second, _) = (class_prototypes(z[view], step.y[view], len(step.known)) for view in rows)
        return prototype_equilibrium(first, second, counts > 0, self.options.temperature)

    def scores(self, step: Step, output: Output, tag: str) -> Tensor:
        """``lambda_s (P F^T + P P^T) / T`` of turned images: P unit projections, F a run of as many unit features."""
        assert output.embeddings is not None  # the model has a projector
        projections, features = F.normalize(output.embeddings, dim=-1), F.normalize(output.features, dim=-1)
        width, spare = projections.shape[1], features.shape[1] - projections.shape[1]
        start = step.integers(spare, (1,), f"onpro {tag}") if spare else 0
        columns = torch.arange(width, device=features.device) + start
        similar = projections @ features[:, columns].mT + projections @ projections.mT
        scaled: Tensor = self.options.similarity * similar / self.options.sharpness
        return scaled

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        memory = views_of(step, self.name).flatten()
        if not len(memory):
            return {"means": step.carried["means"], "present": step.carried["present"]}
        z = F.normalize(self.embeddings(step), dim=-1)[memory].detach()
        means, counts = class_prototypes(z, step.y[memory], len(step.known))
        return {"means": means, "present": counts > 0}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        found, state = super().end_round(ctx, trained, steps)
        if not self.options.pooled:
            return found, state
        counts = ctx.carried["present"].to(torch.int64) * (steps > 0)
        return {**found, "sums": ctx.carried["means"].to(torch.float64) * counts[:, None], "counts": counts}, state

    # server

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast({n: a for n, a in server.state.items() if n in ("means", "present")})

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        if "counts" not in server.uploads:
            return server.arrays, server.state
        counts = server.uploads["counts"]
        fresh, means = counts > 0, server.uploads["sums"] / counts.clamp(min=1)[:, None]
        if "means" in server.state:
            old, known = (widen(server.state[n], len(counts)) for n in ("means", "present"))
            means, fresh = torch.where(fresh[:, None], means, old), fresh | known
        return server.arrays, {**server.state, "means": means, "present": fresh}

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        finished, state = super().finish_task(server)
        return finished, {**server.state, **state}
