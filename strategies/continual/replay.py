"""Experience replay: each client keeps exemplars of its own past, within a byte budget, for every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedcl import random as counter
from fedcl.cards import Card, option
from fedcl.memory import Policy, capacity, keep
from fedcl.strategy import Arrays, ClientContext, Finished, Server, Source, Strategy


class Replay(Strategy):
    """Each step sees a batch of the stream and a batch of the client's own memory, with one cross entropy over both."""

    name = "replay"
    aliases = ("er",)
    family = "continual"
    stackable = True
    neutral = {"budget": 0}
    reductions = {"stored": "sum"}
    exemplars = ("ids",)
    card = Card(
        title="On Tiny Episodic Memories in Continual Learning",
        authors="Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr, Ranzato",
        venue="arXiv:1902.10486",
        year=2019,
        bibtex="""@article{chaudhry2019tiny,
  title = {On Tiny Episodic Memories in Continual Learning},
  author = {Chaudhry, Arslan and Rohrbach, Marcus and Elhoseiny, Mohamed and Ajanthan, Thalaiyasingam and
            Dokania, Puneet K. and Torr, Philip H. S. and Ranzato, Marc'Aurelio},
  journal = {arXiv:1902.10486},
  year = {2019}
}""",
        certainty="Certain: a batch of the stream and a batch of the memory, cross entropy over both; "
        "reservoir sampling. "
        "The federated form, one memory a client that never leaves it, is ours and the usual one.",
        leaves_client=(("stored", "1", "sum", "end of a task"),),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        cost="Twice the images a step once the memory is filled. Only the number of stored images leaves a client.",
        notes="A client fills its memory at the end of a task, from its images of that task; where images are seen "
        "once (federation.passes=once), after each round from those of the round, and then the number of stored images "
        "does not leave it. An image costs "
        "one byte a pixel "
        "and channel. `policy=class_balanced` is GDumb's greedy rule. A client without images of the task "
        "does not train, "
        "whatever it remembers.",
    )

    @dataclass(frozen=True)
    class Options:
        budget: int = option(100_000, "largest memory of one client", unit="bytes")
        policy: Policy = option("reservoir", "which images stay: a uniform sample, or equally many of each class")
        batch_size: int = option(0, "memory images a step; 0 takes federation.batch_size", unit="images")

        def __post_init__(self) -> None:
            if self.budget < 0:
                raise ValueError(f"budget must be at least 0 bytes, not {self.budget}")
            if self.batch_size < 0:
                raise ValueError(f"batch_size must be at least 0, not {self.batch_size}")

    # client

    def sources(self, ctx: ClientContext) -> list[Source]:
        if "ids" not in ctx.state:
            return []
        return [Source(ctx.state["ids"].to(ctx.ids.device), self.options.batch_size or ctx.batch_size)]

    def remember(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Offers this task's images to the memory."""
        words = counter.words(len(ctx.ids), *ctx.key, "memory")
        ids, priority = ctx.ids, torch.from_numpy((words >> 1).astype("int64")).to(ctx.ids.device)
        if ctx.state:
            held = ctx.state["ids"].to(ids.device)
            fresh = ~torch.isin(ids, held)  # an image that stands in several tasks takes one place
            ids = torch.cat([held, ids[fresh]])
            priority = torch.cat([ctx.state["priority"].to(ids.device), priority[fresh]])
        limit = capacity(self.options.budget, ctx.store.image_bytes)
        kept = keep(priority, ctx.store.label_tensor[ids], limit, self.options.policy)
        stored = torch.tensor(len(kept), dtype=torch.int64)
        return {"stored": stored}, {"ids": ids[kept], "priority": priority[kept]}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {}, self.remember(ctx)[1] if ctx.online else ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        if server.online:  # the images have passed, each was offered in its round
            return Finished(server.arrays), server.state
        return Finished(server.arrays), server.exchange(self.remember)
