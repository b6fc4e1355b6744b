"""Intransigence of a run against a bound, from two run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import UsageError
from fedcl.measure.intransigence import intransigence_of

if TYPE_CHECKING:
    from fedcl.run import RunResult

Run = Callable[[Mapping[str, Any]], "RunResult"]


@pytest.mark.parametrize(
    "bound", [{"strategy": ["cumulative"]}, {"strategy": ["joint"]}, {"scenario.name": "cumulative"}]
)
def test_it_is_the_difference_of_the_diagonals(tiny: Run, bound: dict[str, Any]) -> None:
    run, reference = tiny({"scenario.tasks": 3}), tiny({"scenario.tasks": 3, **bound})
    found = intransigence_of(run.folder, reference.folder)
    expected = [(reference.matrix[k][k] or 0.0) - (run.matrix[k][k] or 0.0) for k in range(3)]
    assert found.per_task == pytest.approx(expected)
    assert found.mean == pytest.approx(sum(expected) / 3)


def test_what_does_not_fit_is_refused_in_one_line(tiny: Run, tmp_path: Any) -> None:
    run, bound, other = tiny({}), tiny({"strategy": ["cumulative"], "scenario.tasks": 3}), tiny({"seed": 3})
    for reference, text in (
        (bound.folder, "a run with the same num_tasks: 2, not 3"),
        (other.folder, "a run with strategy cumulative or joint, not finetune"),
        (tmp_path, "the folder of a finished run"),
    ):
        with pytest.raises(UsageError) as caught:
            intransigence_of(run.folder, reference)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
