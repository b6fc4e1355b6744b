"""Infinite learning-rate schedule: no warming up again at a new task; annealing only for the model that is used."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, Broadcast, Finished, Server, Step, Strategy

KEPT = "model"


@dataclass(frozen=True)
class Shape:
    """The schedule: lengths in rounds, rates as parts of the largest one."""

    warmup: int
    cooldown: int
    constant: float
    anneal: int
    least: float

    def factor(self, done: int, left: int) -> float:
        """The learning rate of a round, as a part of the largest one.

        Args:
            done: rounds before this one since the start of the run.
            left: rounds of the task from this one on.

        >>> shape = Shape(warmup=2, cooldown=2, constant=0.5, anneal=2, least=0.05)
        >>> [round(shape.factor(n, 99), 3) for n in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.5]
        >>> [round(shape.factor(9, left), 3) for left in (3, 2, 1)]
        [0.5, 0.158, 0.05]
        """
        if left <= self.anneal:
            share = (self.anneal - left + 1) / self.anneal
            return float(self.constant * (self.least / self.constant) ** share)
        if done < self.warmup:
            return (done + 1) / self.warmup
        after = done - self.warmup
        if after < self.cooldown:
            return self.constant + 0.5 * (1.0 - self.constant) * (1.0 + math.cos(math.pi * after / self.cooldown))
        return self.constant


class InfiniteLR(Strategy):
    """Warm-up and cooldown once, then one constant rate for all tasks; each task ends with an annealed branch."""

    name = "infinite_lr"
    family = "optimiser"
    stackable = True
    unlabelled = "sees"
    card = Card(
        title="Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual Pre-training",
        authors="Singh, Janson, Mehrbod, Ibrahim, Rish, Belilovsky, Thérien",
        venue="CoLLAs",
        year=2025,
        bibtex="""@inproceedings{singh2025beyond,
  title = {Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual Pre-training},
  author = {Singh, Vaibhav and Janson, Paul and Mehrbod, Paria and Ibrahim, Adam and Rish, Irina and
            Belilovsky, Eugene and Th\\'erien, Benjamin},
  booktitle = {CoLLAs},
  year = {2025}
}""",
        certainty="The four phases are those of a public implementation that quotes the paper's equation; "
        "its annealing divides by another length, which is read as a slip. Counting in rounds, and a first "
        "round at 1/warmup in place of 0, are ours, as are the default lengths.",
        leaves_client=(),
        server_state="the model from before the annealing, during it",
        cost="8 bytes down a round and client.",
        notes="optimiser.lr is the largest rate; the settings' own schedule should be constant, as both "
        "multiply. With anneal=0 nothing is annealed. With anneal=n the last n rounds of each task train a "
        "branch: it is evaluated, and the next task goes on from the model before it, so that these rounds "
        "are lost to what follows.",
    )

    @dataclass(frozen=True)
    class Options:
        warmup: int = option(2, "rounds from 0 to the largest rate, once", unit="rounds")
        cooldown: int = option(4, "rounds of a cosine down to the constant rate, once", unit="rounds")
        constant: float = option(0.5, "the constant rate, as a part of the largest one")
        anneal: int = option(1, "last rounds of each task, exponentially down to the least rate", unit="rounds")
        least: float = option(0.01, "the least rate, as a part of the largest one")

        def __post_init__(self) -> None:
            if min(self.warmup, self.cooldown, self.anneal) < 0:
                raise ValueError("warmup, cooldown and anneal must be at least 0")
            if not 0 < self.least <= self.constant <= 1:
                raise ValueError("0 < least <= constant <= 1 must hold")

    def shape(self) -> Shape:
        """The schedule of the options."""
        o = self.options
        return Shape(o.warmup, o.cooldown, o.constant, o.anneal, o.least)

    def begins_annealing(self, server: Server) -> bool:
        """Whether this is the first round of the annealed branch; in a task that is all annealing, its first round."""
        return bool(self.options.anneal > 0 and server.round == max(server.rounds - self.options.anneal, 0))

    def broadcast(self, server: Server) -> Broadcast:
        factor = self.shape().factor(server.rounds_done, server.rounds - server.round)
        return Broadcast({"factor": torch.tensor(factor, dtype=torch.float64)})

    def rate(self, step: Step) -> Tensor:
        return step.down["factor"].to(step.x.dtype)

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        if not self.begins_annealing(server):
            return server.arrays, server.state
        return server.arrays, {f"{KEPT}/{n}": a for n, a in server.before.items()}

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        before = {n: server.state.get(f"{KEPT}/{n}", a) for n, a in server.arrays.items()}
        # A branch that is the whole task leaves nothing to go on from but itself.
        if not server.state or self.options.anneal >= server.rounds:
            return Finished(server.arrays), {}
        return Finished(before, evaluate=server.evaluated), {}
