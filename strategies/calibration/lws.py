"""LWS: one scale a class is learned on class-balanced samples, encoder and head being frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcl.cards import option
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, ClientContext, Server

from ._balanced import BALANCED, BalancedHead, BalancedOptions, leaving
from ._post_hoc import head_logits

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


class LWS(BalancedHead):
    """Learnable weight scaling, federated, at the end of each task."""

    name = "lws"
    neutral = {"use": "evaluation"}
    card = replace(
        BALANCED,
        certainty="Read in the released code: o_c = s_c (w_c h + b_c) with s_c alone learned on class-aware samples, 5 "
        "epochs. Rate, momentum and no weight decay are ours, and so is the federated form: an epoch is an exchange, "
        "in which each image stands as often as makes all classes equal over all clients.",
        leaves_client=leaving("classes"),
        cost="A head down and a number a class up, and a forward pass over the task's images, for each of the epochs.",
        notes="A stage for long-tailed data. Counts of images a class leave the client. Only classes whose images "
        "clients have at the end of a task get a scale, and only these compete.",
    )

    @dataclass(frozen=True)
    class Options(BalancedOptions):
        epochs: int = option(5, "class-balanced epochs of all clients, each one an exchange")
        weight_decay: float = option(0.0, "weight decay of the scales")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            raise UsageError("model.head", config.model.head, f"linear: {self.name} scales the rows of a linear head")

    # client

    def logits(self, ctx: ClientContext, head: Arrays, fitted: Arrays, features: Tensor) -> Tensor:
        return fitted["scale"] * head_logits(ctx.model, head, features)

    # server

    def start(self, server: Server, head: Arrays, present: Tensor) -> Arrays:
        return {"scale": torch.ones_like(head["head.weight"][:, 0])}

    def joined(self, head: Arrays, fitted: Arrays, present: Tensor) -> Arrays:
        scale = torch.where(present, fitted["scale"], 1.0)
        return {n: a * scale.view(-1, *[1] * (a.dim() - 1)) for n, a in head.items()}
