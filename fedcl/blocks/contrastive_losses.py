"""Contrastive losses of several methods: each says who is compared with whom, the sum is the same.

All functions work on cosines and under ``torch.func.vmap``; rows are chosen by masks. A loss without any pair to learn
from is exactly 0, with gradient 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """(N, M) cosines of rows (N, d) and (M, d); 0 for a row of zeros."""
    return F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).mT


def contrast_terms(scores: Tensor, positive: Tensor, among: Tensor) -> Tensor:
    """For anchors i ``-1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{a in A(i)} exp(s_ia) )``; 0 without positives.

    Args:
        scores: (N, M) similarities of anchors and candidates, divided by the temperature.
        positive: (N, M) bool, P; within ``among``.
        among: (N, M) bool, A.

    >>> everybody = torch.ones(2, 2, dtype=torch.bool)
    >>> contrast_terms(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), everybody)
    tensor([0.6931, 0.0000])
    """
    scores = torch.where(among, scores, torch.finfo(scores.dtype).min)
    losses = scores.logsumexp(dim=1, keepdim=True) - scores
    return torch.where(positive, losses, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)


def contrast(scores: Tensor, positive: Tensor, among: Tensor) -> Tensor:
    """Mean of :func:`contrast_terms` over the anchors that have a positive; 0 without any.

    >>> yes = torch.tensor([[True, False]])
    >>> round(contrast(torch.zeros(1, 2), yes, yes | True).item(), 4)
    0.6931
    """
    terms = contrast_terms(scores, positive, among)
    return terms.sum() / positive.any(dim=1).sum().clamp(min=1)


def contrastive_distillation(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """CSD (Barletti et al. 2022): each student feature against those of all students and teachers but itself.

    Positives of an image are the teacher's feature of it and all features of its class; only students are anchors.

    Args:
        student: (B, d).
        teacher: (B, d); its gradient is stopped.
        labels: (B,) int64.

    >>> one = torch.tensor([[1.0, 0.0]])
    >>> contrastive_distillation(one, one, torch.tensor([0])).item()
    0.0
    """
    candidates = torch.cat([student, teacher.detach()])
    itself = torch.eye(len(student), 2 * len(student), dtype=torch.bool, device=student.device)
    same = labels[:, None] == labels.repeat(2)[None, :]
    return contrast(cosines(student, candidates) / temperature, same & ~itself, ~itself)


def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Triplets of each image with its least similar positive and most similar negative (Hermans et al. 2017).

    Mean over the triplets above 0 of ``max(0, s_an - s_ap + margin)``, s the cosine; 0 without any.

    Args:
        features: (B, d).
        labels: (B,) int64.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> batch_hard_triplet(x, torch.tensor([0, 0, 1]), 1.5).item()
    0.5
    """
    s = cosines(features, features)
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    farthest = torch.where(positive, s, 2.0).amin(dim=1)
    nearest = torch.where(same, -2.0, s).amax(dim=1)
    complete = positive.any(dim=1) & ~same.all(dim=1)
    excess = torch.where(complete, nearest - farthest + margin, 0.0).clamp(min=0)
    return excess.sum() / (excess > 0).sum().clamp(min=1)


def feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean_i (1 - cos(f_i, f'_i))`` (Hou et al. 2019, LUCIR, the less-forget constraint; CL2R on its memory).

    Args:
        student: (B, d), at least one row.
        teacher: (B, d); its gradient is stopped.

    >>> feature_distillation(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item()
    0.5
    """
    return (1.0 - (F.normalize(student, dim=-1) * F.normalize(teacher.detach(), dim=-1)).sum(dim=-1)).mean()


def rehearsal_contrast(
    anchors: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, other: Tensor, temperature: float = 0.1
) -> Tensor:
    """Sum over rehearsal images of a contrast whose positives and negatives may come from different models.

    ``sum_k -1/|P(k)| sum_{p in P(k)} log( exp(z_k u_p / T) / [sum_{p in P(k)} exp(z_k u_p / T) + sum_{i in N(k)}
    exp(z_k v_i / T)] )``. With the student's z and v and the teacher's u it is the NSPT loss of COCONUT (Cappellazzo et
    al. 2024).

    Args:
        anchors: (R, p), z.
        positives: (R, p), u.
        negatives: (B, p), v.
        same: (R, R) bool, P.
        other: (R, B) bool, N.

    >>> z, yes = torch.tensor([[1.0, 0.0]]), torch.tensor([[True]])
    >>> round(rehearsal_contrast(z, z, z, yes, yes, 1.0).item(), 4)
    0.6931
    """
    scores = torch.cat([cosines(anchors, positives), cosines(anchors, negatives)], dim=1) / temperature
    positive = torch.cat([same, torch.zeros_like(other)], dim=1)
    return contrast_terms(scores, positive, torch.cat([same, other], dim=1)).sum()


def class_prototypes(embeddings: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Means (C, p) of the rows of each class, 0 for a class without, and how many rows it has, (C,) int64.

    Args:
        embeddings: (B, p).
        labels: (B,) int64.
        classes: C.

    >>> means, counts = class_prototypes(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]), 2)
    >>> means.flatten().tolist(), counts.tolist()
    ([0.0, 2.0], [0, 2])
    """
    member = labels[None, :] == torch.arange(classes, device=labels.device)[:, None]
    counts = member.sum(dim=1)
    return member.to(embeddings.dtype) @ embeddings / counts.clamp(min=1)[:, None], counts


def prototype_equilibrium(first: Tensor, second: Tensor, present: Tensor, temperature: float = 0.5) -> Tensor:
    """OPE (Wei et al. 2023, OnPro): each class's prototype of one view against all others, its other view the positive.

    ``-1/2K sum_i log( exp(p_i p_i' / T) / sum_{a != i} exp(p_i p_a / T) )`` over both views of the K classes present,
    p of unit length. One class alone has nothing to be told from: exactly 0.

    Args:
        first, second: (C, p) prototypes of each view.
        present: (C,) bool.

    >>> p = torch.eye(2)
    >>> round(prototype_equilibrium(p, p, torch.tensor([True, True]), 1.0).item(), 4)
    0.5514
    """
    classes = len(present)
    rows = torch.arange(2 * classes, device=present.device)
    both, there = torch.cat([first, second]), present.repeat(2)
    twin = (rows[:, None] - rows[None, :]).abs() == classes
    among = there[None, :] & (rows[:, None] != rows[None, :])
    return contrast(cosines(both, both) / temperature, twin & there[:, None] & there[None, :], among)


def pair_and_class_contrast(scores: Tensor, labels: Tensor) -> Tensor:
    """OCM (Guo et al. 2022) on new images: a row's positives are its other view and, twice, the rows of its class.

    ``mean_i ( l_i,i' + 2 / |A(i)| sum_{p in A(i), p != i} l_ip )`` with
    ``l_ij = -log( exp(s_ij) / sum_{a != i} exp(s_ia) )``, i' the other view of i and A(i) all rows of its class, itself
    counted.

    Args:
        scores: (2N, 2N), divided by the temperature; row i + N is the other view of row i.
        labels: (2N,) int64.
    """
    count = len(labels)
    rows = torch.arange(count, device=labels.device)
    others = rows[:, None] != rows[None, :]
    pair = (rows[:, None] - rows[None, :]).abs() == count // 2
    same = labels[:, None] == labels[None, :]
    loss = -torch.where(others, scores, torch.finfo(scores.dtype).min).log_softmax(dim=1)
    views = torch.where(pair, loss, 0.0).sum(dim=1)
    classes = torch.where(same & others, loss, 0.0).sum(dim=1) / same.sum(dim=1)
    return (views + 2 * classes).mean()


def class_contrast(scores: Tensor, labels: Tensor) -> Tensor:
    """OCM on replayed images: ``mean_i 1/|A(i)| sum_{p in A(i)} -log( exp(s_ip) / sum_a exp(s_ia) )``.

    A row is among its own positives and candidates. Arguments as in :func:`pair_and_class_contrast`.

    >>> round(class_contrast(torch.zeros(2, 2), torch.tensor([0, 1])).item(), 4)
    0.6931
    """
    same = labels[:, None] == labels[None, :]
    return (torch.where(same, -scores.log_softmax(dim=1), 0.0).sum(dim=1) / same.sum(dim=1)).mean()


def nearer_to_one(one: Tensor, other: Tensor) -> Tensor:
    """Mean of ``-log( exp(s) / (exp(s) + exp(t)) )`` over pairs of similarities, each divided by its temperature.

    MOON (Li et al. 2021) asks it of the global model against the previous local one, FedBR (Guo et al. 2023) of
    pseudo-images against a client's own.

    Args:
        one: (B,) s, B at least 1.
        other: (B,) t.

    >>> round(nearer_to_one(torch.zeros(2), torch.zeros(2)).item(), 4)
    0.6931
    """
    return F.softplus(other - one).mean()
