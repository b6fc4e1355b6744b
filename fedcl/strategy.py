"""What a strategy author writes: one class with both halves, client and server, of one algorithm.

Every hook has a neutral default, so the simplest strategy is a class with a name. Strategies stack: loss terms
of all of them add up, server hooks run in the order of the stack, and the **exclusive slots** (`task_loss`,
`aggregate`, `predict`) may be claimed by one strategy only. Hooks take state and return state; nothing is kept on
``self`` but the options.

Reading order: :class:`Strategy`, then :class:`Step` (what a loss sees), :class:`ClientContext` (what the other client
hooks see) and :class:`Server` (what the server hooks see).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import random as counter
from .batch import Batch as Batch
from .batch import Source as Source
from .cards import Card
from .masks import own_head

if TYPE_CHECKING:
    from .config import Config
    from .data.store import TensorStore
    from .models.model import FedModel, Output
    from .stream import Split, Stream
    from .streams.public import Public

Arrays = dict[str, Tensor]
"""Named tensors: a model, a state, an upload."""

Reduction = Literal["sum", "mean", "weighted_mean", "max", "min", "stack"]
Sharing = Literal["shared", "private", "frozen"]
Scope = Literal["run", "task", "round"]
Unlabelled = Literal["ignores", "sees", "learns"]


@dataclass(frozen=True)
class NoOptions:
    """A strategy without options."""


class Models(Protocol):
    """Forward passes of the models a client can reach, by name."""

    def __call__(
        self,
        x: Tensor,
        which: str | Arrays,
        mode: Literal["train", "eval"],
        taps: tuple[str, ...] = (),
        seed: Tensor | None = None,
    ) -> Output: ...


@dataclass(frozen=True)
class Step:
    """One optimiser step of one client, as a loss sees it. All tensors are per client, never padded.

    Attributes:
        x: (B, C, H, W) normalised images, augmented.
        y: (B,) int64 class positions; -1 where the label is hidden, which only strategies see that say so
            (:attr:`Strategy.unlabelled`).
        batch: where they come from: ids, source, views.
        params, buffers: the model being trained.
        received: the global model as broadcast this round (read only).
        down: this strategy's broadcast arrays by name.
        state: this strategy's client state.
        index: int64 scalar tensor, steps taken in this round.
        known, new: (C,) bool masks of the classes seen so far and of those new in this task.
        counts: (C,) int64, the client's labelled training images a class in this task; with
            ``federation.passes=once`` those of this round, as a client knows no image before it comes.
        seed: int64 scalar tensor from which all draws of this step derive.
        heads: (C,) int64, the task of each class where an image's task is known at test; None: one head for all.
        whole: the step with the images that have no label, where this one is without them.
        places: (B,) int64, which images of ``whole`` are in this step.
    """

    x: Tensor
    y: Tensor
    batch: Batch
    params: Arrays
    buffers: Arrays
    received: Arrays
    down: Mapping[str, Tensor]
    state: Arrays
    index: Tensor
    known: Tensor
    new: Tensor
    counts: Tensor
    seed: Tensor
    task: int
    round: int
    models: Models
    cache: dict[str, Any] = field(default_factory=dict)
    heads: Tensor | None = None
    whole: Step | None = None
    places: Tensor | None = None

    def among(self, classes: Tensor) -> Tensor:
        """Those of ``classes``, (C,) or (B, C) bool, that each image's softmax runs over: its task's, where known."""
        return classes if self.heads is None else own_head(classes, self.y, self.heads)

    @property
    def output(self) -> Output:
        """Features (B, d), embeddings (B, p) and logits (B, C) of the trained model on ``x``, computed once a step."""
        if "output" not in self.cache:
            self.cache["output"] = self.forward(self.x) if self.whole is None else self._part(self.whole.output)
        result: Output = self.cache["output"]
        return result

    def _part(self, output: Output) -> Output:
        """The rows of this step, so that the images of all losses go through the model together, and once."""
        embeddings = None if output.embeddings is None else output.embeddings[self.places]
        return output._replace(
            features=output.features[self.places], embeddings=embeddings, logits=output.logits[self.places], taps={}
        )

    def labelled(self) -> Step:
        """The same step with its labelled images alone; itself where all of them are."""
        if not self.batch.hidden:
            return self
        if "labelled" not in self.cache:
            places = self.batch.labelled()
            self.cache["labelled"] = self.x[places], self.y[places], self.batch.at(places), {}, places
        x, y, batch, cache, places = self.cache["labelled"]
        return replace(self, x=x, y=y, batch=batch, cache=cache, whole=self, places=places)

    def forward(
        self,
        x: Tensor,
        which: str | Arrays = "own",
        mode: Literal["train", "eval"] | None = None,
        taps: tuple[str, ...] = (),
    ) -> Output:
        """A forward pass.

        Args:
            x: (B, C, H, W) normalised images.
            which: ``own`` (being trained), ``received`` (this round's broadcast), a snapshot's name such as
                ``stage:previous``, or arrays of the model's names.
            mode: ``train`` or ``eval``; by default train for ``own``, eval otherwise. Eval never writes buffers.
            taps: names of modules whose inputs and outputs are returned too.
        """
        own = isinstance(which, str) and which == "own"
        arrays = {**self.params, **self.buffers} if own else which
        counted = self.cache if self.whole is None else self.whole.cache
        calls = counted["calls"] = counted.get("calls", -1) + 1
        return self.models(x, arrays, mode or ("train" if own else "eval"), taps, self.seed + calls)

    def uniform(self, shape: tuple[int, ...], tag: str) -> Tensor:
        """Numbers in (0, 1) that depend on client, task, round, step and ``tag`` only."""
        return counter.counter_uniform(self.seed, counter.fold(tag), shape, self.x.dtype)

    def normal(self, shape: tuple[int, ...], tag: str) -> Tensor:
        """Standard normal numbers, see :meth:`uniform`."""
        return counter.counter_normal(self.seed, counter.fold(tag), shape, self.x.dtype)

    def integers(self, bound: int, shape: tuple[int, ...], tag: str) -> Tensor:
        """Integers of ``range(bound)``, see :meth:`uniform`."""
        return counter.counter_integers(self.seed, counter.fold(tag), bound, shape)


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

    def among(self, classes: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`Step.among`, for images of given labels (B,)."""
        return classes if self.heads is None else own_head(classes, labels, self.heads)

    def forward(self, x: Tensor, which: str | Arrays = "received", taps: tuple[str, ...] = ()) -> Output:
        """A forward pass in eval mode, see :meth:`Step.forward`."""
        return self.models(x, which, "eval", taps)

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
        rounds_done: rounds since the start of the run.
        known, new: (C,) bool masks over class positions.
        previous: the global model at the end of the previous task, or None in the first.
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
    ) -> Arrays:
        """Calls a method of the strategy at clients and returns what it uploads, reduced by ``reductions``.

        Args:
            function: a bound method ``f(ctx) -> (arrays, state)`` of the strategy.
            clients: ``holders`` of training data of this task (labelled, unless the strategy learns without labels)
                or ``all``, of those in reach of ``federation.exchange``
                (everybody, but for a drawn population), or partition ids.
            down: arrays sent along, read as ``ctx.down``; charged once a call and client.
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
    """

    arrays: Arrays
    state: Arrays
    known: Tensor
    models: Models

    def forward(self, x: Tensor, taps: tuple[str, ...] = ()) -> Output:
        """Features, embeddings and logits of ``arrays`` in eval mode."""
        return self.models(x, self.arrays, "eval", taps)


