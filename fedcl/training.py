"""Local training of one client: the loop that every strategy's client half runs in.

Parameters are leaves of a functional model; nothing that the server sent is written to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from . import random as counter
from .errors import FedclError, Interrupted, RunFailed
from .optim import clip_by_norm
from .order import cycle, plan
from .rates import schedule
from .stack import Stack, narrowed
from .strategy import Arrays, Batch, ClientContext, Source, Step, Strategy

if TYPE_CHECKING:
    from .federation.call import Header
    from .federation.node import Node
    from .models.model import Output


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a device or on the host."""
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def blame(strategy: Strategy, hook: str) -> Iterator[None]:
    """Turns any exception of a strategy's hook into one line that names the strategy and the place."""
    try:
        yield
    except (FedclError, KeyboardInterrupt):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" ({trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno})" if trace else ""
        single = "more than 1 value per channel" in str(error)  # BatchNorm's own words
        hint = (
            "; a batch of one image cannot train BatchNorm: set federation.batch_min=2 or model.norm=group"
            if single
            else ""
        )
        raise RunFailed(
            f"strategy {strategy.name!r} failed in {hook}: {type(error).__name__}: {error}{where}{hint}"
        ) from error


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
        samples: training images of the client.
        dropped: images left out of an epoch by ``drop_last`` and ``batch_min``.
        losses: mean of each loss term over the steps.
    """

    arrays: Arrays
    steps: int
    samples: int
    dropped: int
    losses: dict[str, float]


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

    @property
    def key(self) -> tuple[object, ...]:
        """Names the random streams of this client in this round."""
        return (self.node.config.seed, "client", self.id, self.header.task, self.header.round)

    def context(self, strategy: Strategy) -> ClientContext:
        """What the client hooks of one strategy see."""
        node = self.node
        return ClientContext(
            self.id, self.header.task, self.header.round, self.received, self.down.get(strategy.name, {}),
            self.state.get(strategy.name, {}), self.ids, self.labels, self.known, self.new, self.counts,
            node.store, node.model, self.models, node.config.federation.batch_size,
            node.config.evaluate.batch_size, self.key,
        )  # fmt: skip


def total_loss(stack: Stack, step: Step, client: Client) -> dict[str, Tensor]:
    """The task loss and all terms of a step, by name; their sum is what is minimised."""
    owner = stack.owners["task_loss"]
    if owner is None:
        first = stack.strategies[0]
        with blame(first, "task_loss"):
            terms = {"task": Strategy.task_loss(first, narrowed(step, first, {}, {}))}
    else:
        with blame(owner, "task_loss"):
            terms = {"task": owner.task_loss(narrowed(step, owner, client.down, client.state))}
    for strategy in stack:
        with blame(strategy, "loss"):
            added = strategy.loss(narrowed(step, strategy, client.down, client.state))
            if not isinstance(added, Mapping) or not all(isinstance(t, Tensor) for t in added.values()):
                raise RunFailed(f"strategy {strategy.name!r}: loss must return a mapping of names to scalar tensors")
            for name, term in added.items():
                if term.ndim:
                    raise RunFailed(
                        f"strategy {strategy.name!r}: loss term {name!r} has shape {tuple(term.shape)}, not a scalar"
                    )
                terms[f"{strategy.name}.{name}"] = term
    return terms


def not_finite(client: Client, losses: Mapping[str, float]) -> str:
    """What to say of a client whose loss is not finite."""
    header = client.header
    bad = [f"{n} = {v}" for n, v in losses.items() if not math.isfinite(v)]
    return (
        f"task {header.task + 1}, round {header.round + 1}, client {client.id}: the loss is not finite "
        f"({', '.join(bad)}); a lower optimiser.lr or optimiser.clip=1 may help"
    )


def train_client(client: Client, limit: int | None = None) -> Trained:
    """A round of local training of one client.

    Args:
        limit: most steps to take, to try a strategy out.

    Raises:
        RunFailed: a loss is not finite, or a strategy failed.
        Interrupted: the user asked to stop.
    """
    node, header, config = client.node, client.header, client.node.config
    stack, store = node.stack, node.store
    batches, dropped = plan(len(client.ids), config, client.key)
    batches = batches[:limit]
    params = {n: client.received[n].detach().requires_grad_() for n in node.trainable}
    fixed = {n: a for n, a in client.received.items() if n not in params and n not in node.buffers}
    buffers = {n: client.received[n].clone() for n in node.buffers}
    optimiser = node.optimiser
    moments = optimiser.init(params)
    sources = extra_sources(stack, client)
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
        batch = gather(client, picked, [next(s) for _, s in sources])
        for strategy in stack:
            with blame(strategy, "prepare"):
                batch = strategy.prepare(batch)
        seed = counter.step_seed(client_seed, position)
        x = node.images(batch.pixels, seed)
        step = Step(
            x, batch.labels, batch, {**params, **fixed}, buffers, client.received, {}, {}, position,
            client.known, client.new, client.counts, seed, header.task, header.round, client.models,
        )  # fmt: skip
        with node.autocast():
            terms = total_loss(stack, step, client)
        loss = torch.stack([t.float() if t.dtype == torch.bfloat16 else t for t in terms.values()]).sum()
        grads = gradients(loss, params)
        if config.optimiser.clip is not None:
            grads = clip_by_norm(grads, config.optimiser.clip)
        for strategy in stack:
            if type(strategy).edit_gradients is not Strategy.edit_gradients:
                with blame(strategy, "edit_gradients"):
                    grads = strategy.edit_gradients(narrowed(step, strategy, client.down, client.state), grads)
        lr = schedule(
            config.optimiser, step=index, round=header.round, task=header.task,
            total=node.schedule_total(len(batches), header),
        )  # fmt: skip
        with torch.no_grad():
            owned = index > 0 and not after
            params, moments = optimiser.update({n: p.detach() for n, p in params.items()}, grads, moments, lr, owned)
            for strategy in stack:
                if type(strategy).after_step is not Strategy.after_step:
                    with blame(strategy, "after_step"):
                        params = strategy.after_step(narrowed(step, strategy, client.down, client.state), params)
        params = {n: p.requires_grad_() for n, p in params.items()}
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    losses = {n: float(s) / len(batches) for n, s in sums.items()}
    if not all(math.isfinite(v) for v in losses.values()):
        raise RunFailed(not_finite(client, losses))
    arrays = {n: p.detach() for n, p in params.items()} | fixed | buffers
    return Trained({n: arrays[n] for n in client.received}, len(batches), len(client.ids), dropped, losses)


def gradients(loss: Tensor, params: Arrays) -> Arrays:
    """The gradient of a scalar by parameter; zero where the loss does not depend on one."""
    if not loss.requires_grad:
        return {n: torch.zeros_like(p) for n, p in params.items()}
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}


def extra_sources(stack: Stack, client: Client) -> list[tuple[Source, Iterator[Tensor]]]:
    """The non-empty extra sources of all strategies with their endless batches."""
    found: list[tuple[Source, Iterator[Tensor]]] = []
    for strategy in stack:
        if type(strategy).sources is Strategy.sources:
            continue
        with blame(strategy, "sources"):
            for source in strategy.sources(client.context(strategy)):
                if len(source.ids):
                    found.append((source, cycle(source, *client.key, "source", len(found))))
    return found


def gather(client: Client, picked: Tensor, extra: list[Tensor]) -> Batch:
    """The stream's batch followed by one of each extra source."""
    store = client.node.store
    parts = [client.ids[picked], *extra]
    ids = torch.cat(parts)
    source = torch.cat([torch.full_like(p, i) for i, p in enumerate(parts)])
    return Batch(store.gather(ids), store.label_tensor[ids], ids, source)
