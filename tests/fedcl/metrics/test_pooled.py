"""Pooled statistics over any partition of the samples equal those of all samples at once, to 1e-10."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl import random
from fedcl.metrics import geometry
from fedcl.metrics.calibration import CalibrationBins
from fedcl.metrics.moments import ClassMoments
from fedcl.metrics.retrieval import retrieve
from fedcl.metrics.similarity import FeatureDrift, PairMoments

CLASSES = 4


def normal(count: int, width: int, *name: object) -> torch.Tensor:
    u = random.uniform(2 * count * width, *name).reshape(2, count, width)
    return torch.from_numpy(np.sqrt(-2 * np.log1p(-u[0])) * np.cos(2 * np.pi * u[1]))


@st.composite
def samples(draw: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Features far from the origin, labels, and a partition whose parts may be empty."""
    seed, count = draw(st.integers(0, 10**6)), draw(st.integers(1, 40))
    parts = draw(st.integers(1, 6))
    owner = torch.tensor(draw(st.lists(st.integers(0, parts - 1), min_size=count, max_size=count)))
    labels = torch.tensor(draw(st.lists(st.integers(0, CLASSES - 1), min_size=count, max_size=count)))
    features = normal(count, 5, seed, "x") + draw(st.sampled_from([0.0, 3.0, 1000.0]))
    return features, labels, [torch.nonzero(owner == p).flatten() for p in range(parts)]


def pooled(of: Any, parts: list[torch.Tensor]) -> Any:
    total = of(parts[0])
    for rows in parts[1:]:
        total = total + of(rows)
    return total


@settings(max_examples=60, deadline=None)
@given(samples())
def test_class_moments(case: Any) -> None:
    x, y, parts = case
    found = pooled(lambda rows: ClassMoments.of(x[rows], y[rows], CLASSES), parts)
    scale = max(1.0, float(x.abs().max()))
    within, mean = torch.zeros(5, 5, dtype=torch.float64), x.mean(0)
    for c in range(CLASSES):
        own = x[y == c]
        assert int(found.counts[c]) == len(own)
        if not len(own):
            continue
        assert torch.allclose(found.means[c], own.mean(0), rtol=0, atol=1e-10 * scale)
        away = own - own.mean(0)
        assert float(found.spread[c]) == pytest.approx(float((away**2).sum()), abs=1e-10 * scale)
        for row in away:
            within += torch.outer(row, row)
    assert torch.allclose(found.within, within, rtol=0, atol=1e-10 * scale)
    scatter = sum(torch.outer(row - mean, row - mean) for row in x)
    assert torch.allclose(found.scatter(), scatter, rtol=1e-12, atol=1e-10 * scale)


@settings(max_examples=60, deadline=None)
@given(samples())
def test_what_is_made_of_class_moments(case: Any) -> None:
    x, y, parts = case
    unit = torch.nn.functional.normalize(x, dim=1)
    found = pooled(lambda rows: ClassMoments.of(unit[rows], y[rows], CLASSES), parts)
    whole = ClassMoments.of(unit, y, CLASSES)
    left, right = geometry.tolerance(found), geometry.tolerance(whole)
    assert (left is None) == (right is None)
    assert left is None or right is None or left == pytest.approx(right, abs=1e-10)
    pairs = [float(unit[i] @ unit[j]) for i in range(len(x)) for j in range(len(x)) if i != j and y[i] == y[j]]
    assert (left is None) == (not pairs)
    if pairs:
        assert left == pytest.approx(np.mean(pairs), abs=1e-10)
    assert torch.allclose(geometry.spectrum(found.scatter()), geometry.spectrum(whole.scatter()), atol=1e-10) or (
        float(whole.scatter().trace()) < 1e-18
    )


@settings(max_examples=60, deadline=None)
@given(samples(), st.integers(0, 10**6))
def test_gram_matrices_and_cka(case: Any, seed: int) -> None:
    x, _, parts = case
    y = torch.cat([x[:, :2] * 2.0, normal(len(x), 1, seed, "y")], dim=1)
    found = pooled(lambda rows: PairMoments.of(x[rows], y[rows]), parts)
    whole = PairMoments.of(x, y)
    scale = max(1.0, float(x.abs().max()))
    for name in ("mean_x", "mean_y", "xx", "yy", "xy"):
        assert torch.allclose(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=1e-10 * scale), name
    if len(x) > 1:
        a, b = x - x.mean(0), y - y.mean(0)
        k, m = a @ a.T, b @ b.T
        expected = float((k * m).sum() / (k.norm() * m.norm()))
        assert found.cka() == pytest.approx(expected, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(samples(), st.integers(0, 10**6))
def test_sums(case: Any, seed: int) -> None:
    x, y, parts = case
    then = normal(len(x), 5, seed, "then")
    drift = pooled(lambda rows: FeatureDrift.of(x[rows], then[rows]), parts)
    expected = float(np.mean([np.linalg.norm(a - b) for a, b in zip(x.numpy(), then.numpy(), strict=True)]))
    assert drift.mean_distance() == pytest.approx(expected, rel=1e-12)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x.numpy(), then.numpy(), strict=True)]
    assert drift.mean_cosine() == pytest.approx(np.mean(cosines), abs=1e-10)

    units = pooled(lambda rows: geometry.UnitActivity.of(x[rows]), parts)
    assert torch.allclose(units.total, x.abs().sum(0), rtol=1e-12)
    assert units.count == len(x)

    shares = then[:, :CLASSES].softmax(dim=1)
    bins = pooled(lambda rows: CalibrationBins.of(shares[rows], y[rows]), parts)
    assert bins.ece() == pytest.approx(CalibrationBins.of(shares, y).ece(), abs=1e-12)

    whole = retrieve(then, y, then, y, torch.arange(len(y)), (1, 3))
    found = pooled(lambda rows: retrieve(then[rows], y[rows], then, y, rows, (1, 3)), parts)
    assert (found.queries, found.hits) == (whole.queries, whole.hits)
    assert found.precision == pytest.approx(whole.precision, abs=1e-10)


def test_different_shapes_do_not_add_up() -> None:
    x, y = normal(3, 2, 0), torch.zeros(3, dtype=torch.int64)
    for one, other in (
        (ClassMoments.of(x, y, 2), ClassMoments.of(x, y, 3)),
        (PairMoments.of(x, x), PairMoments.of(x, x[:, :1])),
        (CalibrationBins.of(x.softmax(1), y, 5), CalibrationBins.of(x.softmax(1), y, 6)),
        (geometry.UnitActivity.of(x), geometry.UnitActivity.of(x[:, :1])),
        (retrieve(x, y, x, y, ks=(1,)), retrieve(x, y, x, y, ks=(2,))),
    ):
        with pytest.raises(ValueError, match="add"):
            _ = one + other  # type: ignore[operator]


def test_labels_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\); got 0 to 2"):
        ClassMoments.of(normal(3, 2, 0), torch.tensor([0, 1, 2]), 2)
    with pytest.raises(ValueError, match="labels"):
        ClassMoments.of(normal(3, 2, 0), torch.tensor([0, 1]), 2)
