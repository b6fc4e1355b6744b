"""What a strategy author writes: one class with both halves, client and server, of one algorithm.

Every hook has a neutral default, so the simplest strategy is a class with a name. Strategies stack: loss terms
of all of them add up, server hooks run in the order of the stack, and the **exclusive slots** (`task_loss`,
`phases`, `weight`, `round`, `aggregate`, `personal`, `newcomer`, `predict`) may be claimed by one strategy only. Hooks
take state and return state; nothing is kept on ``self`` but the options.

Reading order: :class:`Strategy`, then :class:`Step` (what a loss sees), :class:`ClientContext` (what the other client
hooks see) and :class:`Server` (what the server hooks see).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch as Batch
from .batch import Source as Source
from .cards import Card
from .contexts import Broadcast as Broadcast
from .contexts import ClientContext as ClientContext
from .contexts import Finished as Finished
from .contexts import Phase as Phase
from .contexts import Predictor as Predictor
from .contexts import Scope as Scope
from .contexts import Server as Server
from .step import Arrays as Arrays
from .step import Models as Models
from .step import Step as Step

if TYPE_CHECKING:
    from .config import Config
    from .local.optim import Group
    from .models.model import FedModel
    from .stream import Split, Stream

Reduction = Literal["sum", "mean", "weighted_mean", "masked_mean", "max", "min", "stack"]
Sharing = Literal["shared", "private", "frozen"]
Unlabelled = Literal["ignores", "sees", "learns"]


@dataclass(frozen=True)
class NoOptions:
    """A strategy without options."""


class Strategy:
    """Base of all strategies; every hook's default is neutral.

    Class attributes:
        name: as on the command line.
        Options: frozen dataclass of settings, defaults as published.
        card: paper, state, what leaves a client, certainty.
        needs_projector: the model gets a projector when the settings say ``auto``.
        needs_previous: clients get the global model of the previous task's end as ``stage:previous``.
        reductions: how each array that leaves a client is reduced at the server.
        model_reduction: ``weighted_mean``; ``stack`` when `aggregate` needs each client's model; ``masked_mean``, where
            what `upload` sets to NaN does not leave the client: each entry is the mean over those who send it, and
            stays as it was where nobody does. Anything but the first claims the slot `aggregate`.
        like_parameters: state names ``NAME/parameter`` that grow with the head: new rows are ``zero`` or ``initial``.
        centralised: a bound that pools data; its bytes are undefined.
        repeats: a bound whose tasks hold images of earlier tasks again.
        revisits: why a task's images are needed again after its last round; refused where images are seen once.
        common_clock: why all clients must have the same task at a time; refused where they have tasks of their own.
        yields: exclusive slots that this strategy leaves to another one that claims them; options may decide.
        exemplars: names of states, at clients or at the server, that are images kept: rows of the store (M,), or the
            images themselves.
        unlabelled: what its ``loss``, ``edit_gradients`` and ``after_step`` do with images whose labels are hidden:
            ``ignores``: they get the labelled images alone, and are left out at a step without any;
            ``sees``: they get all images and cope with the label -1, as a term of the parameters alone does;
            ``learns``: they get all images and learn from those without labels, so that a client can train on these.
            ``task_loss`` always gets the labelled images alone.
        stackable: declares that clients may be trained as one stacked model. Without it a strategy is tried out, and
            trained one by one where the two differ; with it a difference is an error.
        predicts_by_state: `predict` reads the client's own state, so that each client is tested by itself.
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
    yields: tuple[str, ...] = ()
    exemplars: ClassVar[tuple[str, ...]] = ()
    unlabelled: ClassVar[Unlabelled] = "ignores"
    stackable: ClassVar[bool] = False
    predicts_by_state: ClassVar[bool] = False
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

    def share(self, name: str, model: FedModel) -> Sharing:
        """Whether an array of the model is ``shared`` (averaged), ``private`` (stays at a client) or ``frozen``."""
        return "shared"

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        """More modules of the model, by name: predictors, projections, embeddings of classes.

        Their arrays are named ``extra.STRATEGY.NAME.*`` and are trained, averaged and stored as all others; the
        strategy calls them with :meth:`Step.apply`. They are drawn under a seed of their own. One with an axis of
        classes follows :class:`fedcl.models.heads.ClassArrays`, and grows with the head.
        """
        return {}

    def groups(self) -> Sequence[Group]:
        """Optimiser settings of some parameters; the first group of the stack that takes a name decides."""
        return ()

    # at a client, in this order within a round

    def begin_round(self, ctx: ClientContext) -> Arrays:
        """What is carried through the steps of the round, read as ``step.carried``.

        Names and shapes are the same at all clients, with zeros where a client has no state yet: also the way to read
        its state in a step, so that clients with and without one can be trained as one stack.
        """
        return {}

    def phases(self, ctx: ClientContext) -> Sequence[Phase]:
        """Exclusive. The parts of the round's local training, at least one; by default all parameters, once."""
        return (Phase(),)

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

    def rate(self, step: Step) -> Tensor:
        """A scalar factor on the learning rate of this step; those of several strategies multiply."""
        return torch.ones((), dtype=step.x.dtype, device=step.x.device)

    def edit_gradients(self, step: Step, grads: Arrays) -> Arrays:
        """Gradients by parameter name, after clipping: projections, masks, control variates."""
        return grads

    def after_step(self, step: Step, params: Arrays) -> Arrays:
        """Parameters after the optimiser's update: clamps, projections."""
        return params

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        """What goes on to the next step, of the names and shapes of ``step.carried``: traces, averages of weights.

        Args:
            grads: of the loss, after clipping and before `edit_gradients`.
            params: after this step; ``step.params`` are those before it.
        """
        return step.carried

    def upload(self, ctx: ClientContext, trained: Arrays) -> Arrays:
        """The model's arrays as they leave the client, of the same names and shapes."""
        return trained

    def weight(self, ctx: ClientContext, samples: int, steps: int) -> float:
        """Exclusive. What a client counts for in weighted means, above 0; by default ``federation.weighting`` says."""
        raise NotImplementedError

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

    def round(self, server: Server) -> tuple[Arrays, Arrays]:
        """Exclusive. In place of the default round, made of exchanges: (global model, server state)."""
        raise NotImplementedError

    def aggregate(self, server: Server, models: list[Arrays], weights: list[float]) -> tuple[Arrays, Arrays]:
        """Exclusive. Parameters from each client's (``model_reduction = "stack"``), and the new server state."""
        raise NotImplementedError

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        """After each round: (global model, server state)."""
        return server.arrays, server.state

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        """After a task's last round: (model, server state). Statistics, calibration, generators."""
        return Finished(server.arrays), server.state

    def personal(self, arrays: Arrays, state: Arrays) -> Arrays:
        """Exclusive. The model that a client itself uses, from the global one with its private parts and its state."""
        return arrays

    def newcomer(self, predictor: Predictor, images: Iterable[tuple[Tensor, Tensor]]) -> Arrays:
        """Exclusive. The model of a client that never trains (``partition.held_out``), by default the global one.

        Asked where such a client has test images of its own.

        Args:
            predictor: the global model, with this strategy's state at the server.
            images: (images, labels) of the client's training images of the latest task of which it holds any.
        """
        return predictor.arrays

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
