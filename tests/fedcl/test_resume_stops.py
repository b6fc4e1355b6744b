"""Runs that are interrupted, fill the disk or fail at exact points, and go on to the same bits."""

from __future__ import annotations

import json
from typing import Any

import pytest

STEP = "fedcl.local.training:gather"
RENAME = "fedcl.records.files:replace"
WRITE = "fedcl.records.files:write_bytes"
CHECKPOINT = "checkpoints/"


@pytest.mark.parametrize("step", [1, 17, 34])
def test_interrupt_finishes_the_step_saves_and_names_resume(lab: Any, step: int) -> None:
    whole, _ = lab.whole("everything")
    settings = {**lab.settings("everything"), "checkpoint": {"every": 0, "keep": 2}}
    folder, answer = lab.start(settings, lab.kill(STEP, step, action="interrupt1"))
    assert answer["code"] == 130
    assert answer["error"] == f"interrupted; go on with: fedcl resume {folder}"
    assert answer["calls"] == [step]  # no further step
    assert any("stopping after this step" in m for m in answer["messages"])
    assert list((folder / "checkpoints").glob("*/meta.json"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["average_accuracy"] is None
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole


def test_interrupt_during_evaluation(lab: Any) -> None:
    whole, _ = lab.whole("everything")
    fault = lab.kill("fedcl.measure.evaluation:Evaluator.predict", 5, action="interrupt1")
    folder, answer = lab.start(lab.settings("everything"), fault)
    assert answer["code"] == 130
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole


def test_second_interrupt_stops_at_once_and_leaves_a_valid_checkpoint(lab: Any) -> None:
    whole, _ = lab.whole("everything")
    folder, answer = lab.start(lab.settings("everything"), lab.kill(STEP, 33, action="interrupt2"))
    assert (answer["code"], answer["calls"]) == (130, [33])
    assert "fedcl resume" in answer["error"]
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole


def test_second_interrupt_while_the_checkpoint_of_the_first_is_saved(lab: Any) -> None:
    whole, _ = lab.whole("everything")
    faults = [
        lab.kill(STEP, 33, action="interrupt1"),
        lab.kill(RENAME, 4, match=CHECKPOINT, action="interrupt1"),
    ]
    folder, answer = lab.start(lab.settings("everything"), *faults)
    assert answer["code"] == 130
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole


@pytest.mark.parametrize(
    ("match", "at"),
    [("checkpoints/", 5), ("clients/", 7), ("accuracy_matrix", 1), ("rounds.csv", 2), ("summary", 1)],
)
def test_a_full_disk_is_one_clear_line_and_loses_nothing(lab: Any, match: str, at: int) -> None:
    whole, _ = lab.whole("everything")
    fault = {"functions": [WRITE], "match": match, "at": at, "action": "full", "ever_after": True}
    folder, answer = lab.start(lab.settings("everything"), fault)
    assert answer["code"] == 1
    assert "no space left on the disk" in answer["error"]
    assert match in answer["error"]
    assert "\n" not in answer["error"]
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole


def test_a_disk_that_is_full_for_everything_says_what_came_first(lab: Any) -> None:
    whole, _ = lab.whole("everything")
    fault = {"functions": [WRITE, "fedcl.records.events:_append"], "at": 40, "action": "full", "ever_after": True}
    folder, answer = lab.start(lab.settings("everything"), fault)
    assert answer["code"] == 1
    assert answer["error"].count("cannot write") == 1
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole


def test_a_failed_run_can_be_resumed_once_the_cause_is_gone(lab: Any) -> None:
    whole, _ = lab.whole("replay+fedewc")
    fault = {"functions": ["fedcl.federation.server:merge_measured"], "at": 3, "action": "full"}
    folder, answer = lab.start(lab.settings("replay+fedewc"), fault)
    assert answer["code"] != 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert lab.resume(folder)["error"] == ""
    assert lab.results(folder) == whole
