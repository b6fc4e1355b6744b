"""The presets on the real datasets, cut to their first two tasks and a part of the images; skipped without
FEDCL_DATA_ROOT.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedcl.config import load_config
from fedcl.run import execute
from fedcl.tell.progress import QuietProgress

ROOT = os.environ.get("FEDCL_DATA_ROOT")

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(not ROOT, reason="FEDCL_DATA_ROOT is not set: the real datasets are elsewhere"),
]


@pytest.mark.parametrize(("preset", "classes"), [("mnist", 4), ("cifar100", 20)])
def test_two_tasks_end_above_the_majority_class(preset: str, classes: int, tmp_path: Path) -> None:
    overrides = {
        "scenario.first": 2,
        "data.limit": 300 if preset == "mnist" else 100,
        "federation.rounds": 2 if preset == "mnist" else 1,
        "output.dir": str(tmp_path),
        "output.plots": False,
    }
    result = execute(load_config(preset, overrides), progress=QuietProgress())
    summary = result.summary
    assert summary["status"] == "done"
    assert summary["num_tasks"] == 2
    share = max(summary["test_counts"]) / sum(summary["test_counts"]) / (classes / 2)
    assert summary["average_accuracy_weighted"] > 1.5 * share
    assert [len(row) for row in result.matrix] == [2, 2]
