"""SI: a quadratic penalty, weighed by how much each parameter has lowered the loss on its way through a task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Finished, Server, Step

from ._penalty import Penalty, PenaltyOptions, part


def work(gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """``-g (w' - w)``: by how much, to first order, a parameter's step has lowered the loss (Zenke et al. 2017).

    >>> work(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5])).tolist()
    [1.0]
    """
    return -gradient * (after - before)


def consolidated(path: Tensor, moved: Tensor, damping: float) -> Tensor:
    """``max(0, omega) / (Delta^2 + xi)``, the importance that one task adds (Zenke et al. 2017).

    >>> consolidated(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0]), 1.0).tolist()
    [0.10000000149011612, 0.0]
    """
    return path.clamp(min=0) / (moved.square() + damping)


class SI(Penalty):
    """Synaptic intelligence; the path integral is the clients' mean, summed over the rounds of a task."""

    name = "si"
    reductions = {"path/": "weighted_mean"}
    like_parameters = {"importance": "zero", "anchor": "initial", "path": "zero"}
    scale = 2.0
    card = Card(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        venue="ICML",
        year=2017,
        bibtex="""@inproceedings{zenke2017si,
  title = {Continual Learning Through Synaptic Intelligence},
  author = {Zenke, Friedemann and Poole, Ben and Ganguli, Surya},
  booktitle = {ICML},
  year = {2017}
}""",
        certainty="Path integral, importance and penalty c sum Omega (w - w*)^2 certain; c = 0.1 and xi = 0.1 are the "
        "specification's (the paper tunes c by data set). The federated form is ours and a heuristic: work done at "
        "clients, divided by how far the global model moved in the task.",
        leaves_client=(("path", "as the parameters", "weighted_mean", "round"),),
        server_state="importance, anchor and path integral of the task, three models",
        cost="One more model up per client and round, two down per client and task; a product per parameter and step.",
        notes="The gradient is that of the whole loss, clipped, as in Avalanche; the authors' code leaves the "
        "penalty's part out. A client's work counts in the rounds it takes part in, so that no state stays at a "
        "client. Rows of new classes have importance 0: they are free. Avalanche has xi = 1e-7, half the penalty and "
        "caps the importance at 0.001.",
    )

    @dataclass(frozen=True)
    class Options(PenaltyOptions):
        weight: float = option(0.1, "strength c of the penalty c sum Omega (w - w*)^2")
        damping: float = option(0.1, "xi, keeps the importance of what has hardly moved finite")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.damping < float("inf"):
                raise ValueError(f"damping must be above 0, not {self.damping}")

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        return {f"path/{n}": torch.zeros_like(ctx.received[n]) for n in ctx.shared}

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        done = {n: work(g, step.params[n], params[n]) for n, g in grads.items()}
        return {n: a + done.get(n.removeprefix("path/"), 0.0) for n, a in step.carried.items()}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return dict(ctx.carried), ctx.state

    # server

    def begin_task(self, server: Server) -> Arrays:
        anchor = {f"anchor/{n}": server.arrays[n] for n in server.shared}
        return {n: a for n, a in server.state.items() if n.startswith("importance/")} | anchor

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        path = {n: server.state[n] + a if n in server.state else a for n, a in server.uploads.items()}
        return server.arrays, {**server.state, **path}

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        old, anchor = part(server.state, "importance"), part(server.state, "anchor")
        state = {f"anchor/{n}": a for n, a in anchor.items()}
        for name, path in part(server.state, "path").items():
            added = consolidated(path, server.arrays[name] - anchor[name], self.options.damping)
            state[f"importance/{name}"] = old[name] + added if name in old else added
        return Finished(server.arrays), {f"importance/{n}": a for n, a in old.items()} | state
