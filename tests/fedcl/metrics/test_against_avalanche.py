"""The same numbers as Avalanche's own metric classes, where its definitions agree with ours."""

import numpy as np
import pytest
import torch

from fedcl.bridges.avalanche_import import quiet_avalanche
from fedcl.metrics import AccuracyState
from fedcl.metrics import matrix as mx

quiet_avalanche()  # a plain import would write to the home folder

from avalanche.evaluation.metrics import BWT, Accuracy, Forgetting, ForwardTransfer  # noqa: E402
from avalanche.evaluation.metrics.cumulative_accuracies import CumulativeAccuracy  # noqa: E402

CLASS_ORDER = [4, 1, 0, 5, 3, 2]
COLUMN_OF_CLASS = [1, 0, 2, 2, 0, 1]
TASKS = 3


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    """Test samples of six classes; unequal counts, so that weighted and plain means differ."""
    return torch.repeat_interleave(torch.arange(6), torch.tensor([40, 10, 25, 30, 5, 60]))


@pytest.fixture(scope="module")
def logits(labels: torch.Tensor) -> list[torch.Tensor]:
    """Scores of the untrained model and after each of three tasks, the true class raised unevenly."""
    generator = torch.Generator().manual_seed(5)
    gains = [[0.0] * 3, [1.2, 0.0, 0.3], [2.2, 2.0, 0.6], [0.8, 0.4, 2.5]]
    columns = torch.tensor(COLUMN_OF_CLASS)[labels]
    scores = []
    for gain in gains:
        noise = torch.randn(len(labels), 6, generator=generator)
        noise[torch.arange(len(labels)), labels] += torch.tensor(gain)[columns]
        scores.append(noise)
    return scores


@pytest.fixture(scope="module")
def states(labels: torch.Tensor, logits: list[torch.Tensor]) -> list[AccuracyState]:
    return [AccuracyState.empty(6).update(labels, scores.argmax(1)) for scores in logits]


@pytest.fixture(scope="module")
def matrix(states: list[AccuracyState]) -> np.ndarray:
    return mx.as_matrix([state.per_task(COLUMN_OF_CLASS, TASKS) for state in states[1:]])


def test_matrix_has_a_late_maximum(matrix: np.ndarray) -> None:
    assert not np.allclose(matrix, matrix.T)
    assert matrix[1, 0] > matrix[0, 0] > matrix[2, 0]
    assert mx.forgetting(matrix) > mx.forgetting_first_last(matrix) + 0.05


def test_entries_are_avalanche_accuracies(labels: torch.Tensor, logits: list[torch.Tensor], matrix: np.ndarray) -> None:
    columns = torch.tensor(COLUMN_OF_CLASS)[labels]
    for i, scores in enumerate(logits[1:]):
        for j in range(TASKS):
            metric = Accuracy()
            metric.update(scores[columns == j], labels[columns == j])
            assert matrix[i, j] == pytest.approx(metric.result(), abs=1e-12)


def test_weighted_average_is_the_accuracy_over_the_stream(
    labels: torch.Tensor, logits: list[torch.Tensor], matrix: np.ndarray, states: list[AccuracyState]
) -> None:
    metric = Accuracy()
    for start in range(0, len(labels), 7):
        metric.update(logits[-1][start : start + 7], labels[start : start + 7])
    counts = states[-1].task_totals(COLUMN_OF_CLASS, TASKS)
    assert mx.average_accuracy_weighted(matrix, counts) == pytest.approx(metric.result(), abs=1e-12)
    assert states[-1].accuracy() == pytest.approx(metric.result(), abs=1e-12)
    assert mx.average_accuracy(matrix) != pytest.approx(metric.result(), abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_and_backward_transfer(seed: int) -> None:
    r = np.random.Generator(np.random.Philox(seed)).random((6, 6))
    forgetting, transfer = Forgetting(), BWT()
    for i in range(6):
        for j in range(i + 1):
            for metric in (forgetting, transfer):
                metric.update(j, r[i, j], initial=i == j)
    lost, gained = (np.mean(list(metric.result().values())) for metric in (forgetting, transfer))
    assert mx.forgetting_first_last(r) == pytest.approx(lost, abs=1e-12)
    assert mx.backward_transfer(r) == pytest.approx(gained, abs=1e-12)
    assert mx.per_task_backward_transfer(r) == pytest.approx([transfer.result_key(j) for j in range(5)])
    assert mx.forgetting(r) > mx.forgetting_first_last(r)


@pytest.mark.parametrize("seed", range(5))
def test_forward_transfer(seed: int) -> None:
    generator = np.random.Generator(np.random.Philox(seed))
    r, baseline = generator.random((5, 5)), generator.random(5)
    metric = ForwardTransfer()
    for j in range(5):
        metric.update(j, baseline[j], initial=True)
    for i in range(4):
        metric.update(i + 1, r[i, i + 1])
    expected = np.mean(list(metric.result().values()))
    assert mx.forward_transfer(r, baseline) == pytest.approx(expected, abs=1e-12)


def test_cumulative_forgetting(labels: torch.Tensor, logits: list[torch.Tensor]) -> None:
    """Entries are Avalanche's cumulative accuracies; the mean is that of Soutif-Cormerais et al."""
    splits = {j: set(CLASS_ORDER[: 2 * j + 2]) for j in range(TASKS)}
    rows = []
    for scores in logits[1:]:
        metric = CumulativeAccuracy()
        metric.update(splits, scores, labels)
        rows.append([metric.result()[j] for j in range(TASKS)])
    expected = np.mean([max(rows[i][j] for i in range(j, TASKS)) - rows[-1][j] for j in range(TASKS)])
    assert mx.cumulative_forgetting(rows) == pytest.approx(expected, abs=1e-12)
    assert expected > 0
