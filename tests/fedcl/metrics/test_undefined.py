"""Where a representation metric has no value it is None: nothing is made out of rounding, nothing becomes 0 or NaN."""

from __future__ import annotations

import math

import pytest
import torch

from fedcl import random
from fedcl.metrics import geometry, probes
from fedcl.metrics.moments import ClassMoments
from fedcl.metrics.similarity import FeatureDrift, PairMoments, linear_cka

# In float64 the mean of equal numbers such as 0.1 is not that number.
EQUAL = torch.full((7, 3), 0.1, dtype=torch.float64) * torch.tensor([1.0, 3.0, 1e6], dtype=torch.float64)
VARIED = torch.from_numpy(random.uniform(21, "varied").reshape(7, 3))
ONE = torch.zeros(7, dtype=torch.int64)
TWO = torch.tensor([0, 0, 0, 0, 1, 1, 1])


def test_equal_features_have_rounding_and_no_spread() -> None:
    moments = ClassMoments.of(EQUAL, ONE, 1)
    assert float(moments.scatter().trace()) > 0  # without this the rest would show nothing
    assert moments.constant
    assert (ClassMoments.of(EQUAL[:3], ONE[:3], 1) + ClassMoments.of(EQUAL[3:], ONE[3:], 1)).constant
    assert ClassMoments.of(EQUAL[:0], ONE[:0], 1).constant
    assert not ClassMoments.of(VARIED, ONE, 1).constant
    assert not ClassMoments.of(1e6 + 1e-4 * VARIED, ONE, 1).constant


@pytest.mark.parametrize("count", [1, 2, 7])
def test_cka_of_what_does_not_vary(count: int) -> None:
    equal, varied = EQUAL[:count], VARIED[:count]
    for x, y in ((equal, varied), (varied, equal), (equal, equal)):
        assert PairMoments.of(x, y).cka() is None
        assert linear_cka(x, y) is None
    assert (linear_cka(varied, varied) is None) == (count == 1)
    assert linear_cka(torch.zeros(0, 3), torch.zeros(0, 3)) is None


def test_collapse_of_means_that_are_equal() -> None:
    assert set(geometry.neural_collapse(ClassMoments.of(EQUAL, TWO, 2), torch.eye(2, 3)).values()) == {None}


def test_collapse_with_one_image_a_class() -> None:
    found = geometry.neural_collapse(ClassMoments.of(VARIED[:3], torch.arange(3), 3))
    assert (found["nc1"], found["cdnv"]) == (None, None)  # nothing can vary within a class
    assert found["nc2_norms"] is not None
    assert found["nc2_angles"] is not None
    mixed = geometry.neural_collapse(ClassMoments.of(VARIED[:4], torch.tensor([0, 1, 2, 2]), 3))
    assert mixed["nc1"] is not None
    assert mixed["cdnv"] is None


def test_a_class_at_the_centre_has_no_angle() -> None:
    x = torch.tensor([[-1.0, 0.0], [-1.2, 0.0], [0.1, 0.1], [-0.1, -0.1], [1.0, 0.0], [1.2, 0.0]])
    found = geometry.neural_collapse(ClassMoments.of(x, torch.tensor([0, 0, 1, 1, 2, 2]), 3))
    assert found["nc2_angles"] is None
    assert found["nc2_norms"] == pytest.approx(math.sqrt(0.5))  # of 1, 0 and 1
    # Along the one direction between the means: within 2 * (0.01 + 0.01 + 0.01) / 6 = 0.01, means 1.1, 0 and -1.1.
    assert found["nc1"] == pytest.approx(0.01 / (2 * 1.1**2), rel=1e-5)
    assert found["cdnv"] is not None


def test_nc1_does_not_divide_by_rounding() -> None:
    """Far from the origin the direction that K centred means cannot span is left with rounding."""
    labels = torch.arange(30) % 3
    x = torch.from_numpy(random.uniform(30 * 8, "far").reshape(30, 8)) + 3.0 * torch.eye(3, 8)[labels]
    near, far = (geometry.neural_collapse(ClassMoments.of(x + shift, labels, 3))["nc1"] for shift in (0.0, 1e5))
    assert near is not None
    assert far == pytest.approx(near, rel=1e-6)


def test_a_zero_feature_has_no_direction() -> None:
    x = torch.cat([VARIED[:3], torch.zeros(1, 3)])
    labels = torch.zeros(4, dtype=torch.int64)
    assert geometry.alignment(x, x) is None
    assert geometry.uniformity(x) is None
    assert geometry.tolerance(ClassMoments.of(torch.nn.functional.normalize(x, dim=1), labels, 1)) is None
    drift = FeatureDrift.of(VARIED[:4].double(), x.double()) + FeatureDrift.of(VARIED, VARIED)
    assert drift.mean_cosine() is None
    assert drift.mean_distance() == pytest.approx(float(VARIED[3].norm()) / 11)
    assert FeatureDrift(0, 0.0, 0.0).mean_cosine() is None


def test_a_constant_dimension_does_not_decide_the_linear_probe() -> None:
    """Rounding is not a scale: a test image that differs there would be thrown out of all bounds."""
    x = torch.cat([VARIED, EQUAL[:, :1]], dim=1)
    probe = probes.fit_linear(x, TWO, 2)
    assert probe.scale[3] == 1.0
    moved = x.clone()
    moved[:, 3] += 0.01
    assert probe.scores(moved).argmax(1).tolist() == probe.scores(x).argmax(1).tolist()


def test_activity_and_spectrum_of_nothing() -> None:
    assert geometry.UnitActivity.of(torch.zeros(0, 3)).dormant() is None
    assert set(geometry.spectrum_metrics(torch.zeros(4)).values()) == {None}
    assert geometry.disagreement(ONE[:0], ONE[:0]) is None
