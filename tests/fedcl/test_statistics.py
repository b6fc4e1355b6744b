"""Sums by class: exact over any partition and any batch size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl.statistics import class_sums, widen


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
        batches = [(x[part], y[part]) for part in rows.split(batch) if len(part)]
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
