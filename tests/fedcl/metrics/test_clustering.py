"""Clustering accuracy against all assignments, and k-means that depends on its seed alone."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl.metrics.clustering import clustering_accuracy, k_means, match


def by_hand(labels: list[int], clusters: list[int]) -> float:
    """The best share of right images over every one-to-one naming of clusters."""
    groups, names = sorted(set(clusters)), sorted(set(labels))
    names += [-1] * (len(groups) - len(names))
    best = 0
    for order in permutations(names, len(groups)):
        named = dict(zip(groups, order, strict=True))
        best = max(best, sum(named[c] == y for c, y in zip(clusters, labels, strict=True)))
    return best / len(labels)


@hypothesis_settings(max_examples=150, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_accuracy_is_that_of_the_best_assignment(pairs: list[tuple[int, int]]) -> None:
    labels, clusters = [3 * a for a, _ in pairs], [b for _, b in pairs]
    found = clustering_accuracy(np.array(labels), np.array(clusters), np.array([0, 3]))
    assert found["all"] == pytest.approx(by_hand(labels, clusters))
    named = match(np.array(labels), np.array(clusters))
    assert len(set(named.values())) == len(named)
    for name, part in (("old", {0, 3}), ("new", {6, 9, 12})):
        mine = [(y, c) for y, c in zip(labels, clusters, strict=True) if y in part]
        if not mine:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(np.mean([named.get(c) == y for y, c in mine]))


def test_no_images() -> None:
    empty = np.zeros(0, np.int64)
    assert dict(clustering_accuracy(empty, empty, empty)) == {"all": None, "old": None, "new": None}


def test_k_means_finds_blobs_and_depends_on_its_seed_alone() -> None:
    labels = np.arange(60) % 3
    points = np.eye(3)[labels] * 10 + np.sin(np.arange(180)).reshape(60, 3)
    first = k_means(points, 3, 7)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert (k_means(points, 3, 7) == first).all()
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert clustering_accuracy(labels, first, np.array([0]))["all"] == 1.0
    assert k_means(points, 3, 2**40 + 1).shape == (60,)
