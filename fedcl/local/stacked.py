"""Local training of many clients as one stacked model: steps of :mod:`fedcl.local.training` under ``torch.func.vmap``.

Draws inside a step are counter-based, so a client sees the same numbers alone and stacked; results agree within
rounding. What all clients of a stack share (the broadcast model before the first step) is not copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from .. import random as counter
from ..errors import Interrupted, RunFailed
from ..stack import seen_by
from ..strategy import Arrays, Batch, Step, Strategy
from .batching import Group, Plan, make_plan, schedule_groups
from .optim import clip_by_norm
from .rates import schedule
from .sharedstate import SharedState
from .sources import prepared
from .training import Client, NamedModels, Trained, blame, not_finite, shapes_of, total_loss

Stacked = dict[str, Tensor]
"""Arrays with a leading axis of clients."""

Hook = Literal["edit_gradients", "after_step"]


class Bank:
    """Named arrays of the clients of a stack; one that is the same tensor for all of them stays a single one.

    Args:
        columns: each client's arrays, with the same names.
        names: which of them.
    """

    def __init__(self, columns: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        self.size = len(columns)
        self.arrays: dict[str, Tensor] = {}
        self.common: set[str] = set()
        for name in names:
            column = [c[name] for c in columns]
            if all(a is column[0] for a in column):
                self.common.add(name)
                self.arrays[name] = column[0]
            else:
                self.arrays[name] = torch.stack(column)

    def pick(self, group: Group) -> Stacked:
        """The rows of a group; single arrays as they are."""
        whole = group.count == self.size
        return {n: a if whole or n in self.common else a[group.rows] for n, a in self.arrays.items()}

    def spread(self, group: Group) -> Stacked:
        """As :meth:`pick`, with single arrays expanded to the group's size."""
        count = group.count
        return {n: a.expand(count, *a.shape) if n in self.common else a for n, a in self.pick(group).items()}

    def axes(self) -> dict[str, int | None]:
        """The axis of clients of each array, for ``vmap``; None: one array for all."""
        return {n: None if n in self.common else 0 for n in self.arrays}

    def put(self, group: Group, values: Stacked) -> None:
        """Writes rows back."""
        for name, value in values.items():
            if group.count == self.size:
                self.arrays[name] = value
                continue
            if name in self.common:
                self.arrays[name] = self.arrays[name].expand(self.size, *self.arrays[name].shape).clone()
            target = self.arrays[name]
            if value.data_ptr() != target.data_ptr():  # the first rows may have been updated where they are
                target[group.rows] = value
        self.common -= values.keys()

    def stacked(self, count: int) -> Stacked:
        """The first ``count`` rows of every array."""
        return {n: a.expand(count, *a.shape) if n in self.common else a[:count] for n, a in self.arrays.items()}


@dataclass(frozen=True)
class Cohort:
    """What a stack of clients has trained.

    Attributes:
        clients: with their outcome, in the order in which they were given.
        active: places in ``clients`` of those that took a step.
        arrays: parameters and buffers of the active ones, (active, ...), in the order of ``active``.
        seconds: what one step of a client took: the time of all, shared by the steps.
    """

    clients: list[tuple[Client, Trained]]
    active: list[int]
    arrays: Stacked
    seconds: float = 0.0


def train_cohort(clients: Sequence[Client], limit: int | None = None) -> Cohort:
    """A round of local training of several clients of one node, each with images.

    Args:
        limit: most steps to take, to try a strategy out.

    Raises:
        RunFailed: a loss is not finite, or a strategy failed.
        Interrupted: the user asked to stop.
    """
    plans = [make_plan(client, limit) for client in clients]
    order = sorted(range(len(plans)), key=lambda i: -len(plans[i].batches))
    training = Training([plans[i] for i in order])
    training.run()
    back = dict(zip(order, training.results(), strict=True))
    for place, client in enumerate(clients):
        losses = back[place].losses
        if not all(math.isfinite(v) for v in losses.values()):
            raise RunFailed(not_finite(client, losses))
    active = [i for i in order if plans[i].batches]
    arrays = training.params.stacked(len(active)) | training.buffers.stacked(len(active))
    return Cohort([(c, back[i]) for i, c in enumerate(clients)], active, arrays)


