"""FedDyn: a linear and a quadratic term at each client, so that the clients' optima agree with the global one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.blocks.losses import proximal
from fedcl.blocks.updates import change, inner, kept, named, plus, under
from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Server, Step, Strategy


def distance(params: Arrays, anchor: Arrays) -> Tensor:
    """``1/2 ||w - w0||_2``, not squared, over all parameters; its gradient at ``w0`` is 0.

    >>> distance({"w": torch.tensor([3.0, 4.0])}, {"w": torch.zeros(2)}).item()
    2.5
    """
    flat = torch.cat([(p - anchor[n]).flatten() for n, p in params.items()])
    length: Tensor = torch.linalg.vector_norm(flat)
    return 0.5 * length


class FedDyn(Strategy):
    """Adds -<h_k, w> + alpha/2 ||w - w_t||^2 to the local loss; the server moves on by the mean of the h_k."""

    name = "feddyn"
    family = "federated"
    stackable = True
    unlabelled = "sees"
    reductions = {"trained": "sum"}
    like_parameters = {"linear": "zero"}
    card = Card(
        title="Federated Learning Based on Dynamic Regularization",
        authors="Acar, Zhao, Matas, Mattina, Whatmough, Saligrama",
        venue="ICLR",
        year=2021,
        bibtex="""@inproceedings{acar2021feddyn,
  title = {Federated Learning Based on Dynamic Regularization},
  author = {Acar, Durmus Alp Emre and Zhao, Yue and Matas, Ramon and Mattina, Matthew and Whatmough, Paul and
            Saligrama, Venkatesh},
  booktitle = {ICLR},
  year = {2021}
}""",
        certainty="Textbook algorithm with the squared norm and the mean over all clients; alpha 0.1, 0.01 and 0.001 "
        "are those that the paper tries. Two other codes (PFLlib, FedETF) leave out the square: `norm=plain`.",
        leaves_client=(("trained", "1", "sum", "round"),),
        client_state="h_k, one model",
        server_state="h, one model",
        cost="One model down and one up; a client keeps one more model from round to round.",
        notes="Clients count the same in the mean, whatever federation.weighting says. "
        "Weight decay and clipping belong to the paper's setting: set optimiser.weight_decay=0.001 and "
        "optimiser.clip; with large steps and many rounds h grows and the model may diverge. In a stream h goes on "
        "from task to task, rows of new classes start at 0. Parameters that clients share only: statistics of "
        "BatchNorm are averaged, private parameters are trained without the terms.",
    )

    @dataclass(frozen=True)
    class Options:
        alpha: float = option(0.01, "weight of the quadratic term, above 0")
        norm: Literal["squared", "plain"] = option("squared", "the quadratic term as published, or without the square")

        def __post_init__(self) -> None:
            if not 0 < self.alpha < float("inf"):
                raise ValueError(f"alpha must be above 0, not {self.alpha}")

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        return named(kept(ctx.state, "linear", {n: ctx.received[n] for n in ctx.shared}), "linear")

    def loss(self, step: Step) -> dict[str, Tensor]:
        linear = under(step.carried, "linear")
        if not linear:
            return {}
        params = {n: step.params[n] for n in linear}
        term = proximal if self.options.norm == "squared" else distance
        return {"linear": -inner(params, linear), "quadratic": self.options.alpha * term(params, step.received)}

    def weight(self, ctx: ClientContext, samples: int, steps: int) -> float:
        return 1.0

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        linear = under(ctx.carried, "linear")
        moved = change(trained, ctx.received, linear)
        return {"trained": torch.tensor(1)}, named(plus(linear, moved, -self.options.alpha), "linear")

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        if "trained" not in server.uploads:
            return server.arrays, server.state
        moved = change(server.arrays, server.before, server.shared)
        old = kept(server.state, "linear", moved)
        linear = plus(old, moved, -self.options.alpha * int(server.uploads["trained"]) / server.num_clients)
        return plus(server.arrays, linear, -1.0 / self.options.alpha), named(linear, "linear")
