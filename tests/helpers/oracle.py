"""Federated continual learning of a one-layer perceptron, written out as plain loops in float64.

Nothing of fedcl's training, losses, optimisers, reductions or strategies is used. From fedcl come the images,
who holds which, and the documented random streams (batch orders, cohorts, initial rows of the head).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.config import Config
from fedcl.models.model import Output
from fedcl.records.checkpoint import load_newest
from fedcl.run import RunResult
from fedcl.strategy import Batch, Step

Arrays = dict[str, Tensor]


@dataclass
class World:
    """Data and settings of one run.

    Attributes:
        x, y: (N, d) float64 normalised images and (N,) class positions of the training store.
        held: ``held[task][client]`` lists of rows.
        known, new: class positions by task.
        start: the initial model without classes.
        order: original class id of each position.
    """

    config: Config
    x: Tensor
    y: list[int]
    held: list[list[list[int]]]
    known: list[list[int]]
    new: list[list[int]]
    start: Arrays
    order: list[int]

    @classmethod
    def of(cls, config: Config) -> World:
        """The world of a configuration."""
        experiment = build(config)
        store, stream = experiment.node.store, experiment.stream
        pixels = store.gather(torch.arange(len(store))).to(torch.float64) / 255.0
        x = (pixels - pixels.mean(dim=(0, 2, 3), keepdim=True)) / pixels.std(dim=(0, 2, 3), keepdim=True, correction=0)
        tasks = range(stream.num_tasks)
        return cls(
            config,
            x.flatten(1),
            store.label_tensor.tolist(),
            [[rows.tolist() for rows in task] for task in experiment.split.train],
            [list(stream.known(t)) for t in tasks],
            [list(stream.stages[t].classes) for t in tasks],
            {n: a.to(torch.float64) for n, a in experiment.initial.items()},
            list(stream.class_order),
        )


@dataclass
class Local:
    """What a local loss may look at beside the model and the batch."""

    world: World
    task: int
    received: Arrays
    previous: Arrays | None
    memory: dict[str, Any]
    client: int = -1

    @property
    def known(self) -> list[int]:
        return self.world.known[self.task]

    @property
    def new(self) -> list[int]:
        return self.world.new[self.task]

    @property
    def old(self) -> list[int]:
        return [c for c in self.known if c not in self.new]


Loss = Callable[[Arrays, Tensor, list[int], Local], Tensor]
AfterStep = Callable[[Arrays], Arrays]
EndTask = Callable[[Arrays, Local], Arrays]
Edit = Callable[[Arrays, Arrays, Local], Arrays]


@dataclass
class Outcome:
    """A client's round: what it trained, what it counts for, and its number of steps."""

    client: int
    trained: Arrays
    weight: float
    steps: int


def mean(w: Arrays, outcomes: list[Outcome], local: Local) -> Arrays:
    """The weighted mean of the clients' models; the old one without any."""
    total = sum(o.weight for o in outcomes)
    return {n: sum(o.weight * o.trained[n] for o in outcomes) / total for n in w} if outcomes else w


@dataclass
class Method:
    """A method: its local loss, what it does after a step and at a task's end, its edit of the gradients before the
    optimiser, and how it joins the models of a round.
    """

    loss: Loss
    after_step: AfterStep = field(default=lambda w: w)
    end_task: EndTask = field(default=lambda w, local: w)
    edit: Edit = field(default=lambda grads, w, local: grads)
    join: Callable[[Arrays, list[Outcome], Local], Arrays] = mean


def logits(w: Arrays, x: Tensor) -> Tensor:
    """(B, C) scores of images (B, d)."""
    hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    hidden = hidden * (hidden > 0)
    out = hidden @ w["head.weight"].T
    return out + w["head.bias"] if "head.bias" in w else out


def cross_entropy(scores: Tensor, labels: list[int], classes: list[int]) -> Tensor:
    """Mean of -log softmax over ``classes`` only, sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(scores, labels, strict=True):
        below = torch.stack([torch.exp(row[c] - row[label]) for c in classes]).sum()
        total = total + torch.log(below)
    return total / len(labels)


def soft_cross_entropy(student: Tensor, teacher: Tensor, classes: list[int], temperature: float) -> Tensor:
    """-mean_i sum_c p_ic log q_ic with tempered softmaxes over ``classes``."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher.detach(), strict=True):
        weights = [math.exp(float(t[c]) / temperature) for c in classes]
        norm = torch.stack([torch.exp(s[c] / temperature) for c in classes]).sum()
        for weight, c in zip(weights, classes, strict=True):
            total = total - weight / sum(weights) * (s[c] / temperature - torch.log(norm))
    return total / len(student)


def entropy(scores: Tensor, classes: list[int], temperature: float) -> float:
    """Mean entropy of tempered softmaxes over ``classes``."""
    total = 0.0
    for row in scores.detach():
        weights = [math.exp(float(row[c]) / temperature) for c in classes]
        total -= sum(p / sum(weights) * math.log(p / sum(weights)) for p in weights)
    return total / len(scores)


def gradient(value: Tensor, w: Arrays) -> Arrays:
    """d value / d w by name."""
    found = torch.autograd.grad(value, list(w.values()), allow_unused=True)
    return {n: torch.zeros_like(a) if g is None else g for (n, a), g in zip(w.items(), found, strict=True)}


def leaves(w: Arrays) -> Arrays:
    """Copies that gradients flow to."""
    return {n: a.detach().clone().requires_grad_() for n, a in w.items()}


