"""TARGET: the server makes images of the old classes from the global model, and clients distil it on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.blocks.inversion import Recipe, Teacher, invert
from fedcl.blocks.losses import cross_entropy, distillation
from fedcl.cards import Card, option
from fedcl.masks import by_head
from fedcl.strategy import Arrays, Broadcast, ClientContext, Server, Source, Step, Strategy

from ..federated.finetune import new_or_known


def batch_for_an_epoch(images: int, per_client: float, batch_size: int) -> int:
    """Synthetic images a step with which an epoch of a mean client sees each about once; at least 2, for BatchNorm.

    Args:
        images: synthetic images there are.
        per_client: real images that a client has on average.
        batch_size: real images a step.

    >>> batch_for_an_epoch(8000, 2000, 128), batch_for_an_epoch(10, 2000, 128)
    (500, 2)
    """
    return max(2, images // max(1, math.ceil(per_client / batch_size)))


class Target(Strategy):
    """Distils the previous global model on synthetic images, which the server makes without data after each task."""

    name = "target"
    family = "continual"
    stackable = True
    unlabelled = "sees"
    needs_previous = True
    neutral = {"weight": 0.0, "task": "known"}
    yields = ("task_loss",)
    exemplars = ("images",)
    reductions = {"scale": "max", "size": "max", "held": "sum"}
    tried_with = {
        "options.target.images": 12, "options.target.rounds": 3, "options.target.warmup": 1, "options.target.batch": 8,
        "options.target.steps": 2, "options.target.width": 4, "options.target.latent": 8,
        "options.target.student_steps": 2,
    }  # fmt: skip
    card = Card(
        title="TARGET: Federated Class-Continual Learning via Exemplar-Free Distillation",
        authors="Zhang, Chen, Zhuang, Lyu",
        venue="ICCV",
        year=2023,
        bibtex="""@inproceedings{zhang2023target,
  title = {TARGET: Federated Class-Continual Learning via Exemplar-Free Distillation},
  author = {Zhang, Jie and Chen, Chen and Zhuang, Weiming and Lyu, Lingjuan},
  booktitle = {ICCV},
  year = {2023}
}""",
        certainty="Losses, generator, schedule and weights read in the released code, for CIFAR-100. Ours: 40 rounds "
        "of synthesis, as the released 10 end before the warm-up of 20; which of the images made are kept (drawn "
        "evenly); the student's cosine ends with the last round.",
        leaves_client=(
            ("scale", "2 x channels, float64", "max", "each round"),
            ("size", "3", "max", "each round"),
            ("held", "2", "sum", "each round"),
        ),
        server_state="the global model of the previous task's end; the synthetic images, which are not real ones but "
        "may show what real ones look like; mean, deviation and size of images, numbers of images",
        cost="Before each task after the first: rounds x steps passes of a batch through generator and model at the "
        "server, and the student's. Once per task and client the previous model and the images. Two more forward "
        "passes a step, on the synthetic images. 8,000 images are too many for a CPU: lower images, batch, width.",
        deviations="`schedule=released` is the released code's: 10 rounds, so no disagreement and no student, and 10 "
        "batches of images at most. A client with more images than the mean uses all of them, where that code ends its "
        "epoch with the synthetic images.",
        notes="Real and synthetic images pass the network apart, as released, so that BatchNorm sees each by itself. A "
        "network without BatchNorm has no statistics loss: its images follow the cross entropy and the student alone. "
        "For Tiny-ImageNet and ImageNet-100 the code sets steps 50, meta reptile, lr 2e-4, one_hot 0.1, batch_norm "
        "0.1, student_temperature 5, rounds 200. The published average is uniform (federation.weighting=uniform). "
        "Clients tell mean and deviation of the pixels, which all have in common, and how many images they hold. "
        "Where nobody trained before the second task there is nothing to invert: no images are made, no term is added. "
        "The generator takes all old classes for one softmax, also where tasks are known at test.",
    )

    @dataclass(frozen=True)
    class Options(Recipe):
        weight: float = option(25.0, "weight of the distillation on synthetic images (kd)")
        temperature: float = option(2.0, "temperature of the distillation")
        images: int = option(8000, "synthetic images that clients get for a task (nums)", unit="images")
        batch_size: int = option(0, "synthetic images a step; 0: an epoch of a mean client sees each", unit="images")
        schedule: Literal["published", "released"] = option(
            "published", "released: 10 rounds, which end before the warm-up"
        )
        task: Literal["new", "known"] = option("new", "classes of the cross entropy: the new ones, or all known")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.weight < math.inf:
                raise ValueError(f"weight must be at least 0, not {self.weight}")
            if not 0 < self.temperature < math.inf:
                raise ValueError(f"temperature must be above 0, not {self.temperature}")
            if self.images < 2:
                raise ValueError(f"images must be at least 2, not {self.images}")
            if self.batch_size < 0 or self.batch_size == 1:
                raise ValueError(f"batch_size must be 0 or at least 2, not {self.batch_size}")
            if self.schedule == "published" and self.rounds * self.batch < self.images:
                made = f"rounds x batch = {self.rounds * self.batch}"
                raise ValueError(f"images must be at most {made}, the images that are made, not {self.images}")
            if self.schedule == "published" and self.adversarial and self.rounds <= self.warmup:
                raise ValueError(f"rounds must be above warmup ({self.warmup}), or adversarial 0, not {self.rounds}")

    # client

    def sources(self, ctx: ClientContext) -> list[Source]:
        if "images" not in ctx.down:
            return []
        images = ctx.down["images"]
        size = self.options.batch_size or batch_for_an_epoch(len(images), float(ctx.down["per_client"]), ctx.batch_size)
        return [Source(torch.arange(len(images), device=images.device), size, images=images)]

    def task_loss(self, step: Step) -> Tensor:
        # Alone, so that the statistics of BatchNorm are those of the real images.
        logits = step.forward(step.x).logits if "images" in step.down else step.output.logits
        classes = new_or_known(step) if self.options.task == "new" else step.known
        return cross_entropy(logits, step.y, step.among(classes))

    def loss(self, step: Step) -> dict[str, Tensor]:
        if "images" not in step.down:
            return {}
        x = step.x[step.batch.rows(self.name)]
        student, teacher = step.forward(x).logits, step.forward(x, "stage:previous").logits
        terms = [
            distillation(student, teacher, old, self.options.temperature)
            for old in by_head(step.down["old"], step.heads, step.task)
        ]
        return {"distillation": self.options.weight * torch.stack(terms).sum()}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        store = ctx.store
        told = {
            "scale": torch.tensor([store.statistics.mean, store.statistics.std], dtype=torch.float64),
            "size": torch.tensor(store.shape),
            "held": torch.tensor([len(ctx.ids), 1]),
        }
        return told, ctx.state

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        told = server.uploads
        if not told:
            return server.arrays, server.state
        held = told["held"] + server.state["held"] if "held" in server.state else told["held"]
        return server.arrays, {**server.state, **told, "held": held}

    def begin_task(self, server: Server) -> Arrays:
        state, previous = server.state, server.previous
        if previous is None or "size" not in state or not self.options.weight:
            return state
        old = server.known & ~server.new
        old = old if bool(old.any()) else server.known  # a stream without new classes shows the same ones again
        made = self.made(server, previous, old)
        images, clients = state["held"].tolist()
        per_client = torch.tensor(images / clients, dtype=torch.float64)
        return {**state, "images": made, "old": old, "per_client": per_client}

    def made(self, server: Server, previous: Arrays, old: Tensor) -> Tensor:
        """(M, C, H, W) uint8 images of the classes ``old`` (C,) bool, made from the previous global model."""
        options, state = self.options, server.state
        dtype, device = previous["head.weight"].dtype, old.device
        arrays = {n: a.to(device) for n, a in previous.items()}
        mean, std = state["scale"].to(device, dtype)[:, :, None, None]
        channels, height, width = state["size"].tolist()
        # Below its own width the old head ends: it has no rows for the classes that came after.
        classes = old[: len(previous["head.weight"])]
        teacher = Teacher(server.model, arrays, mean, std, (channels, height, width), classes)
        recipe = options if options.schedule == "published" else replace(options, rounds=10, adversarial=0.0)
        seed = counter.fold(*server.key, self.name)
        images = invert(teacher, recipe, seed).images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(counter.fold(seed, "kept")))
        return images[order[: options.images].sort().values.to(device)]

    def broadcast(self, server: Server) -> Broadcast:
        sent = ("images", "old", "per_client") if self.options.weight else ()
        return Broadcast({n: server.state[n] for n in sent if n in server.state}, scope="task")
