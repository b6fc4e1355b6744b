import math

import pytest

from fedcl.metrics.paired import paired_difference


def test_interval_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    a, b = [0.61, 0.55, 0.72, 0.66, 0.59], [0.52, 0.50, 0.60, 0.64, 0.41]
    expected = scipy.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_difference(a, b)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert found.verdict == "gained"
    assert paired_difference(b, a).verdict == "lost"


def test_coverage_of_the_interval():
    # 400 simulated nulls: about 5 % of the intervals miss 0; the band is 4 standard errors wide.
    from fedcl.random import Stream

    stream = Stream("paired", "coverage")
    missed = 0
    for _ in range(400):
        a = [stream.normal() for _ in range(5)]
        missed += paired_difference(a, [0.0] * 5).verdict != "not shown"
    assert abs(missed / 400 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 400)


def test_special_cases():
    assert paired_difference([0.5, 0.5], [0.5, 0.5]).verdict == "identical"
    assert paired_difference([0.6], [0.5]).low is None
    with pytest.raises(ValueError, match="not pairs"):
        paired_difference([0.1], [])
    with pytest.raises(ValueError, match="finite"):
        paired_difference([math.nan], [0.0])
