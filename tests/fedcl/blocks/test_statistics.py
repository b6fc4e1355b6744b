"""Sums by class: exact over any partition and any batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl.blocks.statistics import (
    Form,
    add_moments,
    class_covariances,
    class_means,
    class_moments,
    class_sums,
    pool_gaussians,
    sample_gaussians,
    total_covariance,
    widen,
    within_covariance,
)
from fedcl.errors import RunFailed


def literal(x: torch.Tensor, y: list[int], classes: int) -> tuple[list[list[float]], list[int]]:
    sums = [[0.0] * x.shape[1] for _ in range(classes)]
    counts = [0] * classes
    for row, label in zip(x.tolist(), y, strict=True):
        counts[label] += 1
        for j, value in enumerate(row):
            sums[label][j] += value
    return sums, counts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 7), st.integers(1, 5), st.integers(0, 99))
def test_sums_of_any_partition_are_the_sums_of_all(labels: list[int], batch: int, clients: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 3, generator=generator, dtype=torch.float64)
    y = torch.tensor(labels, dtype=torch.int64)
    owner = torch.randint(clients, (len(labels),), generator=generator)
    sums, counts = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    for client in range(clients):
        rows = torch.nonzero(owner == client).flatten()
        batches = [(x[part], y[part]) for part in torch.split(rows, batch) if len(part)]
        own_sums, own_counts = class_sums(batches, lambda v: v, 6, 3)
        assert own_counts.sum() == len(rows)
        sums, counts = sums + own_sums, counts + own_counts
    expected_sums, expected_counts = literal(x, labels, 6)
    assert counts.tolist() == expected_counts
    torch.testing.assert_close(sums, torch.tensor(expected_sums, dtype=torch.float64), rtol=0, atol=1e-12)


def test_float32_features_are_summed_in_float64() -> None:
    x = torch.full((4096, 1), 0.1, dtype=torch.float32)
    sums, counts = class_sums([(x, torch.zeros(4096, dtype=torch.int64))] * 8, lambda v: v, 1, 1)
    assert sums.dtype == torch.float64
    assert counts.tolist() == [8 * 4096]
    assert abs(sums.item() - 8 * 4096 * float(torch.tensor(0.1))) < 1e-7  # float32 is off by about 0.1


def test_features_are_what_is_summed() -> None:
    x, y = torch.ones(2, 4), torch.tensor([1, 1])
    sums, _ = class_sums([(x, y)], lambda v: 3 * v[:, :2], 2, 2)
    assert sums.tolist() == [[0.0, 0.0], [6.0, 6.0]]


def test_no_image_at_all() -> None:
    sums, counts = class_sums([], lambda v: v, 3, 2)
    assert (sums.shape, sums.dtype, counts.tolist()) == ((3, 2), torch.float64, [0, 0, 0])


@pytest.mark.parametrize(("rows", "result"), [(2, 2), (1, 2), (5, 5)])
def test_widen_keeps_what_is_there(rows: int, result: int) -> None:
    array = torch.arange(6, dtype=torch.int64).reshape(2, 3)
    wide = widen(array, rows)
    assert wide.shape == (result, 3)
    assert wide.dtype == torch.int64
    assert torch.equal(wide[:2], array)
    assert not wide[2:].any()


CLASSES, DIMENSION = 5, 3


def drawn(labels: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features far from 0, where second moments cancel, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), DIMENSION, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.3, 0.0, 0.1]], dtype=torch.float64
    )
    return x + 20.0, torch.tensor(labels, dtype=torch.int64)


def federated(x: torch.Tensor, y: torch.Tensor, owner: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for client in range(4):
        rows = torch.nonzero(owner == client).flatten()
        batches = [(x[part], y[part]) for part in torch.split(rows, 2) if len(part)]
        total = add_moments(total, class_moments(batches, lambda v: v, CLASSES, DIMENSION, form))
    return total


def covariance(rows: np.ndarray) -> np.ndarray:
    """NumPy's unbiased covariance, of one row or none 0."""
    return np.cov(rows, rowvar=False) if len(rows) > 1 else np.zeros((DIMENSION, DIMENSION))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, CLASSES - 1), max_size=25), st.integers(0, 99))
def test_pooled_moments_are_those_of_the_union(labels: list[int], seed: int) -> None:
    x, y = drawn(labels, seed)
    owner = torch.randint(4, (len(labels),), generator=torch.Generator().manual_seed(seed + 1))
    full, diagonal = federated(x, y, owner, "full"), federated(x, y, owner, "diagonal")
    shared = federated(x, y, owner, "shared")
    by_class = [x[y == c].numpy() for c in range(CLASSES)]
    within = sum(((len(r) - 1) * covariance(r) for r in by_class if len(r)), np.zeros((DIMENSION, DIMENSION)))
    freedom = len(labels) - sum(bool(len(r)) for r in by_class)
    within = within / freedom if freedom else within
    for c, rows in enumerate(by_class):
        for moments in (full, diagonal, shared):
            assert int(moments["counts"][c]) == len(rows)
            expected = rows.mean(axis=0) if len(rows) else np.zeros(DIMENSION)
            np.testing.assert_allclose(class_means(moments)[c], expected, atol=1e-10)
        np.testing.assert_allclose(class_covariances(full)[c], covariance(rows), atol=1e-10)
        np.testing.assert_allclose(class_covariances(diagonal)[c], covariance(rows).diagonal(), atol=1e-10)
    for moments in (full, shared):
        np.testing.assert_allclose(within_covariance(moments), within, atol=1e-10)
        np.testing.assert_allclose(total_covariance(moments), covariance(x.numpy()), atol=1e-10)
    np.testing.assert_allclose(within_covariance(diagonal), within.diagonal(), atol=1e-10)
    np.testing.assert_allclose(total_covariance(diagonal), covariance(x.numpy()).diagonal(), atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=25), st.integers(0, 99))
