"""How many images of each class there are, at a client or at all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fedcl.errors import UsageError
from fedcl.statistics import widen
from fedcl.strategy import Arrays, Broadcast, ClientContext, Server, Step, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream

Counts = Literal["local", "global"]


class Counting(Strategy):
    """A strategy whose loss knows the client's own class counts, or those of all clients and tasks so far."""

    reductions = {"counts": "sum"}

    @property
    def counts(self) -> Counts:
        """Whose images are counted."""
        chosen: Counts = self.options.counts
        return chosen

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if self.counts == "global" and config.federation.passes == "once":
            allowed = "local where federation.passes=once: nobody can count the images of a task before they come"
            raise UsageError(f"options.{self.name}.counts", "global", allowed, ("local",))

    def count(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """This client's labelled images of each class in this task."""
        return {"counts": ctx.counts}, ctx.state

    def begin_task(self, server: Server) -> Arrays:
        if self.counts == "local":
            return server.state
        found = server.exchange(self.count)
        if "counts" not in found:
            return server.state
        if "counts" not in server.state or server.repeats:
            return found
        return {"counts": widen(server.state["counts"], len(server.known)) + found["counts"]}

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast(dict(server.state), scope="task")

    def of(self, step: Step) -> Tensor:
        """(C,) counts that the loss of a step knows."""
        return step.down.get("counts", step.counts)