class Training:
    """The state of a stack during its steps; the clients with most steps come first."""

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.first = plans[0].client
        self.node = node = self.first.node.contiguous
        clients = [p.client for p in plans]
        device = node.store.device
        received = [c.received for c in clients]
        trained = {*node.trainable, *node.buffers}
        self.params = Bank(received, node.trainable)
        self.buffers = Bank(received, node.buffers)
        fixed = [n for n in self.first.received if n not in trained]
        self.fixed = Bank(received, fixed)
        self.private = Bank(received, [n for n in node.private if n not in fixed])
        self.state, self.unlike = self.states(clients)
        self.counts = torch.stack([c.counts for c in clients])
        self.masks = Bank([{"known": c.known, "new": c.new} for c in clients], ["known", "new"])
        self.groups = schedule_groups(plans, device)
        self.positions = torch.arange(len(self.groups), dtype=torch.int64).to(device)
        keys = torch.tensor([counter.fold(*c.key) for c in clients], dtype=torch.int64).to(device)
        self.seeds = counter.step_seed(keys, self.positions[:, None])
        template = {n: a if n in self.params.common else a[0] for n, a in self.params.arrays.items()}
        moments = node.optimiser.init(template)
        # Every client that is still active has taken the same number of steps.
        self.steps_taken = moments.pop("step")
        self.moments = Bank([moments] * len(plans), list(moments))
        self.rates = self.learning_rates()
        self.edits = [s for s in node.stack if type(s).edit_gradients is not Strategy.edit_gradients]
        self.afters = [s for s in node.stack if type(s).after_step is not Strategy.after_step]
        self.sums: Stacked = {}
        # Clients whose batches have labels alike have loss terms alike.
        self.terms: dict[tuple[int, ...], set[str]] = {}

    @staticmethod
    def states(clients: Sequence[Client]) -> tuple[Bank, dict[str, set[str]]]:
        """The clients' states as ``STRATEGY/name``, and by strategy the names that are not alike at all clients."""
        flat = [{f"{s}/{n}": a for s, arrays in c.state.items() for n, a in arrays.items()} for c in clients]
        shapes: dict[str, set[torch.Size | None]] = {n: set() for arrays in flat for n in arrays}
        for name, found in shapes.items():
            found |= {arrays[name].shape if name in arrays else None for arrays in flat}
        unlike: dict[str, set[str]] = {}
        for strategy, name in (n.split("/", 1) for n, found in shapes.items() if len(found) > 1):
            unlike.setdefault(strategy, set()).add(name)
        return Bank(flat, [n for n, found in shapes.items() if len(found) == 1]), unlike

    def run(self) -> None:
        """All steps of all clients."""
        for index, groups in enumerate(self.groups):
            if self.node.stop():
                raise Interrupted("interrupted during local training")
            for group in groups:
                self.step(index, group)
            self.steps_taken = self.steps_taken + 1

    def step(self, index: int, group: Group) -> None:
        """One optimiser step of one group."""
        node, store = self.node, self.node.store
        lanes: dict[str, Any] = {
            "params": self.params.pick(group), "buffers": self.buffers.spread(group), "fixed": self.fixed.pick(group),
            "private": self.private.pick(group), "state": self.state.pick(group), "pixels": store.gather(group.ids),
            "labels": store.label_tensor[group.ids], "ids": group.ids, "counts": self.counts[group.rows],
            "seed": self.seeds[index][group.rows], "masks": self.masks.pick(group),
        }  # fmt: skip
        axes: dict[str, Any] = {
            "params": self.params.axes(), "buffers": dict.fromkeys(self.buffers.arrays, 0), "fixed": self.fixed.axes(),
            "private": self.private.axes(), "state": self.state.axes(), "pixels": 0, "labels": 0, "ids": 0,
            "counts": 0, "seed": 0, "masks": self.masks.axes(),
        }  # fmt: skip
        position = self.positions[index]
        grads, (terms, buffers) = vmap(self.gradients(position, group), (axes,), randomness="error")(lanes)
        if node.config.optimiser.clip is not None:
            grads = clip_by_norm(grads, node.config.optimiser.clip, batch_dims=1)
        # Later hooks see the buffers that the forward pass has written, as one by one.
        lanes["buffers"] = buffers
        if self.edits:
            edited = self.hooked("edit_gradients", self.edits, position, group)
            grads = vmap(edited, (axes, 0), randomness="error")(lanes, grads)
        self.terms.setdefault(group.hidden, set()).update(terms)
        for name, value in terms.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(len(self.plans), dtype=value.dtype, device=value.device)
            self.sums[name][group.rows] += value
        moments = {"step": self.steps_taken, **self.moments.spread(group)}
        # A strategy's after_step may return arrays of others; after it nothing is known to be the stack's own.
        owned = not (self.params.common or self.moments.common or self.afters)
        rate = self.rates[index]
        rate = rate[group.rows] if isinstance(rate, Tensor) else rate
        params, moments = node.optimiser.update(self.params.spread(group), grads, moments, rate, owned)
        if self.afters:
            after = self.hooked("after_step", self.afters, position, group)
            params = vmap(after, (axes, 0), randomness="error")(lanes, params)
        del moments["step"]
        self.params.put(group, params)
        self.moments.put(group, moments)
        self.buffers.put(group, buffers)

    def learning_rates(self) -> Sequence[float | Tensor]:
        """The learning rate of each step: a number, or (K,) where a schedule over steps differs between clients."""
        node, header = self.node, self.first.header
        lengths = [len(p.batches) for p in self.plans]
        if node.config.optimiser.per != "step":
            lengths = lengths[:1]
        columns = [
            [
                schedule(
                    node.config.optimiser, step=index, round=header.round, task=header.task,
                    total=node.schedule_total(length, header),
                )
                for length in lengths
            ]
            for index in range(len(self.groups))
        ]  # fmt: skip
        if all(len(set(column)) == 1 for column in columns):
            return [column[0] for column in columns]
        # In one transfer, so that no step waits for the device.
        table = torch.tensor(columns, dtype=torch.float64).to(node.store.device)
        return list(table.unbind(0))

    def gradients(self, position: Tensor, group: Group) -> Callable[..., Any]:
        """A function of one lane: gradients, (loss terms, new buffers)."""
        node = self.node

        def loss(params: Arrays, lane: dict[str, Any]) -> tuple[Tensor, tuple[Arrays, Arrays]]:
            buffers = {n: b.clone() for n, b in lane["buffers"].items()}
            step, client = self.rebuilt(lane, params, buffers, position, group)
            with node.autocast():
                terms = total_loss(node.stack, step, client)
            wide = [t.float() if t.dtype == torch.bfloat16 else t for t in terms.values()]
            return torch.stack(wide).sum(), ({n: t.detach() for n, t in terms.items()}, buffers)

        def one(lane: dict[str, Any]) -> Any:
            return grad(loss, has_aux=True)(lane["params"], lane)

        return one

    def hooked(self, hook: Hook, strategies: Sequence[Strategy], position: Tensor, group: Group) -> Callable[..., Any]:
        """A function of one lane and its clipped gradients, or new parameters: what the strategies make of them."""

        def one(lane: dict[str, Any], arrays: Arrays) -> Arrays:
            step, client = self.rebuilt(lane, lane["params"], lane["buffers"], position, group)
            for strategy in strategies:
                seen = seen_by(step, strategy, client.down, client.state)
                with blame(strategy, hook):
                    arrays = arrays if seen is None else getattr(strategy, hook)(seen, arrays)
            return arrays

        return one

    def rebuilt(
        self, lane: dict[str, Any], params: Arrays, buffers: Arrays, position: Tensor, group: Group
    ) -> tuple[Step, Client]:
        """The step of one lane as strategies see it, and the client it belongs to."""
        node, first = self.node, self.first
        batch = prepared(node.stack, Batch(lane["pixels"], lane["labels"], lane["ids"], group.source), group.hidden)
        own = lane["fixed"] | lane["private"]
        received = {n: own.get(n, a) for n, a in first.received.items()}
        previous = first.models.named["stage:previous"]
        models = NamedModels(
            node, {"received": received, "stage:previous": {n: lane["private"].get(n, a) for n, a in previous.items()}}
        )
        states = {s.name: SharedState(self.unlike.get(s.name, ())) for s in node.stack}
        for name, array in lane["state"].items():
            strategy_name, key = name.split("/", 1)
            states[strategy_name][key] = array
        seed, known, new = lane["seed"], lane["masks"]["known"], lane["masks"]["new"]
        step = Step(
            node.images(batch.pixels, seed), batch.labels, batch, {**params, **lane["fixed"]}, buffers, received, {},
            {}, position, known, new, lane["counts"], seed, first.task, first.header.round, models, heads=first.heads,
        )  # fmt: skip
        client = Client(
            first.id, first.header, first.ids, first.labels, received, first.down, states, models, known, new,
            lane["counts"], node, first.heads,
        )  # fmt: skip
        return step, client

    def results(self) -> list[Trained]:
        """Each client's outcome, in the order of the stack."""
        columns = {n: s.tolist() for n, s in self.sums.items()}
        size = len(self.plans)
        arrays = self.params.stacked(size) | self.fixed.stacked(size) | self.buffers.stacked(size)
        rows = {n: arrays[n].unbind(0) for n in self.first.received}
        out = []
        for place, p in enumerate(self.plans):
            count = len(p.batches)
            own = self.terms.get(p.hidden, set())
            losses = {n: column[place] / count for n, column in columns.items() if count and n in own}
            mine = {n: row[place] for n, row in rows.items()}
            out.append(Trained(mine, count, p.client.samples, p.dropped, losses, shapes_of(p.sizes, p.hidden)))
        return out
