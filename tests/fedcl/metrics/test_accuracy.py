"""Accuracy counts: exact under any partition of the test samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcl.metrics import AccuracyState

CLASSES = 5
samples = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(-1, CLASSES), st.integers(0, 3)), max_size=60)


def state_of(pairs: list[tuple[int, int]]) -> AccuracyState:
    return AccuracyState.empty(CLASSES).update(
        np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs], np.int64)
    )


def test_by_hand() -> None:
    state = state_of([(0, 0), (0, 1), (0, 0), (2, 2), (3, -1), (4, 4)])
    assert state.correct.tolist() == [2, 0, 1, 0, 1]
    assert state.total.tolist() == [3, 0, 1, 1, 1]
    assert state.accuracy() == 4 / 6
    assert state.per_class() == [2 / 3, None, 1.0, 0.0, 1.0]
    # Task 0 exposes classes 0 and 3, task 1 class 1, task 2 class 4; class 2 is never exposed.
    assert state.per_task([0, 1, -1, 0, 2], 4) == [2 / 4, None, 1.0, None]
    assert state.task_totals([0, 1, -1, 0, 2], 4) == [4, 0, 1, 0]


@given(samples)
def test_any_partition_gives_the_same_state(drawn: list[tuple[int, int, int]]) -> None:
    whole = state_of([(a, b) for a, b, _ in drawn])
    parts = [state_of([(a, b) for a, b, part in drawn if part == k]) for k in range(4)]
    left = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    right = parts[3] + (parts[2] + (parts[1] + parts[0]))
    assert left == right == whole
    assert hash(left) == hash(whole)
    assert left.per_task([0, 0, 1, 1, 2], 3) == whole.per_task([0, 0, 1, 1, 2], 3)


def test_update_leaves_the_old_state() -> None:
    before = AccuracyState.empty(2)
    after = before.update([0, 1], [0, 0])
    assert before.total.tolist() == [0, 0]
    assert after.total.tolist() == [1, 1]
    assert before != after
    with pytest.raises(ValueError, match="read-only"):
        after.total[0] = 5


def test_no_samples() -> None:
    state = AccuracyState.empty(2).update([], [])
    assert state.accuracy() is None
    assert state.per_class() == state.per_task([0, 1], 2) == [None, None]


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], "2 labels but 1"),
        ([0, 2], [0, 0], "labels lie in"),
        ([-1], [0], "labels lie in"),
        ([0.0], [0.0], "integer"),
        ([[0]], [[0]], "integer"),
    ],
)
def test_wrong_batches(labels: list[int], predictions: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccuracyState.empty(2).update(labels, predictions)


def test_wrong_states_and_columns() -> None:
    with pytest.raises(ValueError, match="cannot add 3 classes to 2"):
        AccuracyState.empty(2) + AccuracyState.empty(3)
    with pytest.raises(ValueError, match="correct <= total"):
        AccuracyState(np.array([2]), np.array([1]))
    with pytest.raises(ValueError, match="1 entries for 2 classes"):
        AccuracyState.empty(2).per_task([0], 1)
    with pytest.raises(ValueError, match="tasks lie in"):
        AccuracyState.empty(2).per_task([0, 2], 2)
