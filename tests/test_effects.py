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

# Effects that a test measures again, those with a wide margin among the methods that the project exists for.
FLAGSHIPS = ("stack-against-finetune", "amgc", "efc", "efc_pp", "fedhyper", "pec", "prd", "slca")


def names() -> list[str]:
    points = entry_points(group="fedcl.strategies")
    return sorted(p.name for p in points if p.value.startswith("fedcl.strategies."))


@pytest.mark.parametrize("name", names())
def test_every_strategy_has_an_effect(name: str) -> None:
    assert name in LIST
    assert name in LIST[name]["method"]


@pytest.mark.parametrize("name", LIST)
def test_the_record_is_of_the_listed_experiment(name: str) -> None:
    if name not in RECORDED:
        pytest.skip(f"not recorded yet: python -m fedcl.experiments.effects {name}")
    record = RECORDED[name]
    assert {k: record[k] for k in LIST[name]} == LIST[name]
    both = [record["method_values"], record["ablation_values"]]
    found = paired_difference(*(both[::-1] if LIST[name].get("better") == "lower" else both))
    assert len(record["seeds"]) == len(record["method_values"]) == 5
    assert record["verdict"] == found.verdict
    assert record["mean"] == pytest.approx(found.mean, abs=1e-12)


def test_an_encoder_is_trained_once_and_others_start_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcl.build import build
    from fedcl.config import load_config
    from fedcl.experiments.effects.__main__ import pretrained

    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path / "cache"))
    preset = tmp_path / "small.yaml"
    preset.write_text(
        "presets: [pretrain]\nname: small\ndata: {name: digits, limit: 4, augment: []}\nmodel: {name: mlp, width: 4}\n"
    )
    start = pretrained(str(preset))
    folder = Path(start.removesuffix("@task0"))
    assert folder.is_relative_to(tmp_path / "cache" / "pretrained")
    written = (folder / "summary.json").stat().st_mtime_ns
    assert pretrained.__wrapped__(str(preset)) == start
    assert (folder / "summary.json").stat().st_mtime_ns == written
    settings = {"strategy": ["simplecil"], "model.width": 4, "model.norm": "batch", "data.limit": 4, "data.augment": []}
    encoders = [build(load_config(None, {**settings, **more})).initial for more in ({"init": start}, {})]
    assert not any(
        encoders[0][n].equal(encoders[1][n]) for n in encoders[0] if n.endswith(("1.weight", "running_mean"))
    )
    preset.write_text(preset.read_text().replace("limit: 4", "limit: 5"))
    assert pretrained.__wrapped__(str(preset)) != start


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_a_flagship_is_ahead_of_its_ablation(name: str) -> None:
    """One seed, measured now: at least half of what five seeds showed in the least."""
    from fedcl.experiments.effects.__main__ import effect

    entry = LIST[name]
    found = effect({**entry, "seeds": entry.get("seeds", [0])[:1]}, memo={})
    assert found["mean"] > RECORDED[name]["low"] / 2 > 0
