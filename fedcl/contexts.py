"""What the hooks outside of a step see: a client, the server, and whoever predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from .errors import RunFailed
from .masks import own_head
from .step import Arrays, Models, extra_name

if TYPE_CHECKING:
    from .data.store import TensorStore
    from .models.model import FedModel, Output
    from .streams.public import Public

Scope = Literal["run", "task", "round"]


@dataclass(frozen=True)
class Phase:
    """A part of a client's round of local training, with a fresh optimiser.

    All but ``start`` and ``ids`` may depend on task, round and options only, so that clients can be stacked.

    Attributes:
        name: read by the losses as ``step.phase``; names differ within a round.
        trains: which parameters it changes, by name, of those that are trained at all.
        epochs, steps: its length; None for both takes the settings of ``federation``.
        start: arrays it starts from, all of the model's names; None: those after the phase before, and in the first
            the received ones.
        side: its outcome is not the client's model; `end_round` finds it in ``ctx.outcomes``. The phase after it goes
            on from the last one that was no side phase, with what that one carried: neither leaves a side phase.
        batch_norm: ``eval`` keeps BatchNorm on its running statistics.
        lr_scale: factor on the learning rate.
        ids: (n,) int64 labelled rows of the store to train on, in place of the client's own of this task; a row that
            stands several times is seen several times an epoch.
    """

    name: str = ""
    trains: Callable[[str], bool] = field(default=lambda name: True)
    epochs: int | None = None
    steps: int | None = None
    start: Arrays | None = None
    side: bool = False
    batch_norm: Literal["same", "eval"] = "same"
    lr_scale: float = 1.0
    ids: Tensor | None = None


@dataclass(frozen=True)
class ClientContext:
    """A client outside of a step: what `sources`, `end_round` and exchanged functions see.

    Attributes:
        client: partition id.
        received: the global model as broadcast, merged with the client's private parts.
        down: this strategy's broadcast arrays by name.
        state: this strategy's state at this client.
        ids: (n,) int64 rows of ``store``: the client's labelled training images of this task.
        labels: (n,) int64 class positions of these.
        unlabelled: (m,) int64 rows of ``store``: its training images of this task whose labels are hidden, -1 there.
        known, new, counts: as in :class:`Step`.
        batch_size: training images a step.
        key: parts that name the random streams of this client, task and round.
        heads: as in :class:`Step`.
        online: whether images are seen once (``federation.passes=once``): then ``ids``, ``labels`` and ``counts`` are
            of the images at hand in this round.
        carried: what this strategy has carried through the steps of the round, in `end_round`.
        outcomes: the arrays after each phase of the round that has a name, in `end_round`.
        strategy: name of the strategy that sees the client.
        trainer: what :meth:`train` calls.
        shared: names of the parameters that are trained and leave the client: not private, not frozen.
    """

    client: int
    task: int
    round: int
    received: Arrays
    down: Mapping[str, Tensor]
    state: Arrays
    ids: Tensor
    labels: Tensor
    known: Tensor
    new: Tensor
    counts: Tensor
    store: TensorStore
    model: FedModel
    models: Models
    batch_size: int
    eval_batch_size: int
    key: tuple[object, ...]
    heads: Tensor | None = None
    online: bool = False
    unlabelled: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    carried: Arrays = field(default_factory=dict)
    outcomes: Mapping[str, Arrays] = field(default_factory=dict)
    strategy: str = ""
    trainer: Callable[[Phase], Arrays] | None = None
    shared: tuple[str, ...] = ()

    def among(self, classes: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`Step.among`, for images of given labels (B,)."""
        return classes if self.heads is None else own_head(classes, labels, self.heads)

    def forward(self, x: Tensor, which: str | Arrays = "received", taps: tuple[str, ...] = ()) -> Output:
        """A forward pass in eval mode, see :meth:`Step.forward`."""
        return self.models(x, which, "eval", taps)

    def apply(self, module: str, *inputs: Tensor, which: str | Arrays = "received") -> Any:
        """The output in eval mode of a module that this strategy added, see :meth:`Step.apply`."""
        return self.models.apply(extra_name(self.strategy, module), which, inputs, "eval")

    def train(self, phase: Phase) -> Arrays:
        """The model after local training under ``phase``, with the losses of the whole stack.

        For functions that :meth:`Server.exchange` calls; one client at a time. Nothing of it is kept: what is to leave
        or to stay, the function returns.

        Raises:
            RunFailed: called from a hook of a round, which trains by itself (:meth:`Strategy.phases`).
        """
        if self.trainer is None:
            raise RunFailed(f"strategy {self.strategy!r} calls ctx.train in a hook; only exchanged functions may")
        return self.trainer(phase)

    def batches(self, ids: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of ``ids`` (default: the client's own) in order, unaugmented, in evaluation batches."""
        ids = self.ids if ids is None else ids
        dtype = next(iter(self.received.values())).dtype
        for part in torch.split(ids, self.eval_batch_size):
            yield self.store.batch(part, dtype), self.store.label_tensor[part]


@dataclass(frozen=True)
class Broadcast:
    """Arrays that the server sends to the clients it calls.

    Attributes:
        arrays: by name; a strategy reads them as ``step.down[name]``.
        scope: a client is charged once per ``run``, ``task`` or ``round`` for them.
    """

    arrays: Arrays
    scope: Scope = "round"


@dataclass(frozen=True)
class Finished:
    """What `finish_task` leaves: arrays the next task starts from, and others to be evaluated, if they differ."""

    arrays: Arrays
    evaluate: Arrays | None = None


class Server(Protocol):
    """The server as a strategy's server hooks see it.

    Attributes:
        arrays: the global model; ``finish_task`` and ``after_aggregate`` return a new one.
        state: this strategy's server state (read only; hooks return a new one).
        uploads: what this strategy's `end_round` uploads were reduced to in this round.
        task, round: 0-based.
        rounds: rounds of a task.
        rounds_done: rounds since the start of the run.
        known, new: (C,) bool masks over class positions.
        previous: the global model at the end of the previous task, or None in the first.
        evaluated: in `finish_task` the model to be evaluated, as the strategies before this one leave it.
        key: parts that name the server's random streams of this round, or of the task's end.
        before: the global model at the start of this round, as it was broadcast; outside of a round the present one.
        shared: names of the parameters that clients train and send.
        cohort: partition ids of the clients of this round, ascending; [] outside of a round.
        repeats: whether the stream, or a bound of the stack, shows clients images of earlier tasks again.
        online: whether images are seen once (``federation.passes=once``): an exchange then reaches the images of the
            present round, and after the last round of a task there are none to ask for.
        task_known: whether the task of an image is known at test: classes of different tasks do not compete.
        public: the server's own images of the tasks so far (``partition.public``), None without.
    """

    @property
    def arrays(self) -> Arrays: ...

    @property
    def state(self) -> Arrays: ...

    @property
    def uploads(self) -> Arrays: ...

    @property
    def task(self) -> int: ...

    @property
    def round(self) -> int: ...

    @property
    def rounds(self) -> int: ...

    @property
    def rounds_done(self) -> int: ...

    @property
    def num_clients(self) -> int: ...

    @property
    def known(self) -> Tensor: ...

    @property
    def new(self) -> Tensor: ...

    @property
    def previous(self) -> Arrays | None: ...

    @property
    def evaluated(self) -> Arrays: ...

    @property
    def key(self) -> tuple[object, ...]: ...

    @property
    def shared(self) -> tuple[str, ...]: ...

    @property
    def before(self) -> Arrays: ...

    @property
    def cohort(self) -> Sequence[int]: ...

    @property
    def model(self) -> FedModel: ...

    @property
    def repeats(self) -> bool: ...

    @property
    def task_known(self) -> bool: ...

    @property
    def online(self) -> bool: ...

    @property
    def public(self) -> Public | None: ...

    def exchange(
        self,
        function: Callable[[ClientContext], tuple[Arrays, Arrays]],
        clients: Literal["holders", "all"] | Sequence[int] = "holders",
        down: Arrays | None = None,
        each: Mapping[int, Arrays] | None = None,
    ) -> Arrays:
        """Calls a method of the strategy at clients and returns what it uploads, reduced by ``reductions``.

        Args:
            function: a bound method ``f(ctx) -> (arrays, state)`` of the strategy.
            clients: ``holders`` of training data of this task (labelled, unless the strategy learns without labels)
                or ``all``, of those in reach of ``federation.exchange``
                (everybody, but for a drawn population), or partition ids.
            down: arrays sent along, read as ``ctx.down``; charged once a call and client.
            each: arrays for single clients by partition id, read as ``ctx.down`` too.
        """
        ...


@dataclass(frozen=True)
class Predictor:
    """What `predict` may use.

    Attributes:
        arrays: the model to be evaluated.
        state: the strategy's server state.
        known: (C,) bool mask of the classes seen so far, or of the image's own task where that is known; only these
            may be predicted.
        client: whose model it is; None: the global one.
        own: this strategy's state at that client, {} for the global model.
        strategy: name of the strategy that predicts.
    """

    arrays: Arrays
    state: Arrays
    known: Tensor
    models: Models
    client: int | None = None
    own: Arrays = field(default_factory=dict)
    strategy: str = ""

    def forward(self, x: Tensor, taps: tuple[str, ...] = ()) -> Output:
        """Features, embeddings and logits of ``arrays`` in eval mode."""
        return self.models(x, self.arrays, "eval", taps)

    def apply(self, module: str, *inputs: Tensor) -> Any:
        """The output in eval mode of a module that this strategy added, see :meth:`Step.apply`."""
        return self.models.apply(extra_name(self.strategy, module), self.arrays, inputs, "eval")
