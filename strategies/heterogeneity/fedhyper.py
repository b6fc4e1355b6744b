"""FedHyper: learning rates of server and clients follow the inner products of successive updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.blocks.updates import change, flat, inner, named, plus, under
from fedcl.cards import Card, option
from fedcl.models.arrays import parameter_names
from fedcl.strategy import Arrays, Broadcast, ClientContext, Server, Step, Strategy

LIMITS = {"g": (-0.8, 4.0), "gm": (-0.2, 4.0), "full": (-0.2, 4.0)}
"""Smallest and largest h by mode; alpha is 1 + h."""


def hypergradient(product: Tensor, normalise: bool) -> Tensor:
    """What is added to h: the inner product of two updates, or ``1 / (1 + exp(-product / 10))``.

    >>> hypergradient(torch.tensor(0.0), True).item(), hypergradient(torch.tensor(2.0), False).item()
    (0.5, 2.0)
    """
    return torch.sigmoid(0.1 * product) if normalise else product


def client_factor(
    factor: Tensor, to_global: Tensor, to_last: Tensor, clients: Tensor, lowest: float, highest: float
) -> Tensor:
    """``clip(b min(1.1, 1 + 0.1 <d, Delta> / m + <d, d_last>))``, the factor on a client's learning rate after a step.

    Args:
        factor: b so far.
        to_global: <d, Delta>, the step's change with the last global update.
        to_last: <d, d_last>, with the change of the step before.
        clients: m, clients of the round.

    >>> one = torch.tensor(1.0)
    >>> [round(client_factor(one, torch.tensor(x), one * 0, one, 0.1, 10.0).item(), 4) for x in (0.5, 9.0, -9.0)]
    [1.05, 1.1, 0.1]
    """
    gamma = (1.0 + 0.1 * to_global / clients + to_last).clamp(max=1.1)
    return (factor * gamma).clamp(lowest, highest)


class FedHyper(Strategy):
    """Steps grow while updates agree and shrink when they turn back: at the server, at the clients, or at both."""

    name = "fedhyper"
    family = "heterogeneity"
    stackable = True
    unlabelled = "sees"
    like_parameters = {"delta": "zero", "momentum": "zero"}
    card = Card(
        title="FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with "
        "Hypergradient Descent",
        authors="Wang, Wang, Li",
        venue="ICLR",
        year=2024,
        bibtex="""@inproceedings{wang2024fedhyper,
  title = {{FedHyper}: A Universal and Robust Learning Rate Scheduler for Federated Learning with Hypergradient
           Descent},
  author = {Wang, Ziyao and Wang, Jianyu and Li, Ang},
  booktitle = {ICLR},
  year = {2024}
}""",
        certainty="All rules read in the released code, which calls gm the recommended one; the paper was not "
        "available.",
        server_state="the last global update, and its momentum (one or two models), and h",
        cost="sl: one number more down. cl, full: one model more down, and a client keeps one more during a round.",
        notes="h adds up inner products of successive mean changes, so its size depends on the number of parameters, "
        "the learning rate and the steps of a round: see that it does not sit at a limit all the time. In the first "
        "round alpha is 1. `normalise` bounds what is added, as a line commented out in the released code does; it is "
        "always positive, so that h can only grow. In a stream the last update goes on from task to task, with 0 for "
        "rows of new classes.",
        deviations="Released: sl is clipped to learning rates of 0.001 to 0.1, which are a tenth and ten times the "
        "0.01 used there; here `lowest` and `highest` are factors on optimiser.lr. There what sl sets is lost when "
        "the next round starts; here it lasts. There clients leave the rate as it is after the first step of each "
        "epoch, and compare the second with the global update; here every step counts, and the first of a round has "
        "no step before it.",
    )

    @dataclass(frozen=True)
    class Options:
        mode: Literal["g", "gm", "sl", "cl", "full"] = option(
            "gm", "g: server rate; gm: with momentum; sl: the server sets local rates; cl: clients do; full: gm and cl"
        )
        normalise: bool = option(False, "squash the inner products of updates, in g, gm, sl and full")
        lowest: float = option(0.1, "least factor on the clients' learning rate, in sl, cl and full")
        highest: float = option(10.0, "largest factor on the clients' learning rate, in sl, cl and full")

        def __post_init__(self) -> None:
            if not 0 < self.lowest <= 1 <= self.highest < float("inf"):
                raise ValueError(f"lowest and highest must be above 0 and around 1, not {self.lowest}, {self.highest}")

    @property
    def local(self) -> bool:
        """Whether clients adapt their own rates."""
        return self.options.mode in ("cl", "full")

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        if not self.local:
            return {}
        like = {n: ctx.received[n] for n in parameter_names(ctx.model)}
        one = torch.ones((), dtype=next(iter(like.values())).dtype, device=ctx.ids.device)
        return {"factor": one, "last": flat({n: torch.zeros_like(a) for n, a in like.items()})}

    def rate(self, step: Step) -> Tensor:
        if self.local:
            return step.carried["factor"]
        return step.down["factor"].to(step.x.dtype) if "factor" in step.down else super().rate(step)

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        if not self.local:
            return step.carried
        before, options = step.carried["factor"], self.options
        moved = change(params, step.params, params)
        # In an order of its own: that of a step's parameters depends on which of them the phase trains.
        path = flat({n: moved.get(n, torch.zeros_like(step.params[n])) for n in sorted(step.params)})
        to_last = (path * step.carried["last"]).sum()
        known = "clients" in step.down  # from the second round on
        to_global = inner(moved, under(step.down, "delta")) if known else torch.zeros_like(before)
        clients = step.down["clients"] if known else torch.ones_like(before)
        factor = client_factor(before, to_global, to_last, clients, options.lowest, options.highest)
        return {"factor": factor.to(before.dtype), "last": path}

    # server

    def broadcast(self, server: Server) -> Broadcast:
        delta = named(under(server.state, "delta"), "delta")
        if self.local and delta:
            return Broadcast({"clients": torch.tensor(len(server.cohort))} | delta)
        if self.options.mode == "sl" and "h" in server.state:
            factor = (1.0 + server.state["h"]).clamp(self.options.lowest, self.options.highest)
            return Broadcast({"factor": factor})
        return Broadcast({})

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        mode, names = self.options.mode, parameter_names(server.model)
        delta = change(server.arrays, server.before, names)
        if not any(bool(a.any()) for a in delta.values()):  # nobody trained: nothing to go by
            return server.arrays, server.state
        if mode == "cl":
            return server.arrays, named(delta, "delta")
        last = under(server.state, "momentum" if mode in ("gm", "full") else "delta")
        h = server.state.get("h", torch.zeros((), dtype=torch.float64))
        arrays, momentum = server.arrays, delta
        if last:
            wide = {n: a.to(torch.float64) for n, a in delta.items()}
            h = h + hypergradient(inner(wide, last), self.options.normalise)
            h = h.clamp(*LIMITS[mode]) if mode in LIMITS else h
            arrays = arrays if mode == "sl" else plus(arrays, delta, h)
            if mode in ("gm", "full"):
                arrays, momentum = plus(arrays, last, 0.9 * h), plus(delta, last, 0.9)
        kept = {"g": ("delta",), "sl": ("delta",), "gm": ("momentum",), "full": ("delta", "momentum")}[mode]
        states = {"delta": delta, "momentum": momentum}
        return arrays, {"h": h} | {n: a for part in kept for n, a in named(states[part], part).items()}
