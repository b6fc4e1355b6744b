"""Losses between features and learned prototypes of classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attraction(prototypes: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """``mean_i (1 - cos(p_{y_i}, f_i))``: moves prototypes alone, as the features' gradient is stopped.

    Args:
        prototypes: (C, d).
        features: (B, d).
        labels: (B,) int64.

    >>> attraction(torch.eye(2), torch.tensor([[0.0, 3.0]]), torch.tensor([0])).item()
    1.0
    """
    return (1 - F.cosine_similarity(prototypes[labels], features.detach(), dim=1)).mean()


def relation_over_samples(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
    """``sum_c KL(P*_c || P_c)``, each P_c the softmax of a prototype's similarities over the samples of the batch.

    Args:
        student: (B, C) similarities of the present features and prototypes.
        teacher: (B, C') those of the earlier ones, C' <= C; its gradient is stopped.
        classes: (C,) bool mask of the prototypes, all of them below C'.
        temperature: tau, which both are divided by.

    >>> s = torch.tensor([[0.0], [0.0]])
    >>> round(relation_over_samples(s, torch.tensor([[9e9], [0.0]]), torch.tensor([True])).item(), 4)
    0.6931
    """
    width = teacher.shape[1]
    target = (teacher.detach() / temperature).log_softmax(dim=0)
    logs = (student[:, :width] / temperature).log_softmax(dim=0)
    divergence = (target.exp() * (target - logs)).sum(dim=0)
    return torch.where(classes[:width], divergence, 0.0).sum()
