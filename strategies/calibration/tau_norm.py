"""tau-normalisation: each row of the head is divided by a power of its norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedcl.cards import option
from fedcl.errors import RunFailed, UsageError
from fedcl.strategy import Arrays, Finished, Server

from ._post_hoc import DECOUPLING, PostHoc, Use, head_logits, public_features

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """Rows ``w_c / ||w_c||^tau`` (Kang et al. 2020); a row of zeros stays.

    Args:
        weight: (C, d).
        tau: 0 leaves the rows, 1 gives all of them norm 1.

    >>> tau_normalised(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1.0).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight / torch.where(norms > 0, norms, 1.0) ** tau


class TauNorm(PostHoc):
    """Classifier of norms evened by tau-normalisation, at the end of each task."""

    name = "tau_norm"
    neutral = {"use": "evaluation"}
    card = replace(
        DECOUPLING,
        certainty="Certain: read in the released code; the bias is dropped. tau is chosen on validation images there, "
        "from 0 to 2, and is typically 0.7.",
        server_state="the task of each class",
        cost="Nothing is sent. With `choose=public` one forward pass over the server's images.",
        notes="Needs no data with a given tau; `choose=public` takes the tau of 0, 0.1, ..., 2 with the highest "
        "accuracy on the server's own images (`partition.public`), the smallest of equal ones. A row of zeros stays. "
        "Rows of classes that are not known yet stay, too.",
    )

    @dataclass(frozen=True)
    class Options:
        tau: float = option(0.7, "power of the norm that each row is divided by")
        choose: Literal["given", "public"] = option("given", "tau as given, or the best one on the server's images")
        use: Use = option("evaluation", "what the new head is for: evaluation alone, or the next task starts from it")

        def __post_init__(self) -> None:
            if not 0 <= self.tau <= 10:
                raise ValueError(f"tau must be from 0 to 10, not {self.tau}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            raise UsageError("model.head", config.model.head, f"linear: {self.name} scales the rows of a linear head")
        if self.options.choose == "public" and (split.public is None or not config.labels.public):
            key = "options.tau_norm.choose"
            raise UsageError(key, "public", "needs labelled images at the server: set partition.public")

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        head = {n: a for n, a in self.standing(server).items() if n.startswith("head.")}
        tau = self.options.tau if self.options.choose == "given" else self.best(server, head)
        return self.left(server, self.scaled(head, tau, server.known), server.state, self.options.use)

    def scaled(self, head: Arrays, tau: float, known: Tensor) -> Arrays:
        """The head with rows of known classes normalised and without their bias."""
        weight = head["head.weight"]
        found = {"head.weight": torch.where(known[:, None], tau_normalised(weight, tau), weight)}
        if "head.bias" in head:
            found["head.bias"] = torch.where(known, 0.0, head["head.bias"])
        return found

    def best(self, server: Server, head: Arrays) -> float:
        """The tau of 0, 0.1, ..., 2 that classifies most of the server's images."""
        features, labels = public_features(server, self.standing(server))
        competing = self.among(server, server.known, labels)
        if not len(labels):
            raise RunFailed("tau_norm has no labelled image at the server to choose tau on: set partition.public")

        def correct(tau: float) -> int:
            own = self.scaled(head, tau, server.known)
            logits = head_logits(server.model, own, features)
            return int((torch.where(competing, logits, -torch.inf).argmax(dim=1) == labels).sum())

        return max((round(0.1 * i, 1) for i in range(21)), key=correct)
