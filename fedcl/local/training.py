"""Local training of one client: the loop that every strategy's client half runs in.

Parameters are leaves of a functional model; nothing that the server sent is written to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from .. import random as counter
from ..errors import Interrupted, RunFailed
from ..stack import Stack, narrowed, seen_by
from ..strategy import Arrays, ClientContext, Step, Strategy
from .blame import blame as blame
from .blame import out_of_memory as out_of_memory
from .optim import clip_by_norm
from .order import plan
from .rates import schedule
from .sources import extra_sources, gather, hidden_sources, prepared

Shape = tuple[int, ...]
"""Images of each source in one training step, the client's own stream first; negative where they have no labels."""

if TYPE_CHECKING:
    from ..federation.call import Header
    from ..federation.node import Node
    from ..models.model import Output


@dataclass(frozen=True)
class NamedModels:
    """The models one client can run, by name; see :class:`fedcl.strategy.Models`."""

    node: Node
    named: Mapping[str, Arrays]

    def __call__(
        self,
        x: Tensor,
        which: str | Arrays,
        mode: Literal["train", "eval"],
        taps: tuple[str, ...] = (),
        seed: Tensor | None = None,
    ) -> Output:
        if isinstance(which, str):
            if which not in self.named:
                raise RunFailed(f"no model is named {which!r} here; there are {', '.join(sorted(self.named))}")
            which = self.named[which]
        return self.node.forward(which, x, mode, taps, seed)


@dataclass(frozen=True)
class Trained:
    """The outcome of one client's round.

    Attributes:
        arrays: parameters and buffers after training.
        steps: optimiser steps taken; 0 when no batch was large enough.
        samples: training images of the client that it learned from, labelled or not.
        dropped: images left out of an epoch by ``drop_last`` and ``batch_min``.
        losses: mean of each loss term over the steps.
        shapes: how many steps had batches of each shape.
    """

    arrays: Arrays
    steps: int
    samples: int
    dropped: int
    losses: dict[str, float]
    shapes: dict[Shape, int]


@dataclass(frozen=True)
class Client:
    """One client in one call: everything its hooks may see."""

    id: int
    header: Header
    ids: Tensor
    labels: Tensor
    received: Arrays
    down: Mapping[str, Arrays]
    state: Mapping[str, Arrays]
    models: NamedModels
    known: Tensor
    new: Tensor
    counts: Tensor
    node: Node
    heads: Tensor | None = None
    unlabelled: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def primary(self) -> Tensor:
        """The images that set its steps: the labelled ones, or all where it has none and can learn without labels."""
        return self.ids if len(self.ids) or not self.node.stack.learns else self.unlabelled

    @property
    def samples(self) -> int:
        """How many images it learns from."""
        return len(self.ids) + (len(self.unlabelled) if self.node.stack.learns else 0)

    @property
    def task(self) -> int:
        """Its own task index: how many tasks it has met before; in step that of the server."""
        return self.header.standing(self.id)[0]

    def most_steps(self, limit: int | None) -> int | None:
        """Most steps of a round, of which ``limit`` are wanted; None: all that are planned."""
        known = [most for most in (self.header.limit.get(self.id), limit) if most is not None]
        return min(known, default=None)

    @property
    def key(self) -> tuple[object, ...]:
        """Names the random streams of this client in this round."""
        return (self.node.config.seed, "client", self.id, self.header.task, self.header.round)

    def context(self, strategy: Strategy) -> ClientContext:
        """What the client hooks of one strategy see."""
        node = self.node
        return ClientContext(
            self.id, self.task, self.header.round, self.received, self.down.get(strategy.name, {}),
            self.state.get(strategy.name, {}), self.ids, self.labels, self.known, self.new, self.counts,
            node.store, node.model, self.models, node.config.federation.batch_size,
            node.config.evaluate.batch_size, self.key, heads=self.heads,
            online=node.config.federation.passes == "once", unlabelled=self.unlabelled,
        )  # fmt: skip


def total_loss(stack: Stack, step: Step, client: Client) -> dict[str, Tensor]:
    """The task loss and all terms of a step, by name; their sum is what is minimised."""
    owner, labelled = stack.owners["task_loss"], step.labelled()
    terms: dict[str, Tensor] = {}
    if not len(labelled.y):
        pass  # nothing to supervise
    elif owner is None:
        first = stack.strategies[0]
        with blame(first, "task_loss"):
            terms = {"task": Strategy.task_loss(first, narrowed(labelled, first, {}, {}))}
    else:
        with blame(owner, "task_loss"):
            terms = {"task": owner.task_loss(narrowed(labelled, owner, client.down, client.state))}
    for strategy in stack:
        seen = seen_by(step, strategy, client.down, client.state)
        if seen is None:
            continue
        with blame(strategy, "loss"):
            added = strategy.loss(seen)
            if not isinstance(added, Mapping) or not all(isinstance(t, Tensor) for t in added.values()):
                raise RunFailed(f"strategy {strategy.name!r}: loss must return a mapping of names to scalar tensors")
            for name, term in added.items():
                if term.ndim:
                    raise RunFailed(
                        f"strategy {strategy.name!r}: loss term {name!r} has shape {tuple(term.shape)}, not a scalar"
                    )
                terms[f"{strategy.name}.{name}"] = term
    return terms or {"task": step.output.logits.sum() * 0.0}


