"""Losses that several methods share: pure functions of tensors, one equation each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..strategy import Arrays, cross_entropy

__all__ = ["cross_entropy", "distillation", "nt_xent", "proximal", "quadratic", "supervised_contrastive", "tempered_kl"]


def distillation(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float = 2.0) -> Tensor:
    """Soft cross entropy between tempered softmaxes over ``classes`` (Hinton et al. 2015).

    ``-mean_i sum_c softmax(t_i / T)_c log softmax(s_i / T)_c``; no factor ``T^2``, both softmaxes over
    ``classes`` only.

    Args:
        student: (B, C) logits.
        teacher: (B, C') logits with C' <= C, the same positions; its gradient is stopped.
        classes: (C,) bool mask, at least one class, all of them below C'.

    >>> logits = torch.tensor([[1.0, 1.0, 7.0]])
    >>> round(distillation(logits, logits[:, :2], torch.tensor([True, True, False])).item(), 4)
    0.6931
    """
    width = teacher.shape[-1]
    inside = classes[:width]
    lowest = torch.finfo(student.dtype).min
    target = torch.where(inside, teacher.detach() / temperature, lowest).softmax(dim=-1)
    logs = torch.where(inside, student[..., :width] / temperature, lowest).log_softmax(dim=-1)
    return -torch.where(inside, target * logs, 0.0).sum(dim=-1).mean()


def tempered_kl(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float = 2.0) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` over ``classes``, batch mean (Hinton et al. 2015).

    The gradient is that of ``T^2`` times :func:`distillation`; arguments as there.

    >>> logits = torch.tensor([[1.0, 3.0]])
    >>> tempered_kl(logits, logits, torch.tensor([True, True])).item()
    0.0
    """
    entropy = distillation(teacher.detach(), teacher, classes[: teacher.shape[-1]], temperature)
    return temperature**2 * (distillation(student, teacher, classes, temperature) - entropy)


def proximal(params: Arrays, anchor: Arrays) -> Tensor:
    """``1/2 ||w - w0||^2`` over all parameters (Li et al. 2020, FedProx, equation 2, without mu).

    >>> proximal({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}).item()
    2.0
    """
    return 0.5 * torch.stack([(p - anchor[n]).square().sum() for n, p in params.items()]).sum()


def quadratic(params: Arrays, anchor: Arrays, importance: Arrays) -> Tensor:
    """``1/2 sum_i F_i (w_i - w*_i)^2`` (Kirkpatrick et al. 2017, EWC, equation 3, without lambda).

    Parameters without an importance are free.

    >>> w = {"w": torch.tensor([3.0, 1.0])}
    >>> quadratic(w, {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 0.0])}).item()
    9.0
    """
    terms = [(importance[n] * (p - anchor[n]).square()).sum() for n, p in params.items() if n in importance]
    return 0.5 * torch.stack(terms).sum()


def supervised_contrastive(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """SupCon, the form with the sum outside of the logarithm (Khosla et al. 2020, equation 2).

    Mean over anchors i with a positive of
    ``-1/|P(i)| sum_{p in P(i)} log( exp(s_ip / T) / sum_{a != i} exp(s_ia / T) )``, s the cosine. Positives
    stand in the denominator, so a batch of one class still has a gradient; anchors without a positive are
    left out, and a batch without any positive gives exactly 0.

    Args:
        embeddings: (N, p), N at least 1; normalised here.
        labels: (N,) int64.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(supervised_contrastive(z, torch.tensor([0, 0, 1]), 1.0).item(), 4)
    0.3133
    """
    z = torch.nn.functional.normalize(embeddings, dim=-1)
    similarity = z @ z.mT / temperature
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels[None, :]) & others
    similarity = torch.where(others, similarity, torch.finfo(similarity.dtype).min)
    log_ratio = similarity - similarity.logsumexp(dim=1, keepdim=True)
    count = positive.sum(dim=1)
    per_anchor = -torch.where(positive, log_ratio, 0.0).sum(dim=1) / count.clamp(min=1)
    return per_anchor.sum() / (count > 0).sum().clamp(min=1)


def nt_xent(embeddings: Tensor, views: int, temperature: float = 0.5) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR, equation 1), with the other views of an image as its positives.

    Mean over all rows i of ``-log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) )``, s the cosine and j the other view of
    the image; with more than two views the mean over them. One view alone gives exactly 0.

    Args:
        embeddings: (B, p), the views following each other as blocks of B / views rows; normalised here.
        views: how many there are.

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(nt_xent(z, 2, 1.0).item(), 4)
    0.5514
    """
    images = torch.arange(len(embeddings) // views, device=embeddings.device).repeat(views)
    return supervised_contrastive(embeddings, images, temperature)
