"""Formulas on a hand-computed, non-symmetric matrix whose accuracies peak late."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcl.metrics import matrix as mx

# Task 0 is best after task 2 (0.9, not 0.8 when learned); task 1 after task 1; task 2 improves at the end.
R = [
    [0.8, 0.1, 0.3, 0.0],
    [0.6, 0.7, 0.2, 0.1],
    [0.9, 0.4, 0.5, 0.25],
    [0.3, 0.2, 0.6, 1.0],
]
BASELINE = [0.1, 0.2, 0.05, 0.15]
COUNTS = [10, 30, 40, 20]


def best_before_learning() -> list[list[float | None]]:
    """Task 1 scores best before it is learned (0.9), which is not knowledge that can be forgotten."""
    return [[0.5, 0.9, 0.0], [0.5, 0.4, 0.0], [0.5, 0.2, 1.0]]


def with_column(column: int) -> list[list[float | None]]:
    return [[None if j == column else value for j, value in enumerate(row)] for row in R]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("average_accuracy", (0.3 + 0.2 + 0.6 + 1.0) / 4),
        ("average_accuracy_weighted", (3 + 6 + 24 + 20) / 100),
        ("average_incremental_accuracy", (0.8 + 1.3 / 2 + 1.8 / 3 + 2.1 / 4) / 4),
        (
            "average_incremental_accuracy_weighted",
            (0.8 + (6 + 21) / 40 + (9 + 12 + 20) / 80 + (3 + 6 + 24 + 20) / 100) / 4,
        ),
        ("learning_accuracy", (0.8 + 0.7 + 0.5 + 1.0) / 4),
        ("forgetting", (0.6 + 0.5 - 0.1) / 3),
        ("forgetting_first_last", (0.5 + 0.5 - 0.1) / 3),
        ("backward_transfer", -(0.5 + 0.5 - 0.1) / 3),
        ("forward_transfer", ((0.1 - 0.2) + (0.2 - 0.05) + (0.25 - 0.15)) / 3),
    ],
)
def test_hand_computed(name: str, expected: float) -> None:
    values, undefined = mx.summary_metrics(R, BASELINE, COUNTS)
    assert values[name] == pytest.approx(expected, abs=1e-15)
    assert undefined == []


def test_curves_by_hand() -> None:
    assert mx.seen_accuracy(R) == pytest.approx([0.8, 0.65, 0.6, 0.525], abs=1e-15)
    assert mx.seen_accuracy_weighted(R, COUNTS) == pytest.approx([0.8, 27 / 40, 41 / 80, 0.53], abs=1e-15)
    assert mx.per_task_forgetting(R) == pytest.approx([0.6, 0.5, -0.1], abs=1e-15)
    curve = mx.forgetting_curve(R)
    assert curve[0] is None
    assert curve[1:] == pytest.approx([0.2, (-0.1 + 0.3) / 2, 1.0 / 3], abs=1e-15)


def test_maximum_starts_when_the_task_is_learned() -> None:
    assert mx.per_task_forgetting(best_before_learning()) == pytest.approx([0.0, 0.2], abs=1e-15)


def test_maximum_leaves_out_the_last_row() -> None:
    assert mx.forgetting([[0.5, 0.0], [0.75, 1.0]]) == -0.25


def test_cumulative_forgetting_by_hand() -> None:
    cumulative = [[0.8, 0.0, 0.0], [0.9, 0.7, 0.0], [0.6, 0.75, 0.5]]
    assert mx.cumulative_forgetting(cumulative) == pytest.approx((0.3 + 0 + 0) / 3, abs=1e-15)
    assert mx.cumulative_forgetting([[0.5]]) is None


def test_one_task() -> None:
    values, undefined = mx.summary_metrics([[0.25]], [0.5], [3])
    assert values["average_accuracy"] == values["average_incremental_accuracy_weighted"] == 0.25
    assert undefined == ["forgetting", "forgetting_first_last", "backward_transfer", "forward_transfer"]
    assert mx.per_task_forgetting([[0.25]]) == []
    assert mx.forgetting_curve([[0.25]]) == [None]


def test_undefined_column_is_never_skipped() -> None:
    values, undefined = mx.summary_metrics(with_column(1), BASELINE, [10, 0, 40, 20])
    assert values["average_accuracy_weighted"] == pytest.approx((3 + 24 + 20) / 70, abs=1e-15)
    assert set(undefined) == set(values) - {
        "average_accuracy_weighted",
        "average_incremental_accuracy_weighted",
    }
    assert mx.seen_accuracy(with_column(1)) == [0.8, None, None, None]
    assert mx.per_task_forgetting(with_column(1)) == pytest.approx([0.6, None, -0.1])


def test_undefined_last_column_leaves_forgetting_defined() -> None:
    values, undefined = mx.summary_metrics(with_column(3), BASELINE, COUNTS)
    assert values["forgetting"] == pytest.approx(1.0 / 3)
    assert "average_accuracy" in undefined
    assert "average_accuracy_weighted" in undefined


def test_first_task_without_test_samples() -> None:
    assert mx.seen_accuracy_weighted([[None, 0.0], [None, 0.5]], [0, 4]) == [None, 0.5]
    assert mx.average_incremental_accuracy_weighted([[None, 0.0], [None, 0.5]], [0, 4]) is None


def test_forward_transfer_needs_only_the_entries_of_its_formula() -> None:
    assert mx.forward_transfer([[0.5, 0.75], [None, None]], [None, 0.25]) == 0.5
    assert mx.forward_transfer([[0.5, None], [0.5, 0.5]], [0.0, 0.25]) is None
    assert mx.forward_transfer([[0.5, 0.5], [0.5, 0.5]], [0.0, None]) is None


def test_none_and_nan_are_the_same() -> None:
    as_nan = np.array(with_column(2), dtype=np.float64)
    assert mx.summary_metrics(as_nan, None, COUNTS) == mx.summary_metrics(with_column(2), None, COUNTS)


def test_input_is_not_changed() -> None:
    array = np.array(R)
    mx.summary_metrics(array, BASELINE, COUNTS)
    assert np.array_equal(array, R)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "square"),
        ([[0.5, 0.5]], "square"),
        ([0.5], "square"),
        ([[0.5, 0.5], [0.5]], "T rows"),
        ([["x"]], "T rows"),
        ([[1.01]], r"entry \[0, 0\] is 1.01"),
        ([[0.5, 0.5], [0.5, -0.01]], r"entry \[1, 1\] is -0.01"),
        ([[math.inf]], r"\[0, 1\]"),
    ],
)
def test_wrong_matrices(matrix: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mx.average_accuracy(matrix)


@pytest.mark.parametrize("counts", [[1], [1, -1], [1, 0.5], [[1, 1]]])
def test_wrong_counts(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="test counts"):
        mx.average_accuracy_weighted([[0.5, 0.5], [0.5, 0.5]], counts)


@pytest.mark.parametrize("baseline", [[0.5], [0.5, 2.0]])
def test_wrong_baseline(baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="baseline"):
        mx.forward_transfer([[0.5, 0.5], [0.5, 0.5]], baseline)


matrices = st.integers(2, 7).flatmap(lambda t: arrays(np.float64, (t, t), elements=st.floats(0, 1, width=32)))


@given(matrices)
def test_forgetting_bounds(r: np.ndarray) -> None:
    largest, first_last = mx.forgetting(r), mx.forgetting_first_last(r)
    assert largest is not None
    assert first_last is not None
    assert -1 <= first_last <= largest + 1e-15
    assert largest <= 1
    assert first_last == -mx.backward_transfer(r)


@given(matrices)
def test_equal_counts_change_nothing(r: np.ndarray) -> None:
    assert mx.average_accuracy_weighted(r, [7] * len(r)) == pytest.approx(mx.average_accuracy(r), abs=1e-12)
    assert mx.average_incremental_accuracy_weighted(r, [7] * len(r)) == pytest.approx(
        mx.average_incremental_accuracy(r), abs=1e-12
    )


@given(matrices)
def test_two_variants_agree_when_no_task_improves(r: np.ndarray) -> None:
    falling = np.minimum.accumulate(r, axis=0)
    assert mx.forgetting(falling) == mx.forgetting_first_last(falling)


@given(matrices)
def test_matches_loops(r: np.ndarray) -> None:
    tasks = len(r)
    terms = [max(r[i, j] for i in range(j, tasks - 1)) - r[tasks - 1, j] for j in range(tasks - 1)]
    assert mx.forgetting(r) == pytest.approx(sum(terms) / (tasks - 1), abs=1e-12)
    rows = [sum(r[i, j] for j in range(i + 1)) / (i + 1) for i in range(tasks)]
    assert mx.average_incremental_accuracy(r) == pytest.approx(sum(rows) / tasks, abs=1e-12)
