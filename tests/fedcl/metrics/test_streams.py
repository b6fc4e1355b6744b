"""Stream metrics and every definition of forgetting, on the hand-computed matrix of test_matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcl.errors import UsageError
from fedcl.metrics import forgetting as fg
from fedcl.metrics import streams

R = [
    [0.8, 0.1, 0.95, 0.0],
    [0.6, 0.7, 0.2, 0.1],
    [0.9, 0.4, 0.5, 0.25],
    [0.3, 0.2, 0.6, 1.0],
]
COUNTS = [10, 30, 40, 20]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_before_last", (0.6 + 0.5 - 0.1) / 3),
        ("first_last", (0.5 + 0.5 - 0.1) / 3),
        ("max_with_last", (0.6 + 0.5 + 0.0) / 3),
        ("max_all_rows", (0.6 + 0.5 + 0.35) / 3),
        ("max_all_rows_before_last", (0.6 + 0.5 + 0.35) / 3),
        ("two_back", (0.5 + 0.5) / 3),
        ("over_all_tasks", (0.6 + 0.5 - 0.1) / 4),
        ("relative", (0.6 / 0.9 + 0.5 / 0.7 - 0.1 / 0.5) / 3),
    ],
)
def test_each_forgetting_by_hand(name: str, expected: float) -> None:
    assert fg.forgetting_by(name, R) == pytest.approx(expected, abs=1e-15)
    assert fg.forgetting_by(name, [[0.5]]) is None


def test_an_unknown_definition_is_named() -> None:
    with pytest.raises(UsageError, match="Did you mean 'first_last'"):
        fg.forgetting_by("first-last", R)


def test_undefined_columns_are_not_skipped() -> None:
    gap = [[None if j == 1 else v for j, v in enumerate(row)] for row in R]
    assert {fg.forgetting_by(name, gap) for name in fg.FORGETTING} == {None}
    assert fg.forgetting_by("relative", [[0.0, 0.0], [0.0, 1.0]]) is None


def test_only_the_lower_triangle_is_needed_where_the_definition_says_so() -> None:
    lower = [[v if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(R)]
    above = {"max_all_rows", "max_all_rows_before_last"}
    for name in set(fg.FORGETTING) - above:
        assert fg.forgetting_by(name, lower) == fg.forgetting_by(name, R)
    assert {fg.forgetting_by(name, lower) for name in above} == {None}


@given(arrays(np.float64, st.integers(2, 6).map(lambda t: (t, t)), elements=st.floats(0, 1, width=32)))
def test_the_order_of_the_definitions(r: np.ndarray) -> None:
    found = {n: fg.forgetting_by(n, r) for n in fg.FORGETTING}
    assert found["first_last"] <= found["max_before_last"] + 1e-12  # type: ignore[operator]
    assert found["max_before_last"] <= found["max_with_last"] + 1e-12  # type: ignore[operator]
    assert 0 <= found["max_with_last"] <= found["max_all_rows"] + 1e-12  # type: ignore[operator]
    between = found["max_all_rows_before_last"]
    assert found["max_before_last"] - 1e-12 <= between <= found["max_all_rows"] + 1e-12  # type: ignore[operator]


def test_forgetting_of_classes() -> None:
    table = [[0.9, None, None], [0.5, 0.4, None], [0.6, 0.7, 1.0]]
    assert fg.forgetting_per_class(table) == pytest.approx((0.3 - 0.3) / 2)
    assert fg.forgetting_per_class([[0.9, None]]) is None
    with pytest.raises(ValueError, match="no accuracy at the last"):
        fg.forgetting_per_class([[0.9], [None]])
    with pytest.raises(ValueError, match="table"):
        fg.forgetting_per_class([[1.5]])


def test_intransigence() -> None:
    assert streams.per_task_intransigence(R, [0.9, 0.7, 0.4, 1.0]) == pytest.approx([0.1, 0.0, -0.1, 0.0])
    assert streams.intransigence(R, [0.9, 0.9, 0.9, 1.0]) == pytest.approx((0.1 + 0.2 + 0.4) / 4)
    assert streams.intransigence(R, [0.9, None, 0.9, 1.0]) is None


def test_anytime_accuracy() -> None:
    assert streams.anytime_accuracy([0.2, 0.4, 0.9]) == pytest.approx(0.5)
    assert streams.anytime_accuracy([0.2, 0.4, 0.9], [10, 20, 30]) == pytest.approx(0.5)
    assert streams.anytime_accuracy([0.2, 0.4], [10, 40]) == pytest.approx((2 + 12) / 40)
    assert streams.anytime_accuracy([]) is None
    assert streams.anytime_accuracy([0.2, None], [1, 2]) is None
    for samples in ([10], [10, 10], [0, 1]):
        with pytest.raises(ValueError, match="rise"):
            streams.anytime_accuracy([0.2, 0.4], samples)


def test_few_shot_sessions() -> None:
    assert streams.session_accuracy(R, COUNTS) == pytest.approx([0.8, 27 / 40, (9 + 12 + 20) / 80, 0.53])
    assert streams.performance_drop(R, COUNTS) == pytest.approx(0.8 - 0.53)
    novel = (6 + 24 + 20) / 90
    assert streams.harmonic_accuracy(R, COUNTS) == pytest.approx(2 * 0.3 * novel / (0.3 + novel))
    assert streams.harmonic_accuracy([[1.0, 0.0], [0.0, 0.0]], [1, 1]) == 0.0
    assert streams.harmonic_accuracy([[1.0, None], [0.5, None]], [1, 0]) is None


def test_stability_and_plasticity() -> None:
    assert streams.stability(R) == pytest.approx(1.1 / 3)
    s, p = 1.1 / 3, 3.0 / 4
    assert streams.stability_plasticity(R) == pytest.approx(2 * s * p / (s + p))


def test_memory_area_of_the_surveys_budgets() -> None:
    budgets = [7.6, 12.4, 16.1, 19.8, 23.5]
    assert streams.memory_area(budgets, [0.6] * 5) == pytest.approx(0.6 * 15.9)
    expected = float(np.trapezoid([0.5, 0.6, 0.64, 0.65, 0.7], budgets))
    assert streams.memory_area(budgets, [0.5, 0.6, 0.64, 0.65, 0.7]) == pytest.approx(expected)
    assert streams.memory_area([1.0], [0.5]) is None
    assert streams.memory_area([1.0, 2.0], [0.5, None]) is None
    with pytest.raises(ValueError, match="rising"):
        streams.memory_area([2.0, 1.0], [0.5, 0.5])


def test_undefined_metrics_are_named() -> None:
    values, undefined = streams.stream_metrics(R, COUNTS)
    assert undefined == []
    assert None not in values.values()
    values, undefined = streams.stream_metrics([[0.5]], [3])
    assert set(undefined) == set(values)
