"""The steps of a stack: each one is a few calls under ``torch.func.vmap``, a lane a client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from .. import random as counter
from ..errors import Interrupted
from ..models.model import Output
from ..stack import seen_by
from ..strategy import Arrays, Batch, Step, Strategy
from .bank import Bank, Stacked, gathered
from .batching import Group, Plan, schedule_groups
from .optim import clip_by_norm
from .phases import STEP_HOOKS
from .rates import schedule
from .sharedstate import CannotStack, SharedState
from .sources import prepared, source_names
from .training import Client, NamedModels, Trained, blame, checked, shapes_of, total_loss

Hook = Literal["edit_gradients", "rate", "after_step", "carry"]


class Training:
    """The state of a stack during its steps; the clients with most steps come first."""

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.first = first = plans[0].client
        self.node = node = first.node.contiguous
        clients = [p.client for p in plans]
        device = node.store.device
        begins, names = [c.begins for c in clients], first.trains
        self.params = Bank(begins, names)
        self.buffers = Bank(begins, node.buffers)
        # What this phase leaves alone: shared parameters of other phases may still differ between the clients.
        fixed = [n for n in first.received if n not in {*names, *node.buffers}]
        self.fixed = Bank(begins, fixed)
        self.moving = Bank(begins, [n for n in node.trainable if n not in names])
        self.private = Bank([c.received for c in clients], node.private)
        self.state, self.unlike = self.states(clients, "state")
        self.carried, unlike = self.states(clients, "carried")
        if unlike:
            raise CannotStack(f"what strategy {next(iter(unlike))!r} carries is not alike at all clients")
        self.counts = torch.stack([c.counts for c in clients])
        self.masks = Bank([{"known": c.known, "new": c.new} for c in clients], ["known", "new"])
        self.groups = schedule_groups(plans, device)
        self.positions = torch.arange(len(self.groups), dtype=torch.int64).to(device)
        keys = torch.tensor([counter.fold(*c.key) for c in clients], dtype=torch.int64).to(device)
        self.seeds = counter.step_seed(keys, self.positions[:, None])
        self.lengths = torch.tensor([p.epoch for p in plans], dtype=torch.int64).to(device)
        template = {n: a if n in self.params.common else a[0] for n, a in self.params.arrays.items()}
        moments = node.optimiser.init(template)
        # Every client that is still active has taken the same number of steps.
        self.steps_taken = moments.pop("step")
        self.moments = Bank([moments] * len(plans), list(moments))
        self.rates = self.learning_rates()
        self.edits, self.factors, self.afters, self.carries = (node.stack.having(hook) for hook in STEP_HOOKS)
        self.sums: Stacked = {}
        # Clients whose batches have labels alike have loss terms alike.
        self.terms: dict[tuple[int, ...], set[str]] = {}

    @staticmethod
    def states(clients: Sequence[Client], what: Literal["state", "carried"]) -> tuple[Bank, dict[str, set[str]]]:
        """What the clients have as state, or carry, as ``STRATEGY/name``, and by strategy what is not alike at all."""
        both = [c.state if what == "state" else c.carried for c in clients]
        flat = [{f"{s}/{n}": a for s, arrays in one.items() for n, a in arrays.items()} for one in both]
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
            "private": self.private.pick(group), "state": self.state.pick(group), "counts": self.counts[group.rows],
            "carried": self.carried.spread(group), "seed": self.seeds[index][group.rows],
            "masks": self.masks.pick(group), "epoch": self.lengths[group.rows], **gathered(self.plans, group, store),
        }  # fmt: skip
        axes: dict[str, Any] = {
            "params": self.params.axes(), "buffers": dict.fromkeys(self.buffers.arrays, 0), "fixed": self.fixed.axes(),
            "private": self.private.axes(), "state": self.state.axes(), "counts": 0,
            "carried": dict.fromkeys(self.carried.arrays, 0), "seed": 0, "masks": self.masks.axes(), "epoch": 0,
            "pixels": 0, "labels": 0, "ids": 0, "payload": dict.fromkeys(lanes["payload"], 0),
        }  # fmt: skip
        position = self.positions[index]
        grads, (terms, buffers, output) = vmap(self.gradients(position, group), (axes,), randomness="error")(lanes)
        if node.config.optimiser.clip is not None:
            grads = clip_by_norm(grads, node.config.optimiser.clip, batch_dims=1)
        plain = grads
        # Later hooks see the buffers that the forward pass has written, and what it gave, as one by one.
        lanes["buffers"], lanes["output"], axes["output"] = buffers, output, dict.fromkeys(output, 0)
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
        owned = not (self.params.common or self.moments.common or self.afters or self.carries)
        rate = self.rates[index]
        rate = rate[group.rows] if isinstance(rate, Tensor) else rate
        if self.factors:
            factor = vmap(self.hooked("rate", self.factors, position, group), (axes, 0), randomness="error")
            rate = rate * factor(lanes, torch.ones(group.count, dtype=node.dtype, device=store.device))
        params, moments = node.optimiser.update(self.params.spread(group), grads, moments, rate, owned)
        if self.afters:
            after = self.hooked("after_step", self.afters, position, group)
            params = vmap(after, (axes, 0), randomness="error")(lanes, params)
        if self.carries:
            carry = self.hooked("carry", self.carries, position, group)
            self.carried.put(group, vmap(carry, (axes, 0), randomness="error")(lanes, (plain, params)))
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
                self.first.phase.lr_scale * schedule(
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
        """A function of one lane: gradients, (loss terms, new buffers, what the forward pass gave to later hooks)."""
        node = self.node
        hooks = bool(self.edits or self.factors or self.afters or self.carries)

        def loss(params: Arrays, lane: dict[str, Any]) -> tuple[Tensor, tuple[Arrays, Arrays, Arrays]]:
            buffers = {n: b.clone() for n, b in lane["buffers"].items()}
            step, client = self.rebuilt(lane, params, buffers, position, group)
            with node.autocast():
                terms = total_loss(node.stack, step, client)
            wide = [t.float() if t.dtype == torch.bfloat16 else t for t in terms.values()]
            given: Output | None = step.cache.get("output") if hooks else None
            output = {} if given is None else {
                n: a.detach() for n, a in given._asdict().items() if isinstance(a, Tensor)
            }  # fmt: skip
            return torch.stack(wide).sum(), ({n: t.detach() for n, t in terms.items()}, buffers, output)

        def one(lane: dict[str, Any]) -> Any:
            return grad(loss, has_aux=True)(lane["params"], lane)

        return one

    def hooked(self, hook: Hook, strategies: Sequence[Strategy], position: Tensor, group: Group) -> Callable[..., Any]:
        """A function of one lane and of what the strategies make more of: clipped gradients, a factor on the learning
        rate, new parameters, or (gradients, new parameters) that what they carry comes from."""

        def one(lane: dict[str, Any], given: Any) -> Any:
            step, client = self.rebuilt(lane, lane["params"], lane["buffers"], position, group)
            carried = dict(lane["carried"])
            for strategy in strategies:
                seen = seen_by(step, strategy, client)
                if seen is None:
                    continue
                with blame(strategy, hook):
                    if hook == "rate":
                        given = given * strategy.rate(seen)
                    elif hook == "carry":
                        after = checked(strategy, hook, seen.carried, strategy.carry(seen, *given))
                        carried |= {f"{strategy.name}/{n}": a for n, a in after.items()}
                    else:
                        given = checked(strategy, hook, given, getattr(strategy, hook)(seen, given))
            return carried if hook == "carry" else given

        return one

    def rebuilt(
        self, lane: dict[str, Any], params: Arrays, buffers: Arrays, position: Tensor, group: Group
    ) -> tuple[Step, Client]:
        """The step of one lane as strategies see it, and the client it belongs to."""
        node, first = self.node, self.first
        names = source_names(self.plans[group.members[0]].sources)
        pixels, labels, ids = lane["pixels"], lane["labels"], lane["ids"]
        batch = Batch(pixels, labels, ids, group.source, names=names, payload=lane["payload"])
        batch = prepared(node.stack, batch, group.hidden)
        received = {n: lane["private"].get(n, a) for n, a in first.received.items()}
        previous = first.models.named["stage:previous"]
        named = {"received": received, "stage:previous": {n: lane["private"].get(n, a) for n, a in previous.items()}}
        models = NamedModels(node, named, first.phase.batch_norm)
        states = {s.name: SharedState(self.unlike.get(s.name, ())) for s in node.stack}
        carried: dict[str, Arrays] = {name: {} for name in first.carried}
        for kept, lanes in ((states, lane["state"]), (carried, lane["carried"])):
            for name, array in lanes.items():
                strategy_name, key = name.split("/", 1)
                kept[strategy_name][key] = array
        seed, known, new = lane["seed"], lane["masks"]["known"], lane["masks"]["new"]
        step = Step(
            node.images(batch.pixels, seed), batch.labels, batch, {**params, **lane["fixed"]}, buffers, received, {},
            {}, position, known, new, lane["counts"], seed, first.task, first.header.round, models, heads=first.heads,
            phase=first.phase.name, epoch_length=lane["epoch"],
        )  # fmt: skip
        if lane.get("output"):
            step.cache["output"] = Output(**{"embeddings": None, "taps": {}, **lane["output"]})
        client = replace(
            first, received=received, state=states, models=models, known=known, new=new, counts=lane["counts"],
            carried=carried, start=None,
        )  # fmt: skip
        return step, client

    def results(self) -> list[Trained]:
        """Each client's outcome, in the order of the stack."""
        columns = {n: s.tolist() for n, s in self.sums.items()}
        size = len(self.plans)
        arrays = self.params.stacked(size) | self.fixed.stacked(size) | self.buffers.stacked(size)
        rows = {n: arrays[n].unbind(0) for n in self.first.received}
        carried = {n: a.unbind(0) for n, a in self.carried.stacked(size).items()}
        out = []
        for place, p in enumerate(self.plans):
            count = len(p.batches)
            own = self.terms.get(p.hidden, set())
            losses = {n: column[place] / count for n, column in columns.items() if count and n in own}
            mine = {n: row[place] for n, row in rows.items()}
            kept = {s: {n: carried[f"{s}/{n}"][place] for n in names} for s, names in self.first.carried.items()}
            shapes = shapes_of(p.sizes, p.hidden)
            out.append(Trained(mine, count, p.client.samples, p.dropped, losses, shapes, kept))
        return out
