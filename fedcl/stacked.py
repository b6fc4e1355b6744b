"""Local training of many clients as one stacked model: the steps of :mod:`fedcl.training` under ``torch.func.vmap``.

Nothing is padded. Clients are sorted by their number of steps; at each step the active ones are grouped by batch size,
and every group is one vectorised call. Draws inside a step are counter-based, so that a client sees the same numbers
alone and stacked; results agree within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from . import random as counter
from .errors import Interrupted, RunFailed
from .optim import clip_by_norm
from .rates import schedule
from .strategy import Arrays, Batch, Step, Strategy, narrowed
from .training import Client, NamedModels, Trained, blame, extra_sources, plan, total_loss

Stacked = dict[str, Tensor]
"""Arrays with a leading axis of clients."""


class SameShapes(dict[str, Tensor]):
    """A strategy's client state where the clients' arrays have one shape; others cannot be stacked."""

    def __missing__(self, name: str) -> Tensor:
        raise KeyError(f"client state {name!r} differs in shape between clients, so they cannot be trained stacked")


@dataclass(frozen=True)
class Lane:
    """One client's own inputs of a group; under ``vmap`` each attribute loses its client axis.

    Attributes:
        params, buffers: the model being trained.
        own: private and frozen arrays that differ between clients.
        state: by ``STRATEGY/name``.
        pixels, labels, ids, source: the raw batch.
        counts: (C,) training images a class.
        seed: int64 scalar, the client's key.
    """

    params: Arrays
    buffers: Arrays
    own: Arrays
    state: Arrays
    pixels: Tensor
    labels: Tensor
    ids: Tensor
    source: Tensor
    counts: Tensor
    seed: Tensor


@dataclass
class Plan:
    """What one client will do in this round."""

    client: Client
    batches: list[Tensor]
    dropped: int
    sources: list[Any]


def train_cohort(clients: Sequence[Client]) -> Iterator[Trained]:
    """A round of local training of several clients of one node, each with images; results in their order.

    Raises:
        RunFailed: a loss is not finite, or a strategy failed.
        Interrupted: the user asked to stop.
    """
    plans = []
    for client in clients:
        batches, dropped = plan(len(client.ids), client.node.config, client.key)
        plans.append(Plan(client, batches, dropped, extra_sources(client.node.stack, client)))
    order = sorted(range(len(plans)), key=lambda i: -len(plans[i].batches))
    trained = Cohort([plans[i] for i in order]).run()
    back = dict(zip(order, trained, strict=True))
    for place in range(len(plans)):
        yield back[place]


class Cohort:
    """A stack of clients, the ones with most steps first."""

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.first = plans[0].client
        self.node = self.first.node
        node = self.node
        clients = [p.client for p in plans]
        trainable = set(node.trainable)
        self.params = {n: stack([c.received[n] for c in clients]) for n in node.trainable}
        self.buffers = {n: stack([c.received[n] for c in clients]) for n in node.buffers}
        rest = [n for n in self.first.received if n not in trainable and n not in node.buffers]
        self.own = {n: stack([c.received[n] for c in clients]) for n in rest}
        self.private = {n: stack([c.received[n] for c in clients]) for n in node.private}
        self.state = self.stacked_state(clients)
        self.counts = torch.stack([c.counts for c in clients])
        keys = [counter.fold(*c.key) for c in clients]
        self.seeds = torch.tensor(keys, dtype=torch.int64, device=node.store.device)
        self.moments = self.spread(node.optimiser.init(self.params))
        self.sums: Stacked = {}

    @staticmethod
    def stacked_state(clients: Sequence[Client]) -> Stacked:
        """The clients' states as ``STRATEGY/name``, where all have an array of one shape."""
        found: Stacked = {}
        for strategy, arrays in clients[0].state.items():
            for name in arrays:
                column = [c.state.get(strategy, {}).get(name) for c in clients]
                present = [a for a in column if a is not None]
                if len(present) == len(column) and len({a.shape for a in present}) == 1:
                    found[f"{strategy}/{name}"] = torch.stack(present)
        return found

    def spread(self, moments: Arrays) -> Stacked:
        """Optimiser state with one step count a client."""
        size = len(self.plans)
        return {n: m.expand(size).clone() if n == "step" else m for n, m in moments.items()}

    def run(self) -> list[Trained]:
        """All steps of all clients."""
        longest = len(self.plans[0].batches) if self.plans else 0
        for index in range(longest):
            if self.node.stop():
                raise Interrupted("interrupted during local training")
            active = sum(len(p.batches) > index for p in self.plans)
            for rows, batches in self.groups(index, active):
                self.step(index, rows, batches)
        return [self.result(i) for i in range(len(self.plans))]

    def groups(self, index: int, active: int) -> list[tuple[list[int], list[Tensor]]]:
        """The active clients by the sizes of their batch: (places in the stack, ids of each batch)."""
        device = self.node.store.device
        found: dict[tuple[int, ...], tuple[list[int], list[Tensor]]] = {}
        for place in range(active):
            p = self.plans[place]
            parts = [p.client.ids[p.batches[index].to(device)], *(next(s) for _, s in p.sources)]
            rows, batches = found.setdefault(tuple(len(part) for part in parts), ([], []))
            rows.append(place)
            batches.append(torch.cat(parts))
        for sizes, (_, batches) in found.items():
            source = torch.cat([torch.full((n,), i, dtype=torch.int64, device=device) for i, n in enumerate(sizes)])
            batches.append(source)
        return list(found.values())

    def step(self, index: int, rows: list[int], batches: list[Tensor]) -> None:
        """One optimiser step of one group."""
        node, store = self.node, self.node.store
        source = batches.pop()
        ids = torch.stack(batches)
        whole = rows == list(range(len(self.plans)))
        pick = Picker(rows, whole, store.device)
        lanes = Lane(
            pick.of(self.params), pick.of(self.buffers), pick.of(self.own | self.private), pick.of(self.state),
            store.gather(ids), store.label_tensor[ids], ids, source.expand(len(rows), -1), pick(self.counts),
            pick(self.seeds),
        )  # fmt: skip
        position = torch.tensor(index, dtype=torch.int64, device=store.device)
        grads, (terms, buffers) = self.gradients(lanes, position)
        for name, value in terms.items():
            self.sums.setdefault(name, torch.zeros(len(self.plans), dtype=value.dtype, device=value.device))
            self.sums[name][rows] += value
        params, moments = node.optimiser.update(lanes.params, grads, pick.of(self.moments), self.rate(index, rows))
        if any(type(s).after_step is not Strategy.after_step for s in node.stack):
            params = self.after_step(lanes, position, params)
        pick.put(self.params, params)
        pick.put(self.moments, moments)
        pick.put(self.buffers, buffers)

    def rate(self, index: int, rows: list[int]) -> float | Tensor:
        """The learning rate of a step: a number, or (rows,) where a schedule over steps differs between clients."""
        node, header = self.node, self.first.header
        totals = [node.schedule_total(len(self.plans[row].batches), header) for row in rows]
        rates = [
            schedule(node.config.optimiser, step=index, round=header.round, task=header.task, total=total)
            for total in totals
        ]
        return rates[0] if len(set(rates)) == 1 else torch.tensor(rates, dtype=torch.float64)

    def gradients(self, lanes: Lane, position: Tensor) -> tuple[Stacked, tuple[Stacked, Stacked]]:
        """Edited gradients, loss terms and new buffers of each client of a group."""
        node = self.node

        def loss(params: Arrays, lane: dict[str, Any]) -> tuple[Tensor, tuple[Arrays, Arrays]]:
            buffers = {n: b.clone() for n, b in lane["buffers"].items()}
            step, client = self.rebuilt(lane, params, buffers, position)
            with node.autocast():
                terms = total_loss(node.stack, step, client)
            wide = [t.float() if t.dtype == torch.bfloat16 else t for t in terms.values()]
            return torch.stack(wide).sum(), ({n: t.detach() for n, t in terms.items()}, buffers)

        def one(lane: dict[str, Any]) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            grads, aux = grad(loss, has_aux=True)(lane["params"], lane)
            if node.config.optimiser.clip is not None:
                grads = clip_by_norm(grads, node.config.optimiser.clip)
            for strategy in node.stack:
                if type(strategy).edit_gradients is not Strategy.edit_gradients:
                    step, client = self.rebuilt(lane, lane["params"], lane["buffers"], position)
                    with blame(strategy, "edit_gradients"):
                        grads = strategy.edit_gradients(narrowed(step, strategy, client.down, client.state), grads)
            return grads, aux

        out: tuple[Stacked, tuple[Stacked, Stacked]] = vmap(one, randomness="error")(vars(lanes))
        return out

    def after_step(self, lanes: Lane, position: Tensor, params: Stacked) -> Stacked:
        """The strategies' last word on the new parameters."""

        def one(lane: dict[str, Any], new: Arrays) -> Arrays:
            step, client = self.rebuilt(lane, lane["params"], lane["buffers"], position)
            for strategy in self.node.stack:
                if type(strategy).after_step is not Strategy.after_step:
                    with blame(strategy, "after_step"):
                        new = strategy.after_step(narrowed(step, strategy, client.down, client.state), new)
            return new

        out: Stacked = vmap(one, randomness="error")(vars(lanes), params)
        return out

    def rebuilt(self, lane: dict[str, Any], params: Arrays, buffers: Arrays, position: Tensor) -> tuple[Step, Client]:
        """The step of one lane as strategies see it, and the client it belongs to."""
        node, first = self.node, self.first
        batch = Batch(lane["pixels"], lane["labels"], lane["ids"], lane["source"])
        for strategy in node.stack:
            with blame(strategy, "prepare"):
                batch = strategy.prepare(batch)
        seed = counter.step_seed(lane["seed"], position)
        received = {n: lane["own"].get(n, a) for n, a in first.received.items()}
        previous = first.models.named["stage:previous"]
        named: Mapping[str, Arrays] = {
            "received": received,
            "stage:previous": {n: lane["own"].get(n, a) for n, a in previous.items()},
        }
        models = NamedModels(node, named)
        states: dict[str, SameShapes] = {s.name: SameShapes() for s in node.stack}
        for name, array in lane["state"].items():
            strategy_name, key = name.split("/", 1)
            states[strategy_name][key] = array
        fixed = {n: lane["own"][n] for n in self.own}
        step = Step(
            node.images(batch.pixels, seed), batch.labels, batch, {**params, **fixed}, buffers, received, {}, {},
            position, first.known, first.new, lane["counts"], seed, first.header.task, first.header.round, models,
        )  # fmt: skip
        client = Client(
            first.id, first.header, first.ids, first.labels, received, first.down, states, models, first.known,
            first.new, lane["counts"], node,
        )  # fmt: skip
        return step, client

    def result(self, place: int) -> Trained:
        """One client's outcome."""
        p = self.plans[place]
        count = len(p.batches)
        losses = {n: float(s[place]) / count for n, s in self.sums.items()} if count else {}
        bad = [f"{n} = {v}" for n, v in losses.items() if not math.isfinite(v)]
        if bad:
            header = p.client.header
            raise RunFailed(
                f"task {header.task + 1}, round {header.round + 1}, client {p.client.id}: the loss is not finite "
                f"({', '.join(bad)}); a lower optimiser.lr or optimiser.clip=1 may help"
            )
        arrays = {n: a[place] for n, a in (self.params | self.own | self.buffers).items()}
        return Trained({n: arrays[n] for n in p.client.received}, count, len(p.client.ids), p.dropped, losses)


@dataclass(frozen=True)
class Picker:
    """Rows of stacked arrays; the whole stack is passed on without a copy."""

    rows: list[int]
    whole: bool
    device: torch.device

    def __call__(self, array: Tensor) -> Tensor:
        return array if self.whole else array[torch.tensor(self.rows, device=array.device)]

    def of(self, arrays: Stacked) -> Stacked:
        """The rows of each array."""
        return {n: self(a) for n, a in arrays.items()}

    def put(self, target: Stacked, values: Stacked) -> None:
        """Writes the rows back."""
        for name, value in values.items():
            if self.whole:
                target[name] = value
            else:
                target[name] = target[name].index_copy(0, torch.tensor(self.rows, device=target[name].device), value)


def stack(arrays: Sequence[Tensor]) -> Tensor:
    """Arrays with a new leading axis; one shared array is not copied."""
    first = arrays[0]
    if all(a is first for a in arrays):
        return first.expand(len(arrays), *first.shape)
    return torch.stack(list(arrays))
