"""Metrics of a run beside its matrix: by hand, and as they stand in the summary of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl.metrics.forgetting import forgetting_per_class
from fedcl.metrics.of_run import anytime_of, class_summary, class_table, per_class_forgetting, run_metrics
from fedcl.records.runfolder import RunFolder

if TYPE_CHECKING:
    from fedcl.run import RunResult

Run = Callable[[Mapping[str, Any]], "RunResult"]

TESTED = [[0, [8, 0, 0], [10, 0, 0]], [1, [4, 3, 0], [10, 5, 0]], [2, [6, 0, 1], [10, 5, 2]]]


def test_classes_by_hand() -> None:
    assert class_table(TESTED) == [[0.8, None, None], [0.4, 0.6, None], [0.6, 0.0, 0.5]]
    lost = per_class_forgetting(class_table(TESTED))
    assert lost == [pytest.approx(0.2), pytest.approx(0.6), None]
    found = class_summary(TESTED)
    assert found["accuracy"] == {
        "weighted_mean": pytest.approx(7 / 17), "mean": pytest.approx(1.1 / 3), "worst_decile": 0.0,
        "std": pytest.approx(float(np.std([0.6, 0.0, 0.5]))), "classes": 3, "undefined": 0,
    }  # fmt: skip
    assert found["forgetting"] == {
        "weighted_mean": pytest.approx((2 + 3) / 15), "mean": pytest.approx(0.4), "worst_decile": pytest.approx(0.6),
        "std": pytest.approx(0.2), "classes": 2, "undefined": 1,
    }  # fmt: skip
    values, undefined = run_metrics({"by_class": TESTED})
    assert values == {"anytime_accuracy": None, "forgetting_per_class": pytest.approx(0.4)}
    assert undefined == ["anytime_accuracy"]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_mean_over_classes_is_that_of_i_blurry(data: st.DataObject) -> None:
    tasks, classes = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 6))
    first = data.draw(st.lists(st.integers(0, tasks - 1), min_size=classes, max_size=classes))
    cell = st.integers(0, 20).map(lambda n: n / 20)
    table = [[data.draw(cell) if first[c] <= t else None for c in range(classes)] for t in range(tasks)]
    lost = [value for value in per_class_forgetting(table) if value is not None]
    mean = forgetting_per_class(table)
    assert mean is None if not lost else mean == pytest.approx(sum(lost) / len(lost))


def test_the_area_by_hand() -> None:
    assert anytime_of([]) is None
    assert anytime_of([[10, None], [20, 0.5]]) is None
    assert anytime_of([[0, 0.3], [10, 0.5], [10, 0.9], [40, 0.25]]) == pytest.approx((10 * 0.5 + 30 * 0.25) / 40)


@pytest.mark.parametrize("passes", ["many", "once"])
def test_the_area_of_a_run_is_that_of_its_rounds(tiny: Run, passes: str) -> None:
    result = tiny({"federation.rounds": 5, "evaluate.every": 2, "federation.passes": passes})
    done = [e for e in RunFolder.view(result.folder).events() if e["event"] == "round"]
    seen = np.cumsum([e["samples"] for e in done]).tolist()
    points = [(n, e["accuracy_seen"]) for n, e in zip(seen, done, strict=True) if "accuracy_seen" in e]
    assert len(points) == 4
    area = sum(a * (n - before) for (n, a), before in zip(points, [0, *(n for n, _ in points)], strict=False))
    assert result.summary["anytime_accuracy"] == pytest.approx(area / points[-1][0])
    assert "anytime_accuracy" not in result.summary["undefined"]


def test_without_evaluations_within_tasks_it_is_null_and_named(tiny: Run) -> None:
    summary = tiny({}).summary
    assert summary["anytime_accuracy"] is None
    assert "anytime_accuracy" in summary["undefined"]


def test_the_summary_of_a_few_shot_run_has_what_the_field_reports(tiny: Run) -> None:
    result = tiny({"scenario.name": "few_shot", "scenario.base": 6, "scenario.increment": 2, "scenario.shots": 3})
    summary, counts = result.summary, np.array(result.summary["test_counts"])
    rows = [[cell or 0.0 for cell in row] for row in result.matrix]
    sessions = [float((np.array(row) * counts)[: i + 1].sum() / counts[: i + 1].sum()) for i, row in enumerate(rows)]
    assert summary["session_accuracy"] == pytest.approx(sessions)
    assert summary["performance_drop"] == pytest.approx(sessions[0] - sessions[-1])
    base, novel = rows[-1][0], float((np.array(rows[-1]) * counts)[1:].sum() / counts[1:].sum())
    assert summary["harmonic_accuracy"] == pytest.approx(2 * base * novel / (base + novel) if base + novel else 0.0)
    for name in ("learning_accuracy", "stability", "stability_plasticity", "temporal_forgetting"):
        assert summary[name] is not None


def test_a_task_that_exposes_nothing_is_named_at_the_start_and_in_the_summary(tiny: Run) -> None:
    result = tiny({"scenario.name": "linear_blurry", "scenario.overlap": 0.5, "scenario.tasks": 3})
    assert result.summary["untested_tasks"] == [2]
    assert result.summary["average_accuracy"] is None
    assert result.summary["average_accuracy_weighted"] is not None
    assert result.summary["forgetting_per_class"] is not None
    warned = [e["message"] for e in RunFolder.view(result.folder).events() if e["event"] == "warning"]
    assert [text for text in warned if text.startswith("task 3 exposes no new class")] == warned[:1]
