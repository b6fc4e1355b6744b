"""SCAFFOLD: control variates of server and clients correct each local gradient for the client's drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedcl.blocks.updates import change, flat, kept, named, plus, shaped, under
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, Broadcast, ClientContext, Server, Step, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


class SCAFFOLD(Strategy):
    """Every step goes along the client's gradient less the client's variate plus the server's."""

    name = "scaffold"
    family = "federated"
    stackable = True
    unlabelled = "sees"
    reductions = {"change/": "sum"}
    like_parameters = {"variate": "zero"}
    tried_with = {"optimiser.momentum": 0.0}
    card = Card(
        title="SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        authors="Karimireddy, Kale, Mohri, Reddi, Stich, Suresh",
        venue="ICML",
        year=2020,
        bibtex="""@inproceedings{karimireddy2020scaffold,
  title = {{SCAFFOLD}: Stochastic Controlled Averaging for Federated Learning},
  author = {Karimireddy, Sai Praneeth and Kale, Satyen and Mohri, Mehryar and Reddi, Sashank J. and
            Stich, Sebastian U. and Suresh, Ananda Theertha},
  booktitle = {ICML},
  year = {2020}
}""",
        certainty="Textbook algorithm, option II for the variates. The paper's options for the server's rate are "
        "from memory.",
        leaves_client=(("change", "as the parameters", "sum", "round"),),
        client_state="its control variate, one model",
        server_state="the mean of all control variates, one model",
        cost="Two models down and two up; a client keeps one more model from round to round and two during one.",
        notes="Clients count the same in the mean, whatever federation.weighting says. Needs plain SGD without "
        "clipping: else the change of the weights is not the sum of the gradients. A new variate is the mean of the "
        "gradients along the client's path, which is what (w - w_k) / (J eta) - c + c_k comes to, for any schedule of "
        "the learning rate; weight decay of the optimiser stays outside of it. "
        "Variates of new classes start at 0. Parameters that clients share only: statistics of BatchNorm are averaged, "
        "private parameters are trained without variates.",
    )

    @dataclass(frozen=True)
    class Options:
        server_lr: float = option(1.0, "eta_g, how far the server follows the mean update")

        def __post_init__(self) -> None:
            if not 0 < self.server_lr < float("inf"):
                raise ValueError(f"server_lr must be above 0, not {self.server_lr}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        optimiser, why = config.optimiser, "for scaffold, whose variates are means of plain gradients"
        if optimiser.name != "sgd":
            raise UsageError("optimiser.name", optimiser.name, f"sgd {why}", ("sgd",))
        if optimiser.momentum:
            raise UsageError("optimiser.momentum", optimiser.momentum, f"0 {why}")
        if optimiser.clip is not None:
            raise UsageError("optimiser.clip", optimiser.clip, f"null {why}")

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        like = {n: ctx.received[n] for n in ctx.shared}
        steps = torch.zeros((), dtype=torch.int64, device=ctx.ids.device)
        sums = {"sum": torch.zeros_like(flat(like)), "steps": steps}
        return named(kept(ctx.state, "variate", like), "variate") | sums

    def edit_gradients(self, step: Step, grads: Arrays) -> Arrays:
        corrected = plus(grads, under(step.carried, "variate"), -1.0)
        return plus(corrected, under(step.down, "variate"))

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        sums = shaped(step.carried["sum"], under(step.carried, "variate"))
        return {**step.carried, "sum": flat(plus(sums, grads)), "steps": step.carried["steps"] + 1}

    def weight(self, ctx: ClientContext, samples: int, steps: int) -> float:
        return 1.0

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        old = under(ctx.carried, "variate")
        new = shaped(ctx.carried["sum"] / ctx.carried["steps"], old)
        return named(change(new, old, new), "change"), named(new, "variate")

    # server

    def broadcast(self, server: Server) -> Broadcast:
        return Broadcast(server.state)

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        found = under(server.uploads, "change")
        if not found:
            return server.arrays, server.state
        old = kept(server.state, "variate", found)
        state = named(plus(old, found, 1.0 / server.num_clients), "variate")
        moved = change(server.arrays, server.before, found)
        return plus(server.arrays, moved, self.options.server_lr - 1.0), state
