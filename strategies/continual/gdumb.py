"""GDumb: the stream only fills a balanced memory; at a task's end a fresh model is trained on the memories alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.blocks.memory import Policy, Rehearsal
from fedcl.blocks.mixup import mixed_cross_entropy
from fedcl.cards import Card, option
from fedcl.errors import RunFailed, UsageError
from fedcl.strategy import Arrays, ClientContext, Finished, Phase, Server, Source, Step, cross_entropy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream

MEMORY = "memory"
"""The phase of training on the memories."""


def restarts(turn: int, lowest: float = 0.01) -> float:
    """Cosine annealing with restarts, cycles of 1, 2, 4, ... turns: the factor on the first rate in a turn.

    ``lowest + (1 - lowest) (1 + cos(pi t / T)) / 2`` in the t-th turn of a cycle of T (Loshchilov and Hutter 2017).

    >>> [round(restarts(turn), 3) for turn in range(4)]
    [1.0, 1.0, 0.505, 1.0]
    """
    length = 1
    while turn >= length:
        turn, length = turn - length, 2 * length
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * turn / length)) / 2


def box(shape: tuple[int, int], share: Tensor, centre: Tensor) -> Tensor:
    """(H, W) bool: CutMix's box around a point, cut off at the border (Yun et al. 2019).

    Args:
        shape: (H, W).
        share: scalar, the part of the area before it is cut off.
        centre: (2,) in [0, 1), in parts of height and width.

    >>> box((4, 4), torch.tensor(0.25), torch.tensor([0.5, 0.0])).int().tolist()
    [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    """
    inside = []
    for size, point in zip(shape, centre.unbind(), strict=True):
        half = (size * share.sqrt()).floor() // 2
        place, middle = torch.arange(size, device=share.device), (size * point).floor()
        inside.append((place >= middle - half) & (place < middle + half))
    return inside[0][:, None] & inside[1][None, :]


class GDumb(Rehearsal):
    """Greedy sampler and dumb learner: a class-balanced memory a client, and training from scratch on nothing else."""

    name = "gdumb"
    family = "continual"
    stackable = True
    revisits = "to fill the memories and to train on them at the end of the task"
    reductions = {"stored": "sum", "model/": "sum", "images": "sum"}
    tried_with = {"options.gdumb.rounds": 2, "options.gdumb.epochs": 1}
    card = Card(
        title="GDumb: A Simple Approach that Questions Our Progress in Continual Learning",
        authors="Prabhu, Torr, Dokania",
        venue="ECCV",
        year=2020,
        bibtex="""@inproceedings{prabhu2020gdumb,
  title = {{GDumb}: A Simple Approach that Questions Our Progress in Continual Learning},
  author = {Prabhu, Ameya and Torr, Philip H. S. and Dokania, Puneet K.},
  booktitle = {ECCV},
  year = {2020}
}""",
        certainty="Sampler, cosine restarts and CutMix (half of the batches, alpha 1) certain. The federated form is "
        "ours: memories stay at clients, and the fresh model is averaged over them by exemplars; 31 rounds of 8 epochs "
        "are about the published 256, and end a cycle of the rate.",
        leaves_client=(
            ("stored", "1", "sum", "end of a task"),
            ("model", "as the parameters, float64", "sum", "each round of training on the memories"),
            ("images", "1", "sum", "each round of training on the memories"),
        ),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        cost="Nothing is trained in the rounds of the stream; at a task's end `rounds` models down and up, in float64.",
        notes="The global model stays the initial one, from which each training on the memories starts; what that "
        "gives is evaluated and then dropped. Published with optimiser.lr=0.05, optimiser.clip=10, "
        "federation.batch_size=16. A class is at most as balanced as each client's own memory. Training in exchanges "
        "is one client at a time.",
        deviations="The rate falls by rounds, not by epochs.",
    )

    @dataclass(frozen=True)
    class Options:
        budget: int = option(100_000, "largest memory of one client", unit="bytes")
        policy: Policy = option("class_balanced", "which images stay: equally many of each class, or a uniform sample")
        rounds: int = option(31, "rounds of training on the memories at a task's end")
        epochs: int = option(8, "local epochs of each")
        cutmix: float = option(0.5, "probability that a batch is mixed; 0 is without")

        def __post_init__(self) -> None:
            if self.budget < 1:
                raise ValueError(f"budget must be at least 1 byte, not {self.budget}")
            if self.rounds < 1 or self.epochs < 1:
                raise ValueError(f"rounds and epochs must be at least 1, not {self.rounds} and {self.epochs}")
            if not 0 <= self.cutmix <= 1:
                raise ValueError(f"cutmix must be between 0 and 1, not {self.cutmix}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.optimiser.schedule != "constant":
            allowed = f"constant: {self.name} lowers the rate itself, in training that no round of the stream is about"
            raise UsageError("optimiser.schedule", config.optimiser.schedule, allowed)

    # client

    def phases(self, ctx: ClientContext) -> list[Phase]:
        return [Phase(steps=0)]

    def sources(self, ctx: ClientContext) -> list[Source]:
        return []

    def task_loss(self, step: Step) -> Tensor:
        classes = step.among(step.known)
        if step.phase != MEMORY or not self.options.cutmix:
            return cross_entropy(step.output.logits, step.y, classes)
        # Each exchange is one round of the same name, so its number makes the draws differ.
        drawn = counter.counter_uniform(
            step.seed + step.down["turn"], counter.fold("cutmix"), (4 + len(step.y),), step.x.dtype
        )
        order = torch.argsort(drawn[4:])
        share = torch.where(drawn[3] < self.options.cutmix, drawn[0], torch.zeros_like(drawn[0]))
        cut = box((step.x.shape[-2], step.x.shape[-1]), share, drawn[1:3])
        logits = step.forward(torch.where(cut, step.x[order], step.x)).logits
        part = cut.to(logits.dtype).mean().expand(len(step.y))
        classes = classes.expand(len(step.y), -1)
        return mixed_cross_entropy(logits, (step.y, step.y[order]), part, (classes, classes[order]))

    def learn(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Trains the model that was sent on the memory: it times the images, and their number."""
        ids = ctx.state.get("ids", ctx.ids[:0]).to(ctx.ids.device)
        turn = int(ctx.down["turn"])
        start = {n: ctx.down.get(f"model/{n}", a) for n, a in ctx.received.items()}
        # In a new order each round: the client's random streams are named by the task and its last round.
        order = torch.from_numpy(counter.permutation(len(ids), *ctx.key, MEMORY, turn)).to(ids.device)
        phase = Phase(MEMORY, epochs=self.options.epochs, start=start, lr_scale=restarts(turn), ids=ids[order])
        trained = ctx.train(phase) if len(ids) else start
        sent = {f"model/{n}": len(order) * a.double() for n, a in trained.items()}
        return {**sent, "images": torch.tensor(len(order), dtype=torch.int64)}, ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        server.exchange(self.remember)
        arrays = server.arrays
        for turn in range(self.options.rounds):
            sent = {f"model/{n}": a for n, a in arrays.items()} if turn else {}
            found = server.exchange(self.learn, "all", down={**sent, "turn": torch.tensor(turn)})
            images = int(found["images"]) if found else 0
            if not images:
                raise RunFailed(
                    f"{self.name}: no client that was reached holds an image within {self.options.budget} bytes"
                )
            arrays = {n: (found[f"model/{n}"] / images).to(a.dtype) for n, a in arrays.items()}
        return Finished(server.arrays, evaluate=arrays), server.state
