"""Losses that know how often each class occurs: margins on the logits that a long tail or label skew asks for."""

from __future__ import annotations

from torch import Tensor

from ..strategy import cross_entropy

__all__ = ["adjusted", "balanced_softmax", "log_prior"]


def log_prior(counts: Tensor, like: Tensor) -> Tensor:
    """(C,) logarithm of each class's share of the images, a class without an image counting as one with a single image.

    Without that the logarithm of 0 would make the logit of an absent class minus infinity.

    Args:
        counts: (C,) images a class.
        like: a tensor of the wanted type and device.
    """
    floor = counts.clamp(min=1).to(like)
    return (floor / floor.sum()).log()


def adjusted(logits: Tensor, counts: Tensor, strength: float) -> Tensor:
    """``o_c + tau log pi_c`` (Menon et al. 2021): in the loss with tau > 0, after training with -tau.

    >>> import torch
    >>> adjusted(torch.zeros(2), torch.tensor([3, 1]), 1.0).exp().tolist()
    [0.75, 0.25]
    """
    return logits + strength * log_prior(counts, logits)


def balanced_softmax(logits: Tensor, labels: Tensor, counts: Tensor, classes: Tensor) -> Tensor:
    """Balanced softmax: mean cross entropy of ``o_c + log n_c`` (Ren et al. 2020, equation 3).

    A class without an image counts as one with a single image, as in FedETF's code: the logarithm of 0 would make the
    class's logit minus infinity.

    Args:
        logits: (B, C).
        labels: (B,) int64, each in ``classes``.
        counts: (C,) images a class.
        classes: (C,) bool mask, or (B, C) for a mask a sample, of the classes the softmax runs over.

    >>> import torch
    >>> logits = torch.zeros(1, 2)
    >>> label, both = torch.tensor([0]), torch.tensor([True, True])
    >>> round(balanced_softmax(logits, label, torch.tensor([3, 1]), both).item(), 4)  # -log 3/4
    0.2877
    """
    return cross_entropy(adjusted(logits, counts, 1.0), labels, classes)
