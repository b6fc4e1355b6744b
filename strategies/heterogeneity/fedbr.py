"""FedBR: shared pseudo-images keep local classifiers flat on them, and local features near the global model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fedcl import random as counter
from fedcl.blocks.contrastive_losses import nearer_to_one
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, Broadcast, ClientContext, Server, Source, Step, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.data.store import TensorStore
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream


def soft_cross_entropy(logits: Tensor, target: Tensor, classes: Tensor) -> Tensor:
    """``-mean_i sum_c q_ic log softmax(o_i)_c`` over ``classes``.

    Args:
        logits, target: (B, C), B at least 1; the target is 0 outside of ``classes``.
        classes: (C,) bool mask.

    >>> round(soft_cross_entropy(torch.zeros(1, 2), torch.full((1, 2), 0.5), torch.tensor([True, True])).item(), 4)
    0.6931
    """
    logs = torch.where(classes, logits, torch.finfo(logits.dtype).min).log_softmax(dim=-1)
    return -torch.where(classes, target * logs, 0.0).sum(dim=-1).mean()


def average_images(store: TensorStore, rows: Tensor, count: int, *key: object) -> Tensor:
    """(C, H, W) uint8: the mean of ``count`` of the rows drawn without replacement, of all where there are fewer."""
    drawn = torch.from_numpy(counter.permutation(len(rows), *key)[:count]).to(rows.device)
    return store.gather(rows[drawn]).to(torch.float64).mean(dim=0).round().to(torch.uint8)


class FedBR(Strategy):
    """Adds two terms on pseudo-images, and an adversary that looks for what tells local features from global ones."""

    name = "fedbr"
    family = "heterogeneity"
    stackable = True
    unlabelled = "sees"
    exemplars = ("images",)
    reductions = {"present": "sum", "images": "sum"}
    card = Card(
        title="FedBR: Improving Federated Learning on Heterogeneous Data via Local Learning Bias Reduction",
        authors="Guo, Tang, Lin",
        venue="ICML",
        year=2023,
        bibtex="""@inproceedings{guo2023fedbr,
  title = {{FedBR}: Improving Federated Learning on Heterogeneous Data via Local Learning Bias Reduction},
  author = {Guo, Yongxin and Tang, Xiaoying and Lin, Tao},
  booktitle = {ICML},
  year = {2023}
}""",
        certainty="Terms, weights, temperatures, 32 images of 10 each and the projection's shape read in the released "
        "code; the paper was not available.",
        leaves_client=(
            ("present", "clients", "sum", "once, before the first round"),
            ("images", "(images, channels, height, width), means of 10", "sum", "once, before the first round"),
        ),
        server_state="the pseudo-images",
        cost="32 images down once; a projection up and down with the model; the pseudo-images in each step, and one "
        "forward pass of the received model on them.",
        notes="Means of ten images of one client leave it, in the clear. Pseudo-images and stream are paired by "
        "position: as many pairs as the smaller of both has, so federation.batch_size=32 is as published. Those of "
        "`source=clients` are made from the first task's images and kept for the whole stream. With "
        "`source=public` they are means of the server's own images, and each is mixed in every step with an image of "
        "the batch, half and half, its target likewise. BatchNorm sees the pseudo-images among the batch.",
        deviations="Projection and model are trained in one joint step: the adversary's loss sees detached features, "
        "the model's sees a detached projection. The released code takes two steps, the model's with the projection "
        "just updated. There the target's features are cached once a round; here they are of the same augmented "
        "images as the model's. The released mixup of all batches and its decorrelation term are no part of the "
        "method.",
    )

    @dataclass(frozen=True)
    class Options:
        mu: float = option(0.5, "weight of the features' term")
        weight: float = option(1.0, "lambda, weight of the flat classifier")
        tau_global: float = option(2.0, "tau_1, factor on the similarity to the global features")
        tau_local: float = option(2.0, "tau_2, factor on the similarity to the features of the client's own images")
        images: int = option(32, "how many pseudo-images there are", unit="images")
        averaged: int = option(10, "images in the mean of each", unit="images")
        source: Literal["clients", "public"] = option("clients", "whose images are averaged: a client's, the server's")

        def __post_init__(self) -> None:
            for name in ("mu", "weight", "tau_global", "tau_local"):
                if not 0 <= getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
            if self.images < 1 or self.averaged < 1:
                raise ValueError(f"images and averaged must be at least 1, not {self.images}, {self.averaged}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if self.options.source == "public" and not config.partition.public:
            raise UsageError("partition.public", config.partition.public, "above 0 for options.fedbr.source=public")

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        d = model.feature_dim
        layers = [nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)]
        return {"projection": nn.Sequential(*layers)}

    # client

    def present(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """A one at the client's own place: it has images."""
        here = torch.zeros(int(ctx.down["clients"]), dtype=torch.int64)
        here[ctx.client] = 1
        return {"present": here}, ctx.state

    def average(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The pseudo-images that are asked of this client, zeros in the places of others'."""
        owners = ctx.down["owners"].tolist()
        rows = ctx.ids if len(ctx.ids) else ctx.unlabelled
        made = [
            average_images(ctx.store, rows, self.options.averaged, *ctx.key, "fedbr", place)
            if owner == ctx.client
            else torch.zeros_like(ctx.store.gather(rows[:1])[0])
            for place, owner in enumerate(owners)
        ]
        return {"images": torch.stack(made)}, ctx.state

    def sources(self, ctx: ClientContext) -> list[Source]:
        images = ctx.down.get("images")
        if images is None:
            return []
        return [Source(torch.arange(len(images), device=images.device), len(images), images=images)]

    def loss(self, step: Step) -> dict[str, Tensor]:
        pseudo, own = step.batch.rows("fedbr"), step.batch.rows("stream")
        if not len(pseudo):
            return {}
        x, output, known = step.x[pseudo], step.output, step.known
        logits, features = output.logits[pseudo], output.features[pseudo]
        target = (known.to(logits.dtype) / known.sum()).expand_as(logits)
        if self.options.source == "public":
            partner = own[step.integers(len(own), (len(pseudo),), "mix")]
            x = (x + step.x[partner]) / 2
            mixed = step.forward(x)
            logits, features, label = mixed.logits, mixed.features, step.y[partner]
            one_hot = (label[:, None] == torch.arange(len(known), device=label.device)).to(target.dtype)
            target = torch.where((label >= 0)[:, None], (target + one_hot) / 2, target)
        pairs = min(len(pseudo), len(own))
        received = step.forward(x, "received").features.detach()
        trained = features[:pairs], received[:pairs], output.features[own][:pairs]
        still = {n: a.detach() for n, a in {**step.params, **step.buffers}.items()}
        return {
            "flat": self.options.weight * soft_cross_entropy(logits, target, known),
            "features": self.options.mu * self.likeness(step, still, *trained),
            "adversary": -self.likeness(step, {**step.params, **step.buffers}, *(z.detach() for z in trained)),
        }

    def likeness(self, step: Step, arrays: Arrays, local: Tensor, received: Tensor, own: Tensor) -> Tensor:
        """-mean(l) of projected features (B, d): of pseudo-images, local and received, and of the client's images."""
        one, target, other = (step.apply("projection", z, which=arrays) for z in (local, received, own))
        near, far = (torch.cosine_similarity(one, z, dim=-1) for z in (target, other))
        return nearer_to_one(self.options.tau_global * near, self.options.tau_local * far)

    # server

    def begin_task(self, server: Server) -> Arrays:
        if "images" in server.state:
            return server.state
        if self.options.source == "public":
            public = server.public
            if public is None or not len(public.ids):
                return server.state
            key = (*server.key, "fedbr", "public")
            made = [
                average_images(public.store, public.ids, self.options.averaged, *key, place)
                for place in range(self.options.images)
            ]
            return {"images": torch.stack(made)}
        found = server.exchange(self.present, down={"clients": torch.tensor(server.num_clients)})
        if "present" not in found:
            return server.state
        here = torch.nonzero(found["present"]).flatten()
        drawn = counter.words(self.options.images, *server.key, "fedbr", "owners") % len(here)
        owners = here.cpu()[torch.from_numpy(drawn.astype("int64"))]
        made_by = server.exchange(self.average, clients=sorted(set(owners.tolist())), down={"owners": owners})
        return {"images": made_by["images"]}

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast(server.state, scope="run")
