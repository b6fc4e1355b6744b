"""Local training of one client: the loop that every strategy's client half runs in.

Parameters are leaves of a functional model; nothing that the server sent is written to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import random as counter
from ..errors import Interrupted, RunFailed
from ..stack import Stack, narrowed, seen_by
from ..strategy import Arrays, Phase, Step, Strategy
from .blame import blame as blame
from .blame import out_of_memory as out_of_memory
from .client import Client as Client
from .client import Kind as Kind
from .client import NamedModels as NamedModels
from .client import Shape as Shape
from .client import Trained as Trained
from .optim import clip_by_norm
from .order import plan
from .phases import STEP_HOOKS, begun, epoch_length, in_phases, put_into
from .rates import schedule
from .sources import extra_sources, gather, hidden_sources, prepared


def total_loss(stack: Stack, step: Step, client: Client) -> dict[str, Tensor]:
    """The task loss and all terms of a step, by name; their sum is what is minimised."""
    owner, labelled = stack.owners["task_loss"], step.labelled()
    terms: dict[str, Tensor] = {}
    if not len(labelled.y):
        pass  # nothing to supervise
    elif owner is None:
        first = stack.strategies[0]
        with blame(first, "task_loss"):
            terms = {"task": Strategy.task_loss(first, narrowed(labelled, first, client))}
    else:
        with blame(owner, "task_loss"):
            terms = {"task": owner.task_loss(narrowed(labelled, owner, client))}
    for strategy in stack:
        seen = seen_by(step, strategy, client)
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


def train_client(client: Client, limit: int | None = None, size: int | None = None, only: int | None = None) -> Trained:
    """A round of local training of one client.

    Args:
        limit: most steps of a phase to take, to try a strategy out.
        size: take only steps on batches of so many of the client's images, to do one again; None: all.
        only: the one phase to go through, by its number; None: all.

    Raises:
        RunFailed: a loss is not finite, or a strategy failed.
        Interrupted: the user asked to stop.
    """
    return in_phases([client], lambda now: [train_phase(one, limit, size) for one in now], only)[0]


def train_alone(client: Client, phase: Phase, limit: int | None = None, size: int | None = None) -> Trained:
    """One phase of local training outside of a round, from what the client received unless the phase says; ``limit``
    and ``size`` as in :func:`train_client`.
    """
    return train_phase(put_into(begun(client), phase, 0), limit, size)


def train_phase(client: Client, limit: int | None = None, size: int | None = None) -> Trained:
    """One phase of local training of one client, which starts from ``client.begins``; see :func:`train_client`."""
    node, header, config = client.node, client.header, client.node.config
    stack, store = node.stack, node.store
    planned, dropped = plan(len(client.primary), config, client.key, client.phase)
    batches = [b for b in planned[: client.most_steps(None)] if size in (None, len(b))][:limit]
    begins, names = client.begins, client.trains
    params = {n: begins[n].detach().requires_grad_() for n in names}
    buffers = {n: begins[n].clone() for n in node.buffers}
    fixed = {n: a for n, a in begins.items() if n not in params and n not in buffers}
    models = replace(client.models, batch_norm=client.phase.batch_norm)
    optimiser = node.optimiser
    moments = optimiser.init(params)
    sources = extra_sources(stack, client)
    hidden = hidden_sources(client, [s for s, _ in sources])
    client_seed = torch.tensor(counter.fold(*client.key), dtype=torch.int64, device=store.device)
    edits, rates, afters, carries = (stack.having(hook) for hook in STEP_HOOKS)
    sums: dict[str, Tensor] = {}
    # In one transfer each, so that no step waits for the device.
    positions = torch.arange(len(batches), dtype=torch.int64).to(store.device)
    length = torch.tensor(epoch_length(client, planned), dtype=torch.int64).to(store.device)
    moved = torch.from_numpy(np.concatenate(batches) if batches else np.zeros(0, np.int64)).to(store.device)
    for index, picked in enumerate(torch.split(moved, [len(b) for b in batches])):
        if node.stop():
            raise Interrupted("interrupted during local training")
        position = positions[index]
        batch = prepared(stack, gather(client, picked, [(s, next(places)) for s, places in sources]), hidden)
        seed = counter.step_seed(client_seed, position)
        x = node.images(batch.pixels, seed)
        step = Step(
            x, batch.labels, batch, {**params, **fixed}, buffers, client.received, {}, {}, position,
            client.known, client.new, client.counts, seed, client.task, header.round, models,
            heads=client.heads, phase=client.phase.name, epoch_length=length,
        )  # fmt: skip
        with node.autocast():
            terms = total_loss(stack, step, client)
        loss = torch.stack([t.float() if t.dtype == torch.bfloat16 else t for t in terms.values()]).sum()
        grads = gradients(loss, params)
        if config.optimiser.clip is not None:
            grads = clip_by_norm(grads, config.optimiser.clip)
        plain = grads
        for strategy, seen in seen_by_each(edits, step, client):
            with blame(strategy, "edit_gradients"):
                grads = checked(strategy, "edit_gradients", grads, strategy.edit_gradients(seen, grads))
        lr: float | Tensor = client.phase.lr_scale * schedule(
            config.optimiser, step=index, round=header.round, task=header.task,
            total=node.schedule_total(len(batches), header),
        )  # fmt: skip
        with torch.no_grad():
            for strategy, seen in seen_by_each(rates, step, client):
                with blame(strategy, "rate"):
                    lr = lr * strategy.rate(seen)
            # A strategy's after_step may return arrays of others, and carry may keep them: only without either do the
            # arrays belong to the step, and before the first one all are the server's.
            owned = index > 0 and not afters and not carries
            params, moments = optimiser.update({n: p.detach() for n, p in params.items()}, grads, moments, lr, owned)
            for strategy, seen in seen_by_each(afters, step, client):
                with blame(strategy, "after_step"):
                    params = checked(strategy, "after_step", params, strategy.after_step(seen, params))
            moved_on: dict[str, Arrays] = {}
            for strategy, seen in seen_by_each(carries, step, client):
                with blame(strategy, "carry"):
                    after = strategy.carry(seen, plain, params)
                    moved_on[strategy.name] = checked(strategy, "carry", seen.carried, after)
        if moved_on:
            client = replace(client, carried={**client.carried, **moved_on})
        params = {n: p.requires_grad_() for n, p in params.items()}
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    losses = {n: float(s) / len(batches) for n, s in sums.items()}
    if not all(math.isfinite(v) for v in losses.values()):
        raise RunFailed(not_finite(client, losses))
    arrays = {n: p.detach() for n, p in params.items()} | fixed | buffers
    extra = [min(s.batch_size, len(s.ids)) for s, _ in sources]
    shapes = shapes_of(((len(b), *extra) for b in batches), hidden)
    arrays = {n: arrays[n] for n in client.received}
    return Trained(arrays, len(batches), client.samples, dropped, losses, shapes, client.carried)


def seen_by_each(strategies: Iterable[Strategy], step: Step, client: Client) -> list[tuple[Strategy, Step]]:
    """Each strategy with the step as it sees it; those that see nothing of it are left out."""
    both = ((strategy, seen_by(step, strategy, client)) for strategy in strategies)
    return [(strategy, seen) for strategy, seen in both if seen is not None]


def checked(strategy: Strategy, hook: str, before: Arrays, after: Arrays) -> Arrays:
    """What a hook returned, of the names and shapes that it was given.

    Raises:
        RunFailed: it is not.
    """
    if {n: a.shape for n, a in before.items()} != {n: a.shape for n, a in after.items()}:
        what = "begin_round" if hook == "carry" else "what it is given"
        raise RunFailed(f"strategy {strategy.name!r}: {hook} must return the names and shapes of {what}")
    return after


def gradients(loss: Tensor, params: Arrays) -> Arrays:
    """The gradient of a scalar by parameter; zero where the loss does not depend on one."""
    if not loss.requires_grad:
        return {n: torch.zeros_like(p) for n, p in params.items()}
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}