def not_finite(client: Client, losses: Mapping[str, float]) -> str:
    """What to say of a client whose loss is not finite."""
    header = client.header
    bad = [f"{n} = {v}" for n, v in losses.items() if not math.isfinite(v)]
    return (
        f"task {header.task + 1}, round {header.round + 1}, client {client.id}: the loss is not finite "
        f"({', '.join(bad)}); a lower optimiser.lr or optimiser.clip=1 may help"
    )


def shapes_of(sizes: Iterable[Shape], hidden: tuple[int, ...]) -> dict[Shape, int]:
    """How many steps there are of each shape.

    >>> shapes_of([(8, 2), (8, 2), (3, 2)], (1,))
    {(8, -2): 2, (3, -2): 1}
    """
    found = Counter(sizes)
    if not hidden:
        return found
    return {tuple(-n if i in hidden else n for i, n in enumerate(size)): steps for size, steps in found.items()}


def train_client(client: Client, limit: int | None = None, size: int | None = None) -> Trained:
    """A round of local training of one client.

    Args:
        limit: most steps to take, to try a strategy out.
        size: take only steps on batches of so many of the client's images, to do one again; None: all.

    Raises:
        RunFailed: a loss is not finite, or a strategy failed.
        Interrupted: the user asked to stop.
    """
    node, header, config = client.node, client.header, client.node.config
    stack, store = node.stack, node.store
    batches, dropped = plan(len(client.primary), config, client.key)
    batches = [b for b in batches[: client.most_steps(None)] if size in (None, len(b))][:limit]
    params = {n: client.received[n].detach().requires_grad_() for n in node.trainable}
    fixed = {n: a for n, a in client.received.items() if n not in params and n not in node.buffers}
    buffers = {n: client.received[n].clone() for n in node.buffers}
    optimiser = node.optimiser
    moments = optimiser.init(params)
    sources = extra_sources(stack, client)
    hidden = hidden_sources(client, [s for s, _ in sources])
    client_seed = torch.tensor(counter.fold(*client.key), dtype=torch.int64, device=store.device)
    # A strategy's after_step may return arrays of others; before the first step all are the server's.
    after = any(type(s).after_step is not Strategy.after_step for s in stack)
    sums: dict[str, Tensor] = {}
    # In one transfer each, so that no step waits for the device.
    positions = torch.arange(len(batches), dtype=torch.int64).to(store.device)
    moved = torch.from_numpy(np.concatenate(batches) if batches else np.zeros(0, np.int64)).to(store.device)
    for index, picked in enumerate(torch.split(moved, [len(b) for b in batches])):
        if node.stop():
            raise Interrupted("interrupted during local training")
        position = positions[index]
        batch = prepared(stack, gather(client, picked, [next(s) for _, s in sources]), hidden)
        seed = counter.step_seed(client_seed, position)
        x = node.images(batch.pixels, seed)
        step = Step(
            x, batch.labels, batch, {**params, **fixed}, buffers, client.received, {}, {}, position,
            client.known, client.new, client.counts, seed, client.task, header.round, client.models,
            heads=client.heads,
        )  # fmt: skip
        with node.autocast():
            terms = total_loss(stack, step, client)
        loss = torch.stack([t.float() if t.dtype == torch.bfloat16 else t for t in terms.values()]).sum()
        grads = gradients(loss, params)
        if config.optimiser.clip is not None:
            grads = clip_by_norm(grads, config.optimiser.clip)
        for strategy in stack:
            if type(strategy).edit_gradients is not Strategy.edit_gradients:
                seen = seen_by(step, strategy, client.down, client.state)
                with blame(strategy, "edit_gradients"):
                    grads = grads if seen is None else strategy.edit_gradients(seen, grads)
        lr = schedule(
            config.optimiser, step=index, round=header.round, task=header.task,
            total=node.schedule_total(len(batches), header),
        )  # fmt: skip
        with torch.no_grad():
            owned = index > 0 and not after
            params, moments = optimiser.update({n: p.detach() for n, p in params.items()}, grads, moments, lr, owned)
            for strategy in stack:
                if type(strategy).after_step is not Strategy.after_step:
                    seen = seen_by(step, strategy, client.down, client.state)
                    with blame(strategy, "after_step"):
                        params = params if seen is None else strategy.after_step(seen, params)
        params = {n: p.requires_grad_() for n, p in params.items()}
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    losses = {n: float(s) / len(batches) for n, s in sums.items()}
    if not all(math.isfinite(v) for v in losses.values()):
        raise RunFailed(not_finite(client, losses))
    arrays = {n: p.detach() for n, p in params.items()} | fixed | buffers
    extra = [min(s.batch_size, len(s.ids)) for s, _ in sources]
    shapes = shapes_of(((len(b), *extra) for b in batches), hidden)
    return Trained({n: arrays[n] for n in client.received}, len(batches), client.samples, dropped, losses, shapes)


def gradients(loss: Tensor, params: Arrays) -> Arrays:
    """The gradient of a scalar by parameter; zero where the loss does not depend on one."""
    if not loss.requires_grad:
        return {n: torch.zeros_like(p) for n, p in params.items()}
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}
