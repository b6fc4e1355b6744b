"""What a loss sees: one optimiser step of one client, and the forward passes it may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from . import random as counter
from .batch import Batch
from .masks import own_head

if TYPE_CHECKING:
    from .models.model import Output

Arrays = dict[str, Tensor]
"""Named tensors: a model, a state, an upload."""


def extra_name(strategy: str, module: str) -> str:
    """The dotted name in the model of a module that a strategy added.

    >>> extra_name("simsiam", "predictor")
    'extra.simsiam.predictor'
    """
    return f"extra.{strategy}.{module}"


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

    def apply(
        self,
        module: str,
        which: str | Arrays,
        inputs: tuple[Tensor, ...],
        mode: Literal["train", "eval"],
        seed: Tensor | None = None,
    ) -> Any:
        """The output of one submodule of the model, by its dotted name."""
        ...


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
        carried: what this strategy carries through the steps of the round, see :meth:`Strategy.carry`.
        phase: name of the phase of local training.
        epoch_length: int64 scalar tensor, steps of one local epoch of this client.
        strategy: name of the strategy that sees the step.
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
    carried: Arrays = field(default_factory=dict)
    phase: str = ""
    epoch_length: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.int64))
    strategy: str = ""

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
        arrays, own = self._arrays(which)
        return self.models(x, arrays, mode or ("train" if own else "eval"), taps, self._call_seed())

    def apply(
        self,
        module: str,
        *inputs: Tensor,
        which: str | Arrays = "own",
        mode: Literal["train", "eval"] | None = None,
    ) -> Any:
        """The output of a module that this strategy added to the model (:meth:`Strategy.modules`), by its name there.

        Args:
            which, mode: as in :meth:`forward`.
        """
        arrays, own = self._arrays(which)
        name = extra_name(self.strategy, module)
        return self.models.apply(name, arrays, inputs, mode or ("train" if own else "eval"), self._call_seed())

    def _arrays(self, which: str | Arrays) -> tuple[str | Arrays, bool]:
        own = isinstance(which, str) and which == "own"
        return ({**self.params, **self.buffers} if own else which), own

    def _call_seed(self) -> Tensor:
        counted = self.cache if self.whole is None else self.whole.cache
        calls = counted["calls"] = counted.get("calls", -1) + 1
        seed: Tensor = self.seed + calls
        return seed

    def uniform(self, shape: tuple[int, ...], tag: str) -> Tensor:
        """Numbers in (0, 1) that depend on client, task, round, step and ``tag`` only."""
        return counter.counter_uniform(self.seed, counter.fold(tag), shape, self.x.dtype)

    def normal(self, shape: tuple[int, ...], tag: str) -> Tensor:
        """Standard normal numbers, see :meth:`uniform`."""
        return counter.counter_normal(self.seed, counter.fold(tag), shape, self.x.dtype)

    def integers(self, bound: int, shape: tuple[int, ...], tag: str) -> Tensor:
        """Integers of ``range(bound)``, see :meth:`uniform`."""
        return counter.counter_integers(self.seed, counter.fold(tag), bound, shape)
