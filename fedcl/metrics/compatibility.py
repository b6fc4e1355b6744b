"""Can new features search an old gallery? Metrics of the compatibility matrix of CL2R.

``C[k, i]`` is a retrieval score in [0, 1] with queries from the model after task k and the gallery from the model after
task i <= k; above the diagonal nothing is measured (None or NaN). Source of all: Biondi et al., CL2R: Compatible
Lifelong Learning Representations, ACM TOMM 2023. Every function raises ValueError if the matrix is not square or an
entry is outside [0, 1]. With one task only :func:`average_compatibility_score` is defined.
"""

from __future__ import annotations

import numpy as np

from fedcl.metrics.matrix import Matrix, as_matrix, mean_or_none


def average_compatibility(matrix: Matrix) -> float | None:
    """AC: share of the pairs in which the updated model serves the old gallery at least as well as the old model did.

    ``2 / (T (T-1)) sum_i sum_{k>i} [C[k, i] >= C[i, i]]``, in [0, 1].

    >>> average_compatibility([[0.5, None, None], [0.5, 0.7, None], [0.4, 0.6, 0.9]])
    0.3333333333333333
    """
    c = as_matrix(matrix)
    pairs = [(c[k, i], c[i, i]) for i in range(len(c)) for k in range(i + 1, len(c))]
    return mean_or_none([float(new >= old) if new == new and old == old else None for new, old in pairs])


def average_compatibility_score(matrix: Matrix) -> float | None:
    """AM: mean score of all pairs, each model with itself included: ``2 / (T (T+1)) sum_{k>=i} C[k, i]``.

    >>> average_compatibility_score([[0.5, None], [0.25, 0.75]])
    0.5
    """
    c = as_matrix(matrix)
    return mean_or_none(c[np.tril_indices(len(c))])


def backward_compatibility(matrix: Matrix) -> float | None:
    """BC: what the last model loses or gains on old galleries: ``mean_{i<T-1} (C[T-1, i] - C[i, i])``, in [-1, 1].

    >>> backward_compatibility([[0.5, None], [0.25, 0.75]])
    -0.25
    """
    c = as_matrix(matrix)
    return mean_or_none((c[-1] - np.diagonal(c))[:-1])


def forward_compatibility(matrix: Matrix) -> float | None:
    """FC: what an un-indexed gallery costs each update: ``mean_{i>0} (C[i, i-1] - C[i, i])``, in [-1, 1].

    >>> forward_compatibility([[0.5, None], [0.25, 0.75]])
    -0.5
    """
    c = as_matrix(matrix)
    return mean_or_none(np.diagonal(c, offset=-1) - np.diagonal(c)[1:])
