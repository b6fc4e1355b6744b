"""What prototype methods have in common: statistics that are pooled exactly, and an encoder that stops learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from fedcl.blocks.closed_form import cosine_scores
from fedcl.blocks.statistics import MOMENT_SUMS, add_moments, class_means, class_moments, class_sums, widen
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, ClientContext, Finished, Models, Phase, Predictor, Server, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream

Adapt = Literal["none", "first", "all"]
ADAPT = "which tasks train the encoder: none of them, the first one, or all"
STATISTICS = (
    ("sums", "classes x features, float64", "sum", "end of a task"),
    ("counts", "classes", "sum", "end of a task"),
)
"""Rows of a card, for what :meth:`Pooled.count` uploads."""


class Pooled(Strategy):
    """Statistics of features by class, taken once a task and added up over clients and tasks.

    Where images are seen once (``federation.passes=once``), those of a round are counted at its end.
    """

    stackable = True
    reductions = {"sums": "sum", "counts": "sum"}
    scatter: ClassVar[bool] = False
    copies: ClassVar[int] = 1

    # client

    def embedded(self, models: Models, arrays: Arrays, kept: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The features of images, (B, copies * d).

        Args:
            arrays: the model.
            kept: what :meth:`sent` sends, at a client, or the server's state.
        """
        return models(x, arrays, "eval").features

    def count(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Sums and counts of this client's features by class; with ``scatter`` their second moments too."""

        def features(x: Tensor) -> Tensor:
            return self.embedded(ctx.models, ctx.received, ctx.down, x)

        classes, width = len(ctx.known), self.copies * ctx.model.feature_dim
        if self.scatter:
            return class_moments(ctx.batches(), features, classes, width, "shared"), ctx.state
        sums, counts = class_sums(ctx.batches(), features, classes, width)
        return {"sums": sums, "counts": counts}, ctx.state

    # server

    def sent(self, server: Server) -> Arrays | None:
        """What clients need beside the model to count."""
        return None

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        return server.arrays, self.counted(server) if server.online else server.state

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        # Where images are seen once they have passed by now, and each was counted in its round.
        return Finished(server.arrays), server.state if server.online else self.counted(server)

    def counted(self, server: Server) -> Arrays:
        """The state with what the clients count now."""
        found = server.exchange(self.count, down=self.sent(server))
        if server.repeats and not server.online:
            # Old images were counted again, by the present encoder: their earlier sums are superseded.
            return {**server.state, **found}
        before = {n: server.state[n] for n in MOMENT_SUMS if n in server.state}
        return {**server.state, **add_moments(before, found)}


class FrozenAfter(Pooled):
    """Pooled statistics of an encoder that learns in no task, in the first one or in all (option ``adapt``)."""

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if self.adapt == "first" and config.time.order != "common":
            allowed = f"must be common with strategy {self.name}, which adapts the encoder in everybody's first task"
            raise UsageError("time.order", config.time.order, allowed)
        if self.adapt != "all" and config.model.head == "simplex":
            allowed = f"not a fixed head: {self.name} trains nothing but the head once the encoder is frozen"
            raise UsageError("model.head", "simplex", allowed)

    @property
    def adapt(self) -> Adapt:
        """Which tasks train the encoder."""
        found: Adapt = self.options.adapt
        return found

    def learns(self, task: int) -> bool:
        """Whether the encoder is trained in a task."""
        return self.adapt == "all" or (self.adapt == "first" and task == 0)

    # client

    def phases(self, ctx: ClientContext) -> Sequence[Phase]:
        return [self.adapting() if self.learns(ctx.task) else Phase("head", trains=of_head, batch_norm="eval")]

    def adapting(self) -> Phase:
        """Local training in the tasks that train the encoder."""
        return Phase("adapt")

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        arrays, state = super().after_aggregate(server)
        if self.learns(server.task):
            return arrays, state
        # A mean of equal arrays may differ from them in the last bit.
        return {n: a if of_head(n) else server.before[n] for n, a in arrays.items()}, state

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        if "counts" not in predictor.state:
            return self.by_head(predictor, x)
        return self.scores(predictor, self.embedded(predictor.models, predictor.arrays, predictor.state, x))

    def by_head(self, predictor: Predictor, x: Tensor) -> Tensor:
        """(B, C) of images before the first statistics."""
        return predictor.forward(x).logits

    def scores(self, predictor: Predictor, features: Tensor) -> Tensor:
        """(B, C) from the features of images and the server's state, once that has statistics."""
        raise NotImplementedError


def of_head(name: str) -> bool:
    """Whether an array of the model is the head's."""
    return name.startswith("head.")


def by_class(predictor: Predictor, name: str) -> Tensor:
    """An array of the server's state with a row for each class that the model knows."""
    return widen(predictor.state[name], len(predictor.known))


def means_of(predictor: Predictor) -> tuple[Tensor, Tensor]:
    """(C, d) float64 means and (C,) counts of all classes that the model knows; means of 0 where there is no image."""
    moments = {n: by_class(predictor, n) for n in ("sums", "counts")}
    return class_means(moments), moments["counts"]


def by_cosine(predictor: Predictor, features: Tensor) -> Tensor:
    """(B, C) cosines of features with the class means."""
    means, counts = means_of(predictor)
    return cosine_scores(features, means.to(features.dtype), counts)
