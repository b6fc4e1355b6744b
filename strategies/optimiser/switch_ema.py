"""Switch EMA: a running average of the weights, which local training goes on from after every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Step, Strategy


def averaged(average: Tensor, weights: Tensor, momentum: float) -> Tensor:
    """``(1 - m) average + m weights``, the exponential moving average after one more step.

    >>> averaged(torch.tensor(0.0), torch.tensor(2.0), 0.25).item()
    0.5
    """
    return (1.0 - momentum) * average + momentum * weights


class SwitchEMA(Strategy):
    """After each local epoch the weights are set to their average so far; optimiser and average go on unchanged."""

    name = "switch_ema"
    aliases = ("sema",)
    family = "optimiser"
    stackable = True
    unlabelled = "sees"
    neutral = {"momentum": 1.0}
    card = Card(
        title="Switch EMA: A Free Lunch for Better Flatness and Sharpness",
        authors="Li, Liu, Tian, Wang, Wang, Jin, Wu, Tan, Lin, Liu, Sun, Li",
        venue="arXiv:2402.09240",
        year=2024,
        bibtex="""@article{li2024switch,
  title = {Switch {EMA}: A Free Lunch for Better Flatness and Sharpness},
  author = {Li, Siyuan and Liu, Zicheng and Tian, Juanxi and Wang, Ge and Wang, Zedong and Jin, Weiyang and Wu, Di and
            Tan, Cheng and Lin, Tao and Liu, Yang and Sun, Baigui and Li, Stan Z.},
  journal = {arXiv:2402.09240},
  year = {2024}
}""",
        certainty="Read in the released code: average after every step, switch at the start of every epoch. "
        "The place in federated learning is ours: the average starts at the received model in each round, "
        "and what leaves a client is its average.",
        cost="One more copy of the weights at the client during a round.",
        notes="momentum is the weight of the new weights (the release's 0.0002 is a decay of 0.9998, made "
        "for epochs of thousands of steps): with few local steps the average hardly leaves the received "
        "model; try 0.1. Only parameters are averaged; statistics of BatchNorm are those of training. With "
        "momentum=1 it is plain training.",
    )

    @dataclass(frozen=True)
    class Options:
        momentum: float = option(2e-4, "weight of the present weights in the average after a step")
        interval: int = option(
            1, "local epochs between switches; 0: never, the average is only what leaves", unit="epochs"
        )

        def __post_init__(self) -> None:
            if not 0 < self.momentum <= 1:
                raise ValueError(f"momentum must be above 0 and at most 1, not {self.momentum}")
            if self.interval < 0:
                raise ValueError(f"interval must be at least 0, not {self.interval}")

    def begin_round(self, ctx: ClientContext) -> Arrays:
        return {n: ctx.received[n] for n, _ in ctx.model.named_parameters()}

    def switches(self, step: Step) -> Tensor:
        """Whether the weights are set to their average after this step, a bool scalar."""
        if not self.options.interval:
            return torch.zeros_like(step.index, dtype=torch.bool)
        now: Tensor = (step.index + 1) % (step.epoch_length * self.options.interval) == 0
        return now

    def after_step(self, step: Step, params: Arrays) -> Arrays:
        now, momentum = self.switches(step), self.options.momentum
        return {n: torch.where(now, averaged(step.carried[n], p, momentum), p) for n, p in params.items()}

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        # After a switch the weights are the new average already.
        now, momentum = self.switches(step), self.options.momentum
        moved = {n: torch.where(now, p, averaged(step.carried[n], p, momentum)) for n, p in params.items()}
        return {**step.carried, **moved}

    def upload(self, ctx: ClientContext, trained: Arrays) -> Arrays:
        return {n: ctx.carried.get(n, a) for n, a in trained.items()}
