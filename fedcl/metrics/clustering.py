"""How well clusters of features are classes: the accuracy of category discovery."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def k_means(features: npt.NDArray[np.float64], clusters: int, seed: int) -> Ints:
    """The cluster of each row, (N,) in ``range(clusters)``: k-means++ and Lloyd's algorithm, the best of ten starts.

    scikit-learn's; the seed alone decides the starts.

    Args:
        features: (N, d).
        clusters: at most N.
        seed: at least 0.
    """
    from sklearn.cluster import KMeans

    found = KMeans(clusters, n_init=10, random_state=seed % 2**32, algorithm="lloyd").fit_predict(features)
    return np.asarray(found, dtype=np.int64)


def match(labels: Ints, clusters: Ints) -> dict[int, int]:
    """The class of each cluster: the one-to-one assignment under which most images are right (Hungarian algorithm).

    Args:
        labels, clusters: (N,) int64. With more clusters than classes some have none.

    >>> match(np.array([0, 0, 5]), np.array([7, 7, 1]))
    {1: 5, 7: 0}
    """
    from scipy.optimize import linear_sum_assignment

    classes, own = np.unique(labels, return_inverse=True)
    groups, place = np.unique(clusters, return_inverse=True)
    together = np.zeros((len(groups), len(classes)), dtype=np.int64)
    np.add.at(together, (place, own), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    return {int(groups[row]): int(classes[column]) for row, column in zip(rows, columns, strict=True)}


def clustering_accuracy(labels: Ints, clusters: Ints, old: Ints) -> Mapping[str, float | None]:
    """Accuracy of clusters as classes: of ``all`` images, and of those of ``old`` and of ``new`` classes.

    One assignment over all images serves the three numbers; an assignment for each alone would give higher ones.

    Source: Vaze et al., Generalized Category Discovery, CVPR 2022, section 4.1 (all, old, new).

    Args:
        labels, clusters: (N,) int64.
        old: the classes that were learned with labels.

    Returns None for a part without images.

    >>> found = clustering_accuracy(np.array([0, 0, 1, 1]), np.array([3, 3, 3, 9]), np.array([0]))
    >>> found["all"], found["old"], found["new"]
    (0.75, 1.0, 0.5)
    """
    named = match(labels, clusters) if len(labels) else {}
    right = np.array([named.get(c, -1) for c in clusters.tolist()], dtype=np.int64) == labels
    known = np.isin(labels, old)
    parts = {"all": np.ones_like(known), "old": known, "new": ~known}
    return {name: float(right[part].mean()) if part.any() else None for name, part in parts.items()}
