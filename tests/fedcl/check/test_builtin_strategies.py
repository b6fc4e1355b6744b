"""Every strategy of this project passes the checks that no test of its own makes."""

from __future__ import annotations

import pytest

from fedcl import registry
from fedcl.check import check_strategy

# Resuming, stacking, nodes and edges have tests for all stacks elsewhere; `fedcl check NAME` makes all of them.
CHECKS = ("card", "options", "hooks", "runs", "uploads", "state", "inputs", "self", "neutral")
OWN = [entry.name for entry in registry.entries("strategies") if entry.origin == "fedcl-sim"]


@pytest.mark.parametrize("name", OWN)
def test_a_strategy_passes(name: str) -> None:
    report = check_strategy(registry.load("strategies", name), only=CHECKS)
    assert report.ok, report.text()


def test_those_with_a_weight_say_when_they_are_neutral() -> None:
    assert {name for name in OWN if registry.load("strategies", name).neutral is not None} >= {
        "fedewc", "fedlwf", "fedprox", "nearest_mean", "replay", "supcon",
    }  # fmt: skip
