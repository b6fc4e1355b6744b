"""Runs that die by SIGKILL at exact and at random points, and go on to the same bits."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from fedcl import random as counter
from fedcl.records.runfolder import RunFolder

STEP = "fedcl.local.training:gather"
RENAME = "fedcl.records.files:replace"
WRITE = "fedcl.records.files:write_bytes"
CHECKPOINT = "checkpoints/"
RANDOM_POINTS = {"replay+fedewc": 3, "everything": 5, "private parts, convolutions": 4, "adaptive server": 2}


@pytest.mark.slow
def test_killed_anywhere_goes_on_to_the_same_bits(lab: Any) -> None:
    stack = "everything"
    whole, points = lab.whole(stack)
    assert points > 100
    kills = {
        "first step": lab.kill(STEP, 1),
        "mid-round": lab.kill(STEP, 23),
        "between write and rename of the first checkpoint": lab.kill(RENAME, 1, match=CHECKPOINT),
        "between write and rename of a later checkpoint": lab.kill(RENAME, 4, match=CHECKPOINT),
        "after the rename, before older ones are removed": lab.kill(RENAME, 3, match=CHECKPOINT, when="after"),
        "half a tensor file of a checkpoint written": lab.kill(WRITE, 5, match="state.safetensors", action="tear"),
        "half a client state written": lab.kill(WRITE, 9, match="clients/", action="tear"),
        "between the clients of a round": lab.kill(RENAME, 5, match="clients/"),
        "while the matrix is replaced": lab.kill(RENAME, 2, match="accuracy_matrix"),
        "before the summary": lab.kill(RENAME, 1, match="summary.json"),
    }
    for name, fault in kills.items():
        folder, answer = lab.start(lab.settings(stack), fault)
        assert answer["signal"] == signal.SIGKILL, name
        again = lab.resume(folder)
        assert (again["code"], again["error"]) == (0, ""), name
        assert lab.results(folder) == whole, name


@pytest.mark.slow
@pytest.mark.parametrize("stack", RANDOM_POINTS)
def test_killed_at_random_points_goes_on_to_the_same_bits(lab: Any, stack: str) -> None:
    assert set(RANDOM_POINTS) == set(lab.stacks)
    whole, points = lab.whole(stack)
    drawn = counter.sample(points, RANDOM_POINTS[stack], "resume", stack)
    print(f"{stack}: killed at {drawn} of {points}")
    for point in drawn:
        folder, answer = lab.start(
            lab.settings(stack), {"functions": lab.everything, "at": point + 1, "action": "kill"}
        )
        assert answer["signal"] == signal.SIGKILL
        if not (folder / "config.yaml").exists():
            assert "the folder of a run" in lab.resume(folder)["error"]
            continue
        assert lab.resume(folder)["error"] == "", point
        assert lab.results(folder) == whole, point


def test_killed_again_and_again_goes_on_to_the_same_bits(lab: Any) -> None:
    whole, _ = lab.whole("everything")
    folder, answer = lab.start(lab.settings("everything"), lab.kill(STEP, 11))
    deaths = 0
    while answer["signal"] == signal.SIGKILL:
        deaths += 1
        answer = lab.resume(folder, lab.kill(STEP, 15))
    assert deaths > 2
    assert lab.results(folder) == whole
    events = RunFolder.view(folder).events()
    assert {e["attempt"] for e in events} >= {deaths + 1}
    rounds = [(e["task"], e["round"]) for e in events if e["event"] == "round"]
    assert sorted(rounds) == [(t, r) for t in range(2) for r in range(3)]  # readers see each round once
