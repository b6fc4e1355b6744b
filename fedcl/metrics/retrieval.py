"""Retrieval by cosine similarity: Recall@K and mAP@R, as sums over queries that add up exactly over parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024


@dataclass(frozen=True)
class Retrieval:
    """Sums over queries that have at least one image of their class to find; merged with ``+``.

    Attributes:
        queries: how many queries.
        hits: by K, the queries with one of their class among the K nearest.
        precision: sum of the queries' average precisions at R.
    """

    queries: int
    hits: dict[int, int]
    precision: float

    def __add__(self, other: Retrieval) -> Retrieval:
        """Sums over the queries of both.

        Raises:
            ValueError: they count hits for different K.
        """
        if self.hits.keys() != other.hits.keys():
            raise ValueError(f"hits at {sorted(self.hits)} and at {sorted(other.hits)} do not add up")
        hits = {k: count + other.hits[k] for k, count in self.hits.items()}
        return Retrieval(self.queries + other.queries, hits, self.precision + other.precision)

    def recall(self, k: int) -> float | None:
        """Recall@K: share of the queries with one of their class among the K nearest; None without queries.

        Source: Oh Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016.
        """
        return self.hits[k] / self.queries if self.queries else None

    def map_at_r(self) -> float | None:
        """Mean over queries of ``1/R sum_{i<=R} P(i) rel(i)``, R the images of the query's class; None without queries.

        Source: Musgrave et al., A Metric Learning Reality Check, ECCV 2020.
        """
        return self.precision / self.queries if self.queries else None


def retrieve(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    own: Tensor | None = None,
    ks: tuple[int, ...] = (1,),
) -> Retrieval:
    """Looks up every query in the gallery.

    A query whose class is not in the gallery (itself apart) cannot succeed, and is not counted.

    Args:
        queries: (N, d) with labels (N,) int64.
        gallery: (M, d) with labels (M,) int64.
        own: the row of the gallery that is the query itself and is not to be found, (N,) int64; None where queries are
            not in the gallery.
        ks: the K of Recall@K, each at least 1; beyond the size of the gallery, all of it is looked at.

    >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    >>> found = retrieve(x, y, x, y, torch.arange(3))
    >>> found.queries, found.recall(1), found.map_at_r()
    (2, 1.0, 1.0)
    """
    if min(ks) < 1:
        raise ValueError(f"K is at least 1; got {ks}")
    itself = 0 if own is None else 1
    others = len(gallery) - itself
    found = Retrieval(0, dict.fromkeys(ks, 0), 0.0)
    if not len(queries) or others < 1:
        return found
    classes = 1 + int(torch.maximum(query_labels.max(), gallery_labels.max()))
    relevant = torch.bincount(gallery_labels, minlength=classes)[query_labels] - itself
    depth = min(max(int(relevant.max()), *ks, 1), others)
    unit = F.normalize(gallery, dim=1)
    places = torch.arange(1, depth + 1, device=gallery.device)
    for rows in torch.split(torch.arange(len(queries), device=gallery.device)[relevant > 0], _ROWS):
        similarity = F.normalize(queries[rows], dim=1) @ unit.T
        if own is not None:
            similarity.scatter_(1, own[rows, None], -torch.inf)
        hits = gallery_labels[similarity.topk(depth, dim=1).indices] == query_labels[rows, None]
        counted = hits & (places <= relevant[rows, None])
        precision = (counted.cumsum(1) / places.to(torch.float64) * counted).sum(1) / relevant[rows]
        ranks = torch.where(hits.any(1), hits.int().argmax(1) + 1, depth + 1)
        reached = {k: int((ranks <= min(k, depth)).sum()) for k in ks}
        found += Retrieval(len(rows), reached, float(precision.sum()))
    return found


def recall_at_1(
    queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, own: Tensor | None = None
) -> float | None:
    """Recall@1 as of :func:`retrieve`, at a fraction of its cost; None without queries.

    >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    >>> recall_at_1(x, y, x, y, torch.arange(3))
    1.0
    """
    itself = 0 if own is None else 1
    if not len(queries) or len(gallery) <= itself:
        return None
    classes = 1 + int(torch.maximum(query_labels.max(), gallery_labels.max()))
    counted = torch.bincount(gallery_labels, minlength=classes)[query_labels] > itself
    unit = F.normalize(gallery, dim=1)
    hits = 0
    for rows in torch.split(torch.arange(len(queries), device=gallery.device)[counted], _ROWS):
        # The length of a query does not change its order of the gallery.
        similarity = queries[rows] @ unit.T
        if own is not None:
            similarity.scatter_(1, own[rows, None], -torch.inf)
        hits += int((gallery_labels[similarity.argmax(dim=1)] == query_labels[rows]).sum())
    total = int(counted.sum())
    return hits / total if total else None
