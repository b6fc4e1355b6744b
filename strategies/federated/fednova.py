"""FedNova: each client's change is divided by the steps that it stands for, and all are scaled alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcl.blocks.updates import change, plus
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.models.arrays import parameter_names
from fedcl.strategy import Arrays, ClientContext, Server, Step, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def effective_steps(steps: Tensor, momentum: float = 0.0, proximal: float = 0.0) -> Tensor:
    """a: how often the gradients of a round stand in the change that they make, in units of the learning rate.

    Plain SGD: the number of steps J. Momentum m: ``(J - m (1 - m^J) / (1 - m)) / (1 - m)``. A proximal term with
    ``alpha = lr mu``: ``(1 - (1 - alpha)^J) / alpha``.

    Args:
        steps: J, at least 1.
        momentum: m, at least 0 and below 1; 0 beside a proximal term.
        proximal: alpha, at least 0 and at most 1.

    >>> two = torch.tensor(2.0)
    >>> [round(effective_steps(two, *args).item(), 4) for args in ((), (0.5,), (0.0, 0.5))]
    [2.0, 2.5, 1.5]
    """
    if proximal:
        return (1.0 - (1.0 - proximal) ** steps) / proximal
    return (steps - momentum * (1.0 - momentum**steps) / (1.0 - momentum)) / (1.0 - momentum)


class FedNova(Strategy):
    """Clients that take more steps do not pull the global model their way; equal ones are averaged as ever."""

    name = "fednova"
    family = "federated"
    stackable = True
    unlabelled = "sees"
    reductions = {"tau_eff": "weighted_mean"}
    card = Card(
        title="Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
        authors="Wang, Liu, Liang, Joshi, Poor",
        venue="NeurIPS",
        year=2020,
        bibtex="""@inproceedings{wang2020fednova,
  title = {Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization},
  author = {Wang, Jianyu and Liu, Qinghua and Liang, Hao and Joshi, Gauri and Poor, H. Vincent},
  booktitle = {NeurIPS},
  year = {2020}
}""",
        certainty="Textbook rule for plain SGD, momentum and a proximal term; not checked against a released code.",
        leaves_client=(("tau_eff", "1", "weighted_mean", "round"),),
        cost="One number more up.",
        notes="A client sends received + change / a, with a its effective steps; the server multiplies the mean change "
        "by the mean of all a. Clients count as federation.weighting says. Where all take equally many steps the "
        "result is that of averaging, up to rounding (in float32 about 1e-7 times the steps, of a weight of size 1). "
        "The options must say what the optimiser does, which a client's half cannot see; settings that do not fit are "
        "refused. Weight decay counts as part of the gradient. Stragglers with fewer steps "
        "(time.straggler_policy=partial) are what it is for. Statistics of BatchNorm are averaged as they are.",
    )

    @dataclass(frozen=True)
    class Options:
        momentum: float = option(0.9, "momentum of the clients' optimiser, must be optimiser.momentum")
        proximal: float = option(0.0, "learning rate times mu of FedProx where that is in the stack, else 0")

        def __post_init__(self) -> None:
            if not 0 <= self.momentum < 1:
                raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")
            if not 0 <= self.proximal <= 1:
                raise ValueError(f"proximal must be at least 0 and at most 1, not {self.proximal}")
            if self.momentum and self.proximal:
                raise ValueError("no effective steps are known for momentum with a proximal term: one must be 0")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        optimiser, options = config.optimiser, self.options
        if optimiser.name != "sgd":
            raise UsageError("optimiser.name", optimiser.name, "sgd: fednova knows no effective steps of it", ("sgd",))
        if optimiser.nesterov:
            raise UsageError("optimiser.nesterov", True, "false: fednova knows no effective steps of it")
        if optimiser.schedule != "constant" and optimiser.per == "step":
            raise UsageError("optimiser.per", "step", "round or task: fednova needs one learning rate in a round")
        if options.proximal and optimiser.schedule != "constant":
            told = "constant: options.fednova.proximal is for one learning rate"
            raise UsageError("optimiser.schedule", optimiser.schedule, told, ("constant",))
        if options.momentum != optimiser.momentum:
            told = f"must be that of the clients' steps, optimiser.momentum={optimiser.momentum}"
            raise UsageError("options.fednova.momentum", options.momentum, told)
        mu = dict(config.options.get("fedprox") or {}).get("mu", 0.01) if "fedprox" in config.strategy else 0.0
        if not math.isclose(options.proximal, optimiser.lr * mu, rel_tol=1e-6):
            told = f"{optimiser.lr * mu:g}: optimiser.lr times mu of fedprox, 0 without it"
            raise UsageError("options.fednova.proximal", options.proximal, told)

    # client

    def begin_round(self, ctx: ClientContext) -> Arrays:
        return {"steps": torch.zeros((), dtype=torch.float64, device=ctx.ids.device)}

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        return {"steps": step.carried["steps"] + 1}

    def effective(self, ctx: ClientContext) -> Tensor:
        """This client's effective steps of the round."""
        return effective_steps(ctx.carried["steps"], self.options.momentum, self.options.proximal)

    def upload(self, ctx: ClientContext, trained: Arrays) -> Arrays:
        names = [n for n in parameter_names(ctx.model) if n in trained]  # private parts stay here
        moved = change(trained, ctx.received, names)
        return trained | plus({n: ctx.received[n] for n in moved}, moved, 1.0 / self.effective(ctx))

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        return {"tau_eff": self.effective(ctx)}, ctx.state

    # server

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        if "tau_eff" not in server.uploads:
            return server.arrays, server.state
        names = parameter_names(server.model)
        moved = change(server.arrays, server.before, names)
        parameters = plus({n: server.before[n] for n in names}, moved, server.uploads["tau_eff"])
        return server.arrays | parameters, server.state
