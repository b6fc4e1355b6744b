"""The client half of a run: a node hosts clients, trains the cohort it is sent, and answers with partial sums."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..data.augment import Augmentation, augment
from ..local.training import Client, NamedModels, blame
from ..masks import on_device
from ..models.arrays import frozen_names, grow_like, last_class_axes
from ..models.model import run, run_module
from ..stack import Stack
from ..strategy import Arrays, Reduction, Sharing, Strategy
from .call import Call, Header, Reply, below, prefixed
from .chunks import train_chunks
from .ledger import Ledger
from .reduction import SUMS, Reducer
from .sending import end_round, leaving, probed, weight_of
from .sharing import sharing_of
from .trainer import Trainer, nothing_trained

if TYPE_CHECKING:
    from ..config import Config
    from ..data.store import TensorStore
    from ..local.optim import PureOptimiser
    from ..models.model import FedModel, Output
    from .store import ClientStore

PRIVATE = "private/"
MASKS = 10_000  # most masks that a node keeps


@dataclass
class Node:
    """All that the clients of one node need; rebuilt from the settings wherever a node runs.

    Attributes:
        store, test: training and test images, labelled by class position.
        clients: the clients' state of record.
        class_order: original class ids in the order of positions.
        initial: the model before the first task, from which private arrays start at every client.
        own_test: the images that clients' own test rows are of; None where clients have no test set of their own.
        stop: asked between steps; true once the user wants to stop.
    """

    config: Config
    model: FedModel
    store: TensorStore
    test: TensorStore
    stack: Stack
    clients: ClientStore
    optimiser: PureOptimiser
    class_order: tuple[int, ...]
    augmentations: tuple[Augmentation, ...]
    dtype: torch.dtype
    channels_last: bool
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    initial: Arrays
    stop: Callable[[], bool] = field(default=lambda: False)
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    own_test: TensorStore | None = None

    @cached_property
    def sharing(self) -> dict[str, Sharing]:
        """Of each array of the model: ``shared``, ``private`` or ``frozen``, by strategies and BatchNorm policy."""
        return {n: sharing_of(self, n) for n in (*self.parameters, *self.buffers)}

    @cached_property
    def hides(self) -> bool:
        """Whether a training image has no label here."""
        return bool((self.store.labels < 0).any())

    @cached_property
    def contiguous(self) -> Node:
        """The same node for stacked training: under ``vmap`` no other memory format can be asked for."""
        return replace(self, channels_last=False) if self.channels_last else self

    @cached_property
    def constant(self) -> set[str]:
        """Arrays that the model itself never changes."""
        return frozen_names(self.model)

    @cached_property
    def trainable(self) -> list[str]:
        """Parameters that local training changes."""
        return [n for n in self.parameters if self.sharing[n] != "frozen"]

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Those of them that leave a client."""
        return tuple(n for n in self.trainable if self.sharing[n] == "shared")

    @cached_property
    def averaged(self) -> set[str]:
        """Private statistics of BatchNorm whose mean still reaches the server, for the global model's evaluation."""
        return {n for n in self.private if n in self.buffers and self.config.model.batch_norm == "local"}

    @cached_property
    def private(self) -> list[str]:
        """Arrays of the model that stay at a client."""
        return [n for n, sharing in self.sharing.items() if sharing == "private"]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast when asked for."""
        if self.config.engine.dtype == "bf16":
            return torch.autocast(self.store.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def images(self, pixels: Tensor, seed: Tensor) -> Tensor:
        """Augmented and normalised training images of uint8 pixels (B, C, H, W)."""
        x = augment(self.store.pixels(pixels, self.dtype), self.augmentations, seed)
        return self.store.standardise(x)

    def forward(
        self,
        arrays: Arrays,
        x: Tensor,
        mode: Literal["train", "eval"],
        taps: tuple[str, ...] = (),
        seed: Tensor | None = None,
        batch_norm: Literal["same", "eval"] = "same",
    ) -> Output:
        """A functional forward pass in the memory format of this node; see :func:`fedcl.models.model.run`."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        still = self.norm(batch_norm)
        return run(self.model, arrays, x, train=mode == "train", seed=seed, taps=taps, batch_norm=still)

    def apply(
        self,
        module: str,
        arrays: Arrays,
        inputs: tuple[Tensor, ...],
        mode: Literal["train", "eval"],
        seed: Tensor | None = None,
        batch_norm: Literal["same", "eval"] = "same",
    ) -> Any:
        """A functional call of one submodule, see :func:`fedcl.models.model.run_module`."""
        still = self.norm(batch_norm)
        return run_module(self.model, module, arrays, inputs, train=mode == "train", seed=seed, batch_norm=still)

    def norm(self, asked: Literal["same", "eval"]) -> Literal["same", "eval"]:
        """How BatchNorm behaves in training, as a phase asks for and by the policy of the model."""
        return "eval" if self.config.model.batch_norm == "frozen" else asked

    def schedule_total(self, steps: int, header: Header) -> int:
        """The length of what the schedule counts: steps of a round, rounds of a task, or tasks."""
        return {"step": steps, "round": header.rounds, "task": header.tasks}[self.config.optimiser.per]

    def client(self, call: Call, client: int) -> Client:
        """One client of a call with its state brought to the present width of the head."""
        header, device = call.header, self.store.device
        stored = self.clients.get(client, header.sequence - 1)
        stored = {n: a.to(device) for n, a in stored.items()}
        private = self.private_arrays(stored, header.width)
        state = {s.name: self.state_of(s, stored, header.width) for s in self.stack}
        received = {**call.model, **private}
        ids = call.ids[client].to(device)
        without = call.unlabelled.get(client, ids[:0]).to(device)
        labels = self.store.label_tensor[ids]
        previous = {**call.previous, **private} if call.previous else {}
        _, known, new = header.standing(client)
        return Client(
            client, header, ids, labels, received, call.to(client), state,
            NamedModels(self, {"received": received, "stage:previous": previous}),
            self.mask(header.width, known), self.mask(header.width, new),
            torch.bincount(labels, minlength=header.width), self, on_device(tuple(header.heads), device), without,
        )  # fmt: skip

    def state_of(self, strategy: Strategy, stored: Arrays, width: int) -> Arrays:
        """A strategy's part of a client's stored state, for ``width`` classes."""
        mine = {n: a.to(self.store.device) for n, a in below(stored, f"{strategy.name}/").items()}
        return self.grown_state(strategy, mine, width)

    def mask(self, width: int, classes: Sequence[int]) -> Tensor:
        """(width,) bool mask of class positions; the same tensor whenever it is asked for the same ones."""
        key = (width, *classes)
        if key not in self._masks:
            if len(self._masks) >= MASKS:
                self._masks.clear()
            mask = torch.zeros(width, dtype=torch.bool)
            mask[list(classes)] = True
            self._masks[key] = mask.to(self.store.device)
        return self._masks[key]

    def private_arrays(self, stored: Arrays, width: int) -> Arrays:
        """A client's private arrays, from its stored state or at their start, for ``width`` classes."""
        own = {n: self.initial[n] for n in self.private} | below(stored, PRIVATE)
        return {n: self.grown(n, a.to(self.store.device), width, "initial") for n, a in own.items()}

    @cached_property
    def _class_axes(self) -> dict[str, int]:
        return last_class_axes(self.model)

    def grown(self, name: str, array: Tensor, width: int, fill: Literal["zero", "initial"]) -> Tensor:
        """An array shaped like the parameter ``name``, behind any axes of its own, brought to ``width`` classes."""
        axis = self._class_axes.get(name)
        if axis is None:
            return array
        added = self.class_order[array.shape[axis] : width]
        return grow_like(
            array, name, self.model, added, fill=0.0 if fill == "zero" else "initial", seed=self.config.seed
        )

    def grown_state(self, strategy: Strategy, state: Arrays, width: int) -> Arrays:
        """A strategy's state with everything shaped like parameters brought to ``width`` classes."""
        like = strategy.like_parameters
        return {
            n: self.grown(n.split("/", 1)[1], a, width, like[n.split("/", 1)[0]]) if n.split("/", 1)[0] in like else a
            for n, a in state.items()
        }

    def save(self, client: Client, state: dict[str, Arrays], trained: Arrays | None, sequence: int) -> None:
        """Writes a client's state of record, if it has any."""
        flat: Arrays = {}
        for name, arrays in state.items():
            flat |= prefixed(arrays, f"{name}/")
        source = client.received if trained is None else trained
        flat |= {f"{PRIVATE}{n}": source[n] for n in self.private}
        if flat or any(client.state.values()):  # an emptied state replaces the one before
            self.clients.put(client.id, sequence, flat)

    def handle(self, call: Call) -> Reply:
        """Answers a call; the clients' new states are written before it returns."""
        if call.header.function == "train":
            return self.train(call)
        name, method = call.header.function.split(":", 1)
        return self.ask(call, name, method)

    def train(self, call: Call) -> Reply:
        """A round of local training of the cohort; clients without images answer with nothing."""
        rules = self.train_rules()
        # A whole stack is summed at once, unless the server wants to see the single models.
        fused = rules["model/"] in SUMS and not self.stack.having("upload")
        reducer = Reducer(rules)
        ledger, idle = Ledger(), []
        own: dict[str, list[int]] = {}
        weights: dict[int, float] = {}
        totals: dict[str, float] = {}
        terms: dict[str, int] = {}
        changes: list[dict[str, Any]] = []
        steps = samples = dropped = 0
        sizes = {n: self.steps_size(call, n) for n in call.header.clients}
        able, empty = [n for n in sizes if sizes[n]], [n for n in sizes if not sizes[n]]
        for cohort in train_chunks(self, call, able, changes):
            stack = {f"model/{n}": a for n, a in cohort.arrays.items() if fused and self.leaves(n)}
            for client, result in cohort.clients:
                dropped += result.dropped
                if not result.steps:
                    idle.append(client.id)
                    continue
                own |= probed(self, call, client, result.arrays)
                with ledger.at(client.id, cohort.seconds * result.steps, result.shapes):
                    uploads, state = end_round(self, client, result)
                    left, weight = leaving(self, client, result), weight_of(self, client, result)
                self.save(client, state, result.arrays, call.header.sequence)
                if not stack:
                    uploads = prefixed(left, "model/") | uploads
                reducer.add(uploads, weight)
                weights[client.id] = weight
                ledger.sent(uploads, [n for n in uploads if reducer.rule(n) == "masked_mean"])
                steps, samples = steps + result.steps, samples + result.samples
                for term, value in result.losses.items():
                    totals[term] = totals.get(term, 0.0) + value * result.samples
                    terms[term] = terms.get(term, 0) + result.samples
            if stack and cohort.active:
                reducer.add_stack(stack, [weights[cohort.clients[place][0].id] for place in cohort.active])
                ledger.sent(stack)
            client = result = cohort = stack = None  # type: ignore[assignment]  # their memory is for the next chunk
        arrays, facts = reducer.partial()
        measured = {
            "steps": steps, "samples": samples, "dropped": dropped, "idle": idle, "empty": empty, "losses": totals,
            "terms": terms, "own": own, "engine": changes, **ledger.measured(self, call),
        }  # fmt: skip
        return Reply(arrays, facts, measured)

    def steps_size(self, call: Call, client: int) -> int:
        """How many images set a client's steps, see :attr:`fedcl.local.training.Client.primary`."""
        return len(call.ids[client]) or (len(call.unlabelled.get(client, ())) if self.stack.learns else 0)

    def leaves(self, name: str) -> bool:
        """Whether an array of the model leaves a client."""
        return self.sharing[name] == "shared" or name in self.averaged

    def train_rules(self) -> dict[str, Reduction]:
        """The reduction of everything a round uploads."""
        owner = self.stack.owners["aggregate"]
        rules: dict[str, Reduction] = {f"model/{n}": "weighted_mean" for n in self.buffers}
        rules["model/"] = owner.model_reduction if owner else "weighted_mean"
        for strategy in self.stack:
            rules |= {f"{strategy.name}/{n}": r for n, r in strategy.reductions.items()}
        return rules

    def ask(self, call: Call, name: str, method: str) -> Reply:
        """Calls a strategy's method at each client and reduces what it uploads."""
        strategy = next(s for s in self.stack if s.name == name)
        reducer, ledger = Reducer(strategy.reductions), Ledger()
        measured: dict[str, Any] = nothing_trained()
        for number in call.header.clients:
            client = self.client(call, number)
            before = client.state.get(name, {})
            did = Trainer(client, call.header.function)
            with blame(strategy, method), ledger.at(number, shapes=did.shapes):
                arrays, after = getattr(strategy, method)(client.context(strategy, trainer=did))
            did.report(measured)
            if after is not before:
                self.save(client, {**client.state, name: after}, None, call.header.sequence)
            learns = strategy.unlabelled == "learns"
            reducer.add(arrays, max(float(len(client.ids) + learns * len(client.unlabelled)), 1.0))
            ledger.sent(arrays)
        arrays, facts = reducer.partial()
        return Reply(arrays, facts, {**measured, **ledger.measured(self, call)})