class Strategy:
    """Base of all strategies; every hook's default is neutral.

    Class attributes:
        name: as on the command line.
        Options: frozen dataclass of settings, defaults as published.
        card: paper, state, what leaves a client, certainty.
        needs_projector: the model gets a projector when the settings say ``auto``.
        needs_previous: clients get the global model of the previous task's end as ``stage:previous``.
        reductions: how each array that leaves a client is reduced at the server.
        model_reduction: ``weighted_mean``, or ``stack`` when `aggregate` needs each client's model.
        like_parameters: state names ``NAME/parameter`` that grow with the head: new rows are ``zero`` or ``initial``.
        centralised: a bound that pools data; its bytes are undefined.
        repeats: a bound whose tasks hold images of earlier tasks again.
        revisits: why a task's images are needed again after its last round; refused where images are seen once.
        common_clock: why all clients must have the same task at a time; refused where they have tasks of their own.
        yields: exclusive slots that this strategy leaves to another one that claims them.
        exemplars: names of states, at clients or at the server, that are images kept: rows of the store (M,), or the
            images themselves.
        unlabelled: what its ``loss``, ``edit_gradients`` and ``after_step`` do with images whose labels are hidden:
            ``ignores``: they get the labelled images alone, and are left out at a step without any;
            ``sees``: they get all images and cope with the label -1, as a term of the parameters alone does;
            ``learns``: they get all images and learn from those without labels, so that a client can train on these.
            ``task_loss`` always gets the labelled images alone.
        stackable: declares that clients may be trained as one stacked model. Without it a strategy is tried out, and
            trained one by one where the two differ; with it a difference is an error.
        neutral: options with which the strategy leaves training as it is without it, for `fedcl check`.
        tried_with: settings by dotted key that `fedcl check` needs, where the strategy refuses its usual ones.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions
    card: ClassVar[Card | None] = None
    needs_projector: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = False
    reductions: ClassVar[Mapping[str, Reduction]] = {}
    model_reduction: ClassVar[Reduction] = "weighted_mean"
    like_parameters: ClassVar[Mapping[str, Literal["zero", "initial"]]] = {}
    centralised: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    revisits: ClassVar[str] = ""
    common_clock: ClassVar[str] = ""
    yields: ClassVar[tuple[str, ...]] = ()
    exemplars: ClassVar[tuple[str, ...]] = ()
    unlabelled: ClassVar[Unlabelled] = "ignores"
    stackable: ClassVar[bool] = False
    neutral: ClassVar[Mapping[str, Any] | None] = None
    tried_with: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    # before the run

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        """Raises UsageError where settings, stream or split cannot work with this strategy; hidden labels are -1."""
        return None

    def arrange(self, split: list[list[Any]]) -> list[list[Any]]:
        """Rewrites which training rows (int64 arrays) each client has in each task: ``split[task][client]``.

        Only bounds that break the rules of continual or federated learning (joint, cumulative) need it.
        """
        return split

    def share(self, name: str) -> Sharing:
        """Whether an array of the model is ``shared`` (averaged), ``private`` (stays at a client) or ``frozen``."""
        return "shared"

    # at a client, in this order within a round

    def sources(self, ctx: ClientContext) -> list[Source]:
        """More images for each step, for example from a memory."""
        return []

    def prepare(self, batch: Batch) -> Batch:
        """Views, rotations, mixing; before augmentation."""
        return batch

    def task_loss(self, step: Step) -> Tensor:
        """Exclusive. The supervised loss; by default cross entropy over all known classes."""
        return cross_entropy(step.output.logits, step.y, step.among(step.known))

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Named terms that are added to the task loss, already weighted."""
        return {}

    def edit_gradients(self, step: Step, grads: Arrays) -> Arrays:
        """Gradients by parameter name, after clipping: projections, masks, control variates."""
        return grads

    def after_step(self, step: Step, params: Arrays) -> Arrays:
        """Parameters after the optimiser's update: clamps, projections."""
        return params

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        """After local training: (arrays to upload beside the model, new client state)."""
        return {}, ctx.state

    # at the server

    def begin_task(self, server: Server) -> Arrays:
        """After the head has grown: the new server state."""
        return server.state

    def broadcast(self, server: Server) -> Broadcast:
        """Arrays for the clients of a round, beside the model."""
        return Broadcast({})

    def aggregate(self, server: Server, models: list[Arrays], weights: list[float]) -> tuple[Arrays, Arrays]:
        """Exclusive. Parameters from each client's (``model_reduction = "stack"``), and the new server state."""
        raise NotImplementedError

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        """After each round: (global model, server state)."""
        return server.arrays, server.state

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        """After a task's last round: (model, server state). Statistics, calibration, generators."""
        return Finished(server.arrays), server.state

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        """Exclusive. Scores (B, C) of normalised images; by default the head's logits."""
        return predictor.forward(x).logits


def cross_entropy(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Mean cross entropy with the softmax over ``classes`` only.

    Args:
        logits: (B, C).
        labels: (B,) int64, each in ``classes``.
        classes: (C,) bool mask, or (B, C) for a mask a sample.

    >>> logits = torch.tensor([[2.0, 2.0, 9.0]])
    >>> round(cross_entropy(logits, torch.tensor([0]), torch.tensor([True, True, False])).item(), 4)
    0.6931
    """
    # A large negative constant, not -inf: the gradient of -inf logits is NaN where a whole row is masked.
    return F.cross_entropy(torch.where(classes, logits, torch.finfo(logits.dtype).min), labels)
