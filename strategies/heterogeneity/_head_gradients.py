"""Gradients of the cross entropy in the rows of a linear head, by class, and how far two sets of them are apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """(..., C) of the logits' type, zeros for a label of -1."""
    return (labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)).to(logits.dtype)


def head_errors(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """``softmax(o) - e_y``, the slope of the cross entropy in the logits (..., C).

    Args:
        classes: bool, (..., C) or fewer axes, what the softmax runs over.
    """
    inside = torch.where(classes, logits, torch.finfo(logits.dtype).min)
    return inside.softmax(dim=-1) - one_hot(labels, logits)


def class_gradients(features: Tensor, logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Gradients of the cross entropy in the rows of a linear head, summed over the images of each class.

    ``G_y += (softmax(o) - e_y) z^T`` for an image of class y.

    Args:
        features: (B, d).
        logits: (B, C).
        labels: (B,) int64, each in ``classes``.
        classes: (C,) or (B, C) bool, what the softmax runs over.

    Returns:
        (C, C, d): by class of the image, then by row of the head.

    >>> class_gradients(torch.ones(1, 1), torch.zeros(1, 2), torch.tensor([1]), torch.tensor([True, True]))[1].tolist()
    [[0.5], [-0.5]]
    """
    errors = head_errors(logits, labels, classes)
    return torch.einsum("bk,bc,bd->kcd", one_hot(labels, logits), errors, features)


def gradient_distance(one: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    """``sum_k sum_c 1 - cos(one_kc, other_kc)``, as for dataset condensation.

    Args:
        one, other: (K, C, d) gradients of a head's rows by class.
        rows: (K, C) bool, the rows that count.

    >>> g = torch.eye(2)[None]
    >>> round(gradient_distance(g, g.flip(1), torch.tensor([[True, True]])).item(), 4)
    2.0
    """
    norms = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    # As in dataset condensation's code: a gradient of zeros is at distance 1 from all, with a finite slope.
    distance = 1 - (one * other).sum(dim=-1) / (norms + 1e-6)
    return torch.where(rows, distance, 0.0).sum()


def mean_gradients(features: Tensor, own: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    """Mean gradients of the cross entropy in a head's rows, (K, C, d), of m features of each of K classes.

    Args:
        features: (K, m, d).
        own: (K,) int64, their classes.
        weight, bias: (C, d) and (C,) of the head.
        classes: (K, C) bool, what the softmax runs over.
    """
    errors = head_errors(F.linear(features, weight, bias), own[:, None].expand(features.shape[:2]), classes[:, None])
    return torch.einsum("kmc,kmd->kcd", errors, features) / features.shape[1]