def grown(w: Arrays, world: World, classes: int) -> Arrays:
    """The model with rows of the head up to ``classes``: uniform in ±1/sqrt(d), each class's own stream."""
    w = dict(w)
    seed, width = world.config.seed, w["head.weight"].shape[1]
    for position in range(len(w["head.weight"]), classes):
        for name, count in (("weight", width), ("bias", 1)):
            if f"head.{name}" not in w:
                continue
            drawn = counter.uniform(count, seed, "init", "head", name, world.order[position])
            row = torch.from_numpy(((2.0 * drawn - 1.0) / math.sqrt(width)).astype(np.float32)).to(torch.float64)
            shaped = row[None] if name == "weight" else row
            w[f"head.{name}"] = torch.cat([w[f"head.{name}"], shaped])
    return w


def train(client: int, round_: int, local: Local, method: Method) -> Arrays | None:
    """One round of one client with SGD, momentum and weight decay; None without images."""
    world, settings = local.world, local.world.config
    local = replace(local, client=client)
    rows = local.world.held[local.task][client]
    if not rows:
        return None
    w = {n: a.clone() for n, a in local.received.items()}
    velocity = {n: torch.zeros_like(a) for n, a in w.items()}
    size = settings.federation.batch_size
    for epoch in range(settings.federation.epochs or 1):
        order = counter.permutation(
            len(rows), settings.seed, "client", client, local.task, round_, "order", epoch
        ).tolist()
        for at in range(0, len(rows), size):
            batch = [rows[i] for i in order[at : at + size]]
            w = leaves(w)
            grads = gradient(method.loss(w, world.x[batch], [world.y[i] for i in batch], local), w)
            with torch.no_grad():
                grads = method.edit(grads, w, local)
                for n in w:
                    g = grads[n] + settings.optimiser.weight_decay * w[n]
                    velocity[n] = settings.optimiser.momentum * velocity[n] + g
                    w[n] = w[n] - settings.optimiser.lr * velocity[n]
                w = method.after_step(w)
    return {n: a.detach() for n, a in w.items()}


def federated(config: Config, method: Method, world: World | None = None) -> Arrays:
    """The final global model of a whole run."""
    world = world or World.of(config)
    w = world.start
    previous: Arrays | None = None
    memory: dict[str, Any] = {}
    for task in range(len(world.known)):
        everything = config.model.head_allocate == "all"
        w = grown(w, world, len(world.order) if everything else len(world.known[task]))
        for round_ in range(config.federation.rounds):
            share = config.federation.participation
            cohort = counter.sample(
                config.federation.clients, max(1, round(share * config.federation.clients)),
                config.seed, "cohort", task, round_,
            )  # fmt: skip
            local = Local(world, task, w, previous, memory)
            outcomes = []
            for client in cohort:
                trained = train(client, round_, local, method)
                if trained is None:
                    continue
                images = len(world.held[task][client])
                weight = float(images) if config.federation.weighting == "samples" else 1.0
                steps = (config.federation.epochs or 1) * math.ceil(images / config.federation.batch_size)
                outcomes.append(Outcome(client, trained, weight, steps))
            w = method.join(w, outcomes, local)
        w = method.end_task(w, Local(world, task, w, previous, memory))
        previous = w
    return w


def final(result: RunResult) -> Arrays:
    """The global model of a run's last checkpoint, in the run's own precision."""
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    return {n.removeprefix("model/"): a for n, a in found.arrays.items() if n.startswith("model/")}


def distance(one: Arrays, other: Arrays) -> float:
    """Largest absolute difference of two models with the same arrays."""
    assert set(one) == set(other)
    assert all(one[n].shape == other[n].shape for n in one)
    return max(float((one[n] - other[n]).abs().max()) for n in one if one[n].numel())


def identical(one: Arrays, other: Arrays) -> bool:
    """Whether two models are the same bit for bit."""
    return set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


def step(
    w: Arrays,
    x: Tensor,
    y: list[int],
    *,
    known: list[int],
    new: list[int],
    received: Arrays | None = None,
    previous: Arrays | None = None,
    down: Arrays | None = None,
    task: int = 1,
) -> Step:
    """A step as a strategy sees it, built by hand: the models are :func:`logits` of plain arrays."""
    named = {"received": received or w, "stage:previous": previous or {}}

    def models(
        x: Tensor, which: str | Arrays, mode: str, taps: tuple[str, ...] = (), seed: Tensor | None = None
    ) -> Output:
        arrays = named[which] if isinstance(which, str) else which
        return Output(x, None, logits(arrays, x), {})

    def mask(classes: list[int]) -> Tensor:
        return torch.tensor([c in classes for c in range(len(w["head.weight"]))])

    zero, labels = torch.tensor(0), torch.tensor(y)
    batch = Batch(x, labels, torch.arange(len(y)), torch.zeros(len(y), dtype=torch.int64))
    counts = torch.bincount(labels, minlength=len(w["head.weight"]))
    return Step(
        x, labels, batch, w, {}, received or w, down or {}, {}, zero, mask(known), mask(new), counts, zero,
        task, 0, models,
    )  # fmt: skip


def model(width: int, inputs: int, classes: int, seed: int) -> Arrays:
    """Some one-layer perceptron."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    return {
        "encoder.1.weight": normal(width, inputs),
        "encoder.1.bias": normal(width),
        "head.weight": normal(classes, width),
        "head.bias": normal(classes),
    }
