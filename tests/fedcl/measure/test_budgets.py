"""Accuracy against memory over runs: AUC-A and AUC-L from their folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import UsageError
from fedcl.measure.budgets import MEGABYTE, Budget, MemoryCurve, memory_curve

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]


def replayed(tiny: Tiny, images: int, seed: int = 0) -> RunResult:
    return tiny({"strategy": ["replay"], "options.replay.budget": images * 64, "seed": seed, "name": f"m{images}"})


def test_the_curve_of_runs_with_growing_budgets(tiny: Tiny) -> None:
    few, more, again = replayed(tiny, 2), replayed(tiny, 9), replayed(tiny, 9, seed=1)
    found = memory_curve([more.folder, few.folder, again.folder.parent.parent])
    assert [b.runs for b in found.budgets] == [1, 2]
    sizes = [b.memory for b in found.budgets]
    assert sizes[0] == few.summary["costs"]["memory_bytes"] == few.summary["costs"]["model_bytes"] + 3 * 2 * 64
    assert sizes[1] == (more.summary["costs"]["memory_bytes"] + again.summary["costs"]["memory_bytes"]) / 2
    width = (sizes[1] - sizes[0]) / 2**20
    for name, area in (("average_incremental_accuracy", found.auc_a), ("average_accuracy", found.auc_l)):
        key = f"{name}_weighted"
        end = (more.summary[key] + again.summary[key]) / 2
        assert area == pytest.approx(width * (few.summary[key] + end) / 2, rel=1e-12)
    assert memory_curve([few.folder]).auc_a is None


def test_the_survey_s_axis() -> None:
    """CIFAR-100, ResNet-32: 2000, 3634, 4900, 6165 and 7431 images are 7.6, 12.4, 16.1, 19.8 and 23.5 MB."""
    sizes = [463_504 * 4 + images * 3072 for images in (2000, 3634, 4900, 6165, 7431)]
    assert [round(size / MEGABYTE, 1) for size in sizes] == [7.6, 12.4, 16.1, 19.8, 23.5]
    flat = MemoryCurve.of(Budget(size, 0.68, 0.5, 1) for size in sizes)
    assert flat.auc_a == pytest.approx(0.68 * 15.9, abs=0.02)  # where the survey's tables lie
    assert flat.auc_l == pytest.approx(0.5 * 15.9, abs=0.02)


def test_what_makes_no_curve_is_refused(tiny: Tiny) -> None:
    one, other = replayed(tiny, 2), tiny({"name": "other"})
    with pytest.raises(UsageError, match=r"one stack; found: finetune; replay"):
        memory_curve([one.folder, other.folder])
    with pytest.raises(UsageError, match=r"one budget only"):
        memory_curve([other.folder, tiny({"optimiser.lr": 0.2}).folder])
    with pytest.raises(UsageError, match=r"costs\.memory_bytes is defined"):
        memory_curve([tiny({"strategy": ["joint"]}).folder])
