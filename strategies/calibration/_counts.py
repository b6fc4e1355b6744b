"""How many images of each class there are, at a client or at all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedcl.blocks.statistics import widen
from fedcl.errors import UsageError
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
        found = server.exchange(self.count).get("counts")
        earlier = server.state.get("counts", torch.zeros(0, dtype=torch.int64, device=server.known.device))
        earlier = widen(earlier, len(server.known))
        if found is None:  # nobody who was reached has images of this task
            return {"counts": earlier}
        return {"counts": found if server.repeats else earlier.to(found.device) + found}

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast(dict(server.state), scope="task")

    def of(self, step: Step) -> Tensor:
        """(C,) counts that the loss of a step knows."""
        return step.down.get("counts", step.counts)
