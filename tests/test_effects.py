"""Every built-in strategy has a recorded experiment, and the records are what the list asks for."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedcl.metrics.paired import paired_difference

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LIST: Any = OmegaConf.to_container(OmegaConf.load(EXPERIMENTS / "effects" / "list.yaml"))
RECORDED = json.loads((EXPERIMENTS / "results" / "effects.json").read_text())["effects"]


def names() -> list[str]:
    points = entry_points(group="fedcl.strategies")
    return sorted(p.name for p in points if p.value.startswith("fedcl.strategies."))


@pytest.mark.parametrize("name", names())
def test_every_strategy_has_an_effect(name: str) -> None:
    assert name in LIST
    assert name in LIST[name]["method"]


@pytest.mark.parametrize("name", LIST)
def test_the_record_is_of_the_listed_experiment(name: str) -> None:
    record = RECORDED[name]
    assert {k: record[k] for k in LIST[name]} == LIST[name]
    found = paired_difference(record["method_values"], record["ablation_values"])
    assert len(record["seeds"]) == len(record["method_values"]) == 5
    assert record["verdict"] == found.verdict
    assert record["mean"] == pytest.approx(found.mean, abs=1e-12)


def test_the_default_stack_beats_finetune_by_twenty_points() -> None:
    assert RECORDED["stack-against-finetune"]["low"] > 0.2
