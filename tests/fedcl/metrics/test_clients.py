"""Metrics over clients, computed by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcl.metrics import clients as cl
from fedcl.metrics.matrix import summary_metrics

A = [[0.8, 0.1, 0.3], [0.9, 0.7, 0.2], [0.3, 0.4, 0.5]]
B = [[0.5, None, 0.0], [0.75, None, 0.25], [1.0, None, 0.75]]
EMPTY: list[list[float | None]] = [[None] * 3 for _ in range(3)]


def test_statistics_by_hand() -> None:
    summary = cl.summarise_clients([0.2, 0.4, None, 0.9], [10, 30, 0, 60])
    assert summary.weighted_mean == pytest.approx(0.68)
    assert summary.mean == pytest.approx(0.5)
    assert summary.std == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 3))
    assert summary.worst_decile == 0.2
    assert (summary.clients, summary.undefined) == (3, 1)


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (20, 2), (31, 4), (70, 7)])
def test_worst_tenth_is_rounded_up(clients: int, worst: int) -> None:
    values = [k / 100 for k in range(clients)]
    lowest = cl.summarise_clients(values[::-1], [1] * clients)
    highest = cl.summarise_clients(values, [1] * clients, worst="highest")
    assert lowest.worst_decile == pytest.approx(sum(values[:worst]) / worst)
    assert highest.worst_decile == pytest.approx(sum(values[-worst:]) / worst)


def test_no_client_has_a_value() -> None:
    assert cl.summarise_clients([None, math.nan], [0, 3]) == cl.ClientSummary(None, None, None, None, 0, 2)
    assert cl.summarise_clients([], []).mean is None


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="client 1 has a value but no test samples"):
        cl.summarise_clients([0.5, 0.0], [3, 0])
    with pytest.raises(ValueError, match="test counts"):
        cl.summarise_clients([0.5, 0.5], [3])
    with pytest.raises(ValueError, match="finite"):
        cl.summarise_clients([math.inf], [3])
    with pytest.raises(ValueError, match="'lowest' or 'highest'"):
        cl.summarise_clients([0.5], [3], worst="both")  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 99)), min_size=1, max_size=40))
def test_bounds(pairs: list[tuple[float, int]]) -> None:
    summary = cl.summarise_clients([a for a, _ in pairs], [n for _, n in pairs])
    low, high = min(a for a, _ in pairs), max(a for a, _ in pairs)
    assert low - 1e-12 <= summary.worst_decile <= summary.mean + 1e-12 <= high + 2e-12
    assert low - 1e-12 <= summary.weighted_mean <= high + 1e-12
    assert 0 <= summary.std <= 0.5 + 1e-12


def test_client_metrics_equal_the_global_ones_when_every_task_is_tested() -> None:
    expected, _ = summary_metrics(A, [0.1, 0.2, 0.3], None)
    found = cl.client_metrics(A, [0.1, 0.2, 0.3])
    assert found == {name: expected[name] for name in found}
    assert found["forgetting"] == pytest.approx(0.45)


def test_client_metrics_over_its_own_tasks() -> None:
    found = cl.client_metrics(B, [0.0, None, 0.125])
    assert found["average_accuracy"] == 0.875
    assert found["average_incremental_accuracy"] == pytest.approx((0.5 + 0.75 + 0.875) / 3)
    assert found["learning_accuracy"] == 0.625
    assert found["forgetting"] == -0.25
    assert found["backward_transfer"] == 0.5
    assert found["forward_transfer"] == 0.125


def test_client_without_samples_has_no_metrics() -> None:
    assert set(cl.client_metrics(EMPTY).values()) == {None}


def test_partly_measured_column_is_an_error() -> None:
    with pytest.raises(ValueError, match="task 1 is undefined in some rows only"):
        cl.client_metrics([[0.5, None], [0.5, 0.5]])


def test_all_clients_by_hand() -> None:
    found = cl.summarise_client_matrices([A, B, EMPTY], [[10, 10, 10], [50, 0, 20], [0, 0, 0]])
    assert found["average_accuracy"].weighted_mean == pytest.approx((0.4 * 30 + 0.875 * 70) / 100)
    assert found["average_accuracy"].worst_decile == pytest.approx(0.4)
    assert found["forgetting"].worst_decile == pytest.approx(0.45)
    assert found["backward_transfer"].worst_decile == pytest.approx(-0.4)
    assert found["forgetting"].undefined == 1
    assert found["forward_transfer"].undefined == 3


def test_wrong_client_matrices() -> None:
    with pytest.raises(ValueError, match="client 1: task 2 has accuracies but no test samples"):
        cl.summarise_client_matrices([A, B], [[1, 1, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match="2 client matrices and 1 rows"):
        cl.summarise_client_matrices([A, B], [[1, 1, 1]])
    with pytest.raises(ValueError, match="1 baselines"):
        cl.summarise_client_matrices([A, A], [[1, 1, 1]] * 2, [[0, 0, 0]])


def test_spatial_and_temporal_forgetting() -> None:
    assert cl.spatial_forgetting([0.9, 0.25, None], [0.4, 0.75, 0.5]) == [0.5, -0.5, None]
    assert cl.temporal_forgetting(A) == pytest.approx([-0.1, 0.3])
    assert cl.temporal_forgetting(B) == [-0.25, None]
    assert cl.temporal_forgetting([[0.5]]) == []
    with pytest.raises(ValueError, match="shared accuracy"):
        cl.spatial_forgetting([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="local accuracy"):
        cl.spatial_forgetting(np.array([50.0]), [0.5])
