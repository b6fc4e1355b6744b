"""Exemplar selection: uniform over everything seen, water-filled over classes, never over the budget."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedcl import random as counter
from fedcl.blocks.memory import capacity, keep

STREAM = [(0, 12), (1, 3), (2, 9), (0, 5), (3, 1)]
"""(class, images) of each task of one client; class 0 comes back."""


def priorities(count: int, *name: object) -> torch.Tensor:
    return torch.from_numpy((counter.words(count, *name) >> np.uint64(1)).astype(np.int64))


def stream_through(labels: list[list[int]], priority: list[list[int]], limit: int, policy: str) -> list[int]:
    """Rows kept when the images of each task are offered after it, counted over the whole stream."""
    rows = torch.zeros(0, dtype=torch.int64)
    values, classes = rows.clone(), rows.clone()
    start = 0
    for new_labels, new_priority in zip(labels, priority, strict=True):
        count = len(new_labels)
        rows = torch.cat([rows, torch.arange(start, start + count)])
        values = torch.cat([values, torch.tensor(new_priority, dtype=torch.int64)])
        classes = torch.cat([classes, torch.tensor(new_labels, dtype=torch.int64)])
        kept = keep(values, classes, limit, policy)  # type: ignore[arg-type]
        rows, values, classes = rows[kept], values[kept], classes[kept]
        start += count
    return rows.tolist()


def balanced_by_eviction(labels: list[int], priority: list[int], limit: int) -> list[int]:
    """All images, less the worst of the largest classes, one by one until they fit."""
    kept = list(range(len(labels)))
    while len(kept) > limit:
        sizes = {c: sum(labels[i] == c for i in kept) for c in labels}
        largest = [c for c, size in sizes.items() if size == max(sizes.values())]
        worst = {c: max((i for i in kept if labels[i] == c), key=lambda i: priority[i]) for c in largest}
        kept.remove(max(worst.values(), key=lambda i: priority[i]))
    return kept


def gdumb(labels: list[int], limit: int) -> dict[int, int]:
    """How many of each class GDumb's greedy sampler holds, image by image."""
    held: dict[int, int] = {}
    for label in labels:
        if sum(held.values()) < limit:
            held[label] = held.get(label, 0) + 1
            continue
        largest = max(held, key=lambda c: held[c]) if held else None
        if largest is not None and held.get(label, 0) < held[largest] - (label in held):
            held[largest] -= 1
            held[label] = held.get(label, 0) + 1
    return {c: n for c, n in held.items() if n}


def test_reservoir_keeps_every_seen_image_with_the_same_probability() -> None:
    sizes, limit, seeds = [12, 3, 9, 5, 1], 7, 3000
    total = sum(sizes)
    labels = [[label] * size for label, size in STREAM]
    hits = np.zeros(total)
    for seed in range(seeds):
        priority = [priorities(size, seed, "client", 4, task).tolist() for task, size in enumerate(sizes)]
        kept = stream_through(labels, priority, limit, "reservoir")
        assert len(kept) == limit
        hits[kept] += 1
    expected = seeds * limit / total
    # The images of one sample exclude each other, so the counts vary less than independent ones.
    statistic = ((hits - expected) ** 2 / expected).sum() / (1 - limit / total) * (total - 1) / total
    assert chi2.sf(statistic, total - 1) > 1e-3
    assert chi2.cdf(statistic, total - 1) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=5),
    st.integers(0, 20),
    st.integers(0, 10**6),
)
def test_kept_images_do_not_depend_on_when_they_were_offered(labels: list[list[int]], limit: int, seed: int) -> None:
    flat = [label for task in labels for label in task]
    drawn = priorities(len(flat), seed).tolist()
    cuts = np.cumsum([0, *map(len, labels)]).tolist()
    priority = [drawn[a:b] for a, b in pairwise(cuts)]
    lowest = sorted(sorted(range(len(flat)), key=lambda i: drawn[i])[:limit])
    assert stream_through(labels, priority, limit, "reservoir") == lowest
    assert stream_through(labels, priority, limit, "class_balanced") == balanced_by_eviction(flat, drawn, limit)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=6), st.integers(0, 20), st.integers(0, 10**6))
def test_balanced_memory_is_as_balanced_as_gdumbs(sizes: list[int], limit: int, seed: int) -> None:
    labels = [[c] * size for c, size in enumerate(sizes)]
    priority = [priorities(size, seed, c).tolist() for c, size in enumerate(sizes)]
    kept = stream_through(labels, priority, limit, "class_balanced")
    flat = [label for task in labels for label in task]
    counts = np.bincount([flat[i] for i in kept], minlength=len(sizes)).tolist()
    greedy = gdumb(flat, limit)
    assert sorted(c for c in counts if c) == sorted(greedy.values())


def test_balanced_memory_is_uniform_within_a_class() -> None:
    seeds, size, limit = 2000, 8, 6
    hits = np.zeros(2 * size)
    labels = [0] * size + [1] * size
    for seed in range(seeds):
        kept = keep(priorities(2 * size, seed), torch.tensor(labels), limit, "class_balanced")
        assert (kept < size).sum() == limit // 2
        hits[kept.numpy()] += 1
    share = limit / 2 / size
    expected = seeds * share
    statistic = ((hits - expected) ** 2 / expected).sum() / (1 - share) * (size - 1) / size
    assert chi2.sf(statistic, 2 * (size - 1)) > 1e-3


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
@pytest.mark.parametrize(("count", "limit"), [(0, 3), (1, 0), (1, 1), (3, 3), (3, 9)])
def test_few_images_or_no_room(policy: str, count: int, limit: int) -> None:
    kept = keep(priorities(count, 0), torch.zeros(count, dtype=torch.int64), limit, policy)  # type: ignore[arg-type]
    assert len(kept) == min(count, limit)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_budget_is_used_to_the_last_image(budget: int, image: int) -> None:
    images = capacity(budget, image)
    assert images * image <= budget < (images + 1) * image
