"""One client in one call, the models it can run, and the outcome of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import RunFailed
from ..strategy import Arrays, ClientContext, Phase, Strategy

if TYPE_CHECKING:
    from ..federation.call import Header
    from ..federation.node import Node
    from ..models.model import Output

Shape = tuple[int, ...]
"""Images of each source in one training step, the client's own stream first; negative where they have no labels."""


@dataclass(frozen=True)
class Asked:
    """Training that a strategy asks for in an exchange of its own.

    Attributes:
        name: what decides the FLOPs of its steps beside their shapes: function, phase, own task, what is trained.
        phase: the first one of this name, to do a step of it again; None: a loop that is not the engine's took it.
    """

    name: str
    phase: Phase | None = field(compare=False)


Kind = Shape | tuple[int | Asked, Shape]
"""What decides the FLOPs of a step: its shape, and the number of its phase where that is not the first."""


@dataclass(frozen=True)
class NamedModels:
    """The models one client can run, by name; see :class:`fedcl.strategy.Models`."""

    node: Node
    named: Mapping[str, Arrays]
    batch_norm: Literal["same", "eval"] = "same"

    def __call__(
        self,
        x: Tensor,
        which: str | Arrays,
        mode: Literal["train", "eval"],
        taps: tuple[str, ...] = (),
        seed: Tensor | None = None,
    ) -> Output:
        return self.node.forward(self.arrays(which), x, mode, taps, seed, self.batch_norm)

    def apply(
        self,
        module: str,
        which: str | Arrays,
        inputs: tuple[Tensor, ...],
        mode: Literal["train", "eval"],
        seed: Tensor | None = None,
    ) -> Any:
        """See :meth:`fedcl.strategy.Models.apply`."""
        return self.node.apply(module, self.arrays(which), inputs, mode, seed, self.batch_norm)

    def arrays(self, which: str | Arrays) -> Arrays:
        """The arrays of a model by its name, or those that were given."""
        if not isinstance(which, str):
            return which
        if which not in self.named:
            raise RunFailed(f"no model is named {which!r} here; there are {', '.join(sorted(self.named))}")
        return self.named[which]


@dataclass(frozen=True)
class Trained:
    """The outcome of one client's round, or of a phase of it.

    Attributes:
        arrays: parameters and buffers after training.
        steps: optimiser steps taken; 0 when no batch was large enough.
        samples: training images of the client that it learned from, labelled or not.
        dropped: images left out of an epoch by ``drop_last`` and ``batch_min``.
        losses: mean of each loss term over the steps.
        shapes: how many steps had batches of each shape.
        carried: by strategy, what it carried through the steps.
        outcomes: the arrays after each phase with a name.
    """

    arrays: Arrays
    steps: int
    samples: int
    dropped: int
    losses: dict[str, float]
    shapes: Mapping[Shape, int] | Mapping[Kind, int]
    carried: Mapping[str, Arrays] = field(default_factory=dict)
    outcomes: Mapping[str, Arrays] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """One client in one call: everything its hooks may see.

    Attributes:
        phase, place: the part of the round it is in, and its number.
        start: the arrays that the phase starts from; None: ``received``.
        carried: by strategy, what it carries through the steps.
        spent: steps it has taken in earlier phases.
    """

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
    phase: Phase = field(default_factory=Phase)
    place: int = 0
    start: Arrays | None = None
    carried: Mapping[str, Arrays] = field(default_factory=dict)
    spent: int = 0

    @property
    def begins(self) -> Arrays:
        """The arrays that training starts from."""
        return self.received if self.start is None else self.start

    @property
    def trains(self) -> list[str]:
        """The parameters that the phase changes.

        Raises:
            RunFailed: there are none.
        """
        names = [n for n in self.node.trainable if self.phase.trains(n)]
        if not names and self.node.trainable:
            raise RunFailed(f"the phase {self.phase.name!r} of local training trains no parameter of this model")
        return names

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
        late = self.header.limit.get(self.id)
        known = [most for most in (None if late is None else max(late - self.spent, 0), limit) if most is not None]
        return min(known, default=None)

    @property
    def key(self) -> tuple[object, ...]:
        """Names the random streams of this client in this round, and in this phase of it after the first."""
        round_ = (self.node.config.seed, "client", self.id, self.header.task, self.header.round)
        return (*round_, "phase", self.place) if self.place else round_

    def context(
        self,
        strategy: Strategy,
        trained: Trained | None = None,
        trainer: Callable[[Phase], Arrays] | None = None,
    ) -> ClientContext:
        """What the client hooks of one strategy see.

        Args:
            trained: the outcome of the round, for hooks after it.
            trainer: what trains the client, in functions that the server calls.
        """
        node = self.node
        return ClientContext(
            self.id, self.task, self.header.round, self.received, self.down.get(strategy.name, {}),
            self.state.get(strategy.name, {}), self.ids, self.labels, self.known, self.new, self.counts,
            node.store, node.model, self.models, node.config.federation.batch_size,
            node.config.evaluate.batch_size, self.key, heads=self.heads,
            online=node.config.federation.passes == "once", unlabelled=self.unlabelled,
            carried={} if trained is None else trained.carried.get(strategy.name, {}),
            outcomes={} if trained is None else trained.outcomes, strategy=strategy.name, trainer=trainer,
            shared=node.shared,
        )  # fmt: skip