def test_gaussians_of_clients_pool_to_that_of_the_union(owned: list[tuple[int, int]], seed: int) -> None:
    x, y = drawn([label for _, label in owned], seed)
    owner = torch.tensor([client for client, _ in owned])
    parts = [[x[(owner == k) & (y == c)].numpy() for c in range(3)] for k in range(4)]
    counts = torch.tensor([[len(rows) for rows in part] for part in parts])
    means = np.array([[rows.mean(axis=0) if len(rows) else np.zeros(DIMENSION) for rows in p] for p in parts])
    spreads = np.array([[covariance(rows) for rows in part] for part in parts])
    count, mean, spread = pool_gaussians(counts, torch.from_numpy(means), torch.from_numpy(spreads))
    for c in range(3):
        rows = x[y == c].numpy()
        assert int(count[c]) == len(rows)
        np.testing.assert_allclose(mean[c], rows.mean(axis=0) if len(rows) else np.zeros(DIMENSION), atol=1e-10)
        np.testing.assert_allclose(spread[c], covariance(rows), atol=1e-10)


def test_moments_of_more_classes_are_added_to_those_of_fewer() -> None:
    x, y = drawn([0, 0, 1, 2, 2, 3], 0)
    forms: tuple[Form, ...] = ("full", "diagonal", "shared")
    for form in forms:
        first = class_moments([(x[:3], y[:3])], lambda v: v, 2, DIMENSION, form)
        second = class_moments([(x[3:], y[3:])], lambda v: v, 4, DIMENSION, form)
        both = class_moments([(x, y)], lambda v: v, 4, DIMENSION, form)
        for n, added in add_moments(first, second).items():
            torch.testing.assert_close(added, both[n], rtol=0, atol=1e-10)


def test_moments_of_no_image() -> None:
    cases: list[tuple[Form, str, tuple[int, ...]]] = [
        ("full", "outer", (2, 3, 3)),
        ("diagonal", "squares", (2, 3)),
        ("shared", "scatter", (3, 3)),
    ]
    for form, name, shape in cases:
        found = class_moments([], lambda v: v, 2, 3, form)
        assert found.keys() == {"counts", "sums", name}
        assert found[name].shape == shape
        assert not any(a.any() for a in found.values())


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_draws_have_the_moments_of_their_gaussian(diagonal: bool) -> None:
    means = torch.tensor([[1.0, -2.0], [0.0, 5.0]], dtype=torch.float64)
    spreads = torch.tensor([[[2.0, 0.8], [0.8, 1.0]], [[0.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
    if diagonal:
        spreads = spreads * torch.eye(2)
    given_spreads = spreads.diagonal(dim1=1, dim2=2) if diagonal else spreads
    found = sample_gaussians(means, given_spreads, 40_000, "draws", jitter=1e-3)
    assert (found.shape, found.dtype) == ((2, 40_000, 2), torch.float64)
    for c in range(2):
        np.testing.assert_allclose(found[c].mean(dim=0), means[c], atol=0.04)
        np.testing.assert_allclose(np.cov(found[c], rowvar=False), spreads[c] + 1e-3 * torch.eye(2), atol=0.06)


def test_draws_depend_on_their_name_and_class_alone() -> None:
    means, spreads = torch.zeros(3, 2), torch.ones(3, 2)
    all_three = sample_gaussians(means, spreads, 4, 0, "a", jitter=0.0, dtype=torch.float32)
    assert all_three.dtype == torch.float32
    torch.rand(3)
    assert torch.equal(all_three[:2], sample_gaussians(means[:2], spreads[:2], 4, 0, "a", jitter=0.0).float())
    assert not torch.equal(all_three[0], all_three[1])
    assert not torch.equal(all_three, sample_gaussians(means, spreads, 4, 1, "a", jitter=0.0).float())
    assert sample_gaussians(means[:0], spreads[:0], 4, "a", jitter=0.0).shape == (0, 4, 2)


def test_a_class_of_one_image_is_drawn_around_it() -> None:
    moments = class_moments([(torch.ones(1, 2), torch.tensor([0]))], lambda v: v, 1, 2)
    found = sample_gaussians(class_means(moments), class_covariances(moments), 5, "a", jitter=1e-6)
    assert float((found - 1.0).abs().max()) < 0.01


@pytest.mark.parametrize("spread", [torch.tensor([[1.0, -1.0]]), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])])
def test_a_spread_that_is_none_is_refused(spread: torch.Tensor) -> None:
    with pytest.raises(RunFailed, match="raise the jitter"):
        sample_gaussians(torch.zeros(1, 2), spread, 3, "a", jitter=1e-4)
