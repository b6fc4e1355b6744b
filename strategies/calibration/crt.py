"""cRT: the head is drawn anew and trained on class-balanced samples, the encoder being frozen."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedcl import random
from fedcl.strategy import Arrays, Server

from ._balanced import BALANCED, BalancedHead, leaving
from ._post_hoc import keep_rows


class CRT(BalancedHead):
    """Classifier re-training, federated, at the end of each task."""

    name = "crt"
    neutral = {"use": "evaluation"}
    card = replace(
        BALANCED,
        certainty="Read in the released code: frozen encoder, a head drawn anew, class-aware sampling, 10 epochs. "
        "Rate, momentum and weight decay are ours, and so is the federated form: an epoch is an exchange, in which "
        "each image stands as often as makes all classes equal over all clients.",
        leaves_client=leaving("the head"),
        cost="A head down and one up, and a forward pass over the task's images, for each of the epochs.",
        notes="A stage for long-tailed data. Counts of images a class leave the client. Only classes whose images "
        "clients have at the end of a task are trained again, and only these compete; the rows of earlier classes stay "
        "as they are: in a class-incremental stream another stage has to bring old and new rows to one scale.",
    )

    # server

    def start(self, server: Server, head: Arrays, present: Tensor) -> Arrays:
        trained = {f"head.{n}" for n, _ in server.model.head.named_parameters()}
        axes = server.model.head.class_axis
        seed = random.fold(*server.key, self.name, "rows")
        positions = list(range(len(present)))
        fresh: Arrays = {}
        for name in sorted(trained):
            fresh[name] = head[name]
            if name.removeprefix("head.") in axes:
                rows = server.model.head.initial_rows(name.removeprefix("head."), positions, seed).to(head[name])
                fresh[name] = keep_rows(head[name], rows, present)
        return fresh

    def joined(self, head: Arrays, fitted: Arrays, present: Tensor) -> Arrays:
        return {n: keep_rows(head[n], a, present) for n, a in fitted.items()}
