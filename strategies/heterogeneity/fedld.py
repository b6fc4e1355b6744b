"""FedLD: a margin-control term at the clients, and updates joined along their principal directions at the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, Server, Step, Strategy


def margin_control(logits: Tensor, classes: Tensor) -> Tensor:
    """``log(1 + ||P||_F^2)`` of a batch's softmax probabilities, which is large where predictions are confident.

    Args:
        logits: (B, C), B at least 1.
        classes: (C,) or (B, C) bool mask of the classes in the softmax.

    >>> round(margin_control(torch.zeros(2, 2), torch.tensor([True, True])).item(), 4)  # log(1 + 2 (1/4 + 1/4))
    0.6931
    """
    lowest = torch.finfo(logits.dtype).min
    return torch.where(classes, logits, lowest).softmax(dim=-1).square().sum().log1p()


def principal_update(updates: Tensor, share: float) -> Tensor:
    """One update from those of m clients: each turned into the leading principal directions, its length kept.

    With ``H = R R^T / m = sum_j S_j e_j e_j^T`` and the directions ``v_j = R^T e_j`` of largest strength S_j, client k
    gives ``sum_j S_j / (sum of all S) ||g_k|| u(proj of g_k on v_j)``, where u makes a vector a unit vector; the result
    is the plain mean over clients. A client that is orthogonal to a direction gives nothing along it.

    Args:
        updates: R, (m, D); row k is the update g_k of a client.
        share: of the m directions that are kept, rounded down, at least one.

    Returns:
        (D,) in the type of ``updates``; 0 where nobody moved.

    >>> principal_update(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), 0.8)
    tensor([3., 0.])
    """
    wide = updates.to(torch.float64)
    clients = len(wide)
    strength, vectors = torch.linalg.eigh(wide @ wide.T / clients)
    strength, vectors = strength.flip(0).clamp(min=0), vectors.flip(1)
    kept = max(1, int(share * clients))
    directions = vectors.T[:kept] @ wide
    length, size = torch.linalg.vector_norm(wide, dim=1), torch.linalg.vector_norm(directions, dim=1)
    along = wide @ directions.T
    # A projection that is only rounding has no direction.
    along = torch.where(along.abs() > 1e-12 * length[:, None] * size, along, 0.0)
    weight = strength[:kept] / strength.sum().clamp(min=torch.finfo(torch.float64).tiny)
    mean = (length[:, None] * along.sign()).mean(dim=0)
    units = directions / size.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    joined: Tensor = (weight * mean) @ units
    return joined.to(updates.dtype)


class FedLD(Strategy):
    """Keeps local predictions from becoming overconfident and joins updates along their common directions."""

    name = "fedld"
    family = "heterogeneity"
    stackable = True
    model_reduction = "stack"
    neutral = {"weight": 0.0, "aggregation": "mean"}
    card = Card(
        title="Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
        authors="Zeng, Guo, Wang, Wang, Zhou, Qu",
        venue="MICCAI",
        year=2024,
        bibtex="""@inproceedings{zeng2024fedld,
  title = {Tackling Data Heterogeneity in Federated Learning via Loss Decomposition},
  author = {Zeng, Shuang and Guo, Pengxin and Wang, Shuai and Wang, Jianbo and Zhou, Yuyin and Qu, Liangqiong},
  booktitle = {MICCAI},
  year = {2024}
}""",
        certainty="Loss and aggregation read in the released code: weight 0.03 is its default (its command for retina "
        "images sets 0.1), 80 % of the directions, an unweighted mean, the plain mean in the first round. The paper "
        "was not available.",
        leaves_client=(("model", "as the parameters, of each client alone", "stack", "round"),),
        cost="The server sees each client's model; m^2 products of a layer's length for m clients. Secure sums cannot "
        "hide single clients.",
        notes="The norm is over the whole batch, so the term's size depends on federation.batch_size. Directions are "
        "found for each parameter array; arrays of one number are averaged. A client's part along a direction has its "
        "whole length, so with several directions the update is not a projection, and it jumps where a client is "
        "nearly orthogonal to one. The softmax of the term runs over the known classes. One client, or updates along "
        "one line, give the plain mean. `aggregation=mean` is federated averaging with federation.weighting.",
        deviations="The released code treats buffers of BatchNorm as updates too; here they are averaged. It divides "
        "by zero where a client does not move or is orthogonal to a direction; here that part is 0. The sign it gives "
        "each direction cancels in the projection and is left out.",
    )

    @dataclass(frozen=True)
    class Options:
        weight: float = option(0.03, "lambda, weight of the margin control")
        aggregation: Literal["svd", "mean"] = option("svd", "principal directions of the updates, or averaging")
        share: float = option(0.8, "share of the directions that are kept, rounded down, at least one")

        def __post_init__(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"weight must be at least 0, not {self.weight}")
            if not 0 < self.share <= 1:
                raise ValueError(f"share must be above 0 and at most 1, not {self.share}")

    # client

    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"margin": self.options.weight * margin_control(step.output.logits, step.among(step.known))}

    # server

    def aggregate(self, server: Server, models: list[Arrays], weights: list[float]) -> tuple[Arrays, Arrays]:
        svd, first = self.options.aggregation == "svd", server.rounds_done == 0
        shares = torch.ones(len(weights)) if svd else torch.tensor(weights, dtype=torch.float64)
        joined = {}
        for name in models[0]:
            start = server.arrays[name]
            updates = torch.stack([m[name] - start for m in models]).flatten(1)
            if svd and not first and start.numel() > 1:
                update = principal_update(updates, self.options.share)
            else:
                share = (shares / shares.sum()).to(updates)
                update = share @ updates
            joined[name] = start + update.view_as(start)
        return joined, server.state
