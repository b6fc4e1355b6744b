"""Run folders as a finished run leaves them, without the run: for whatever reads many of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedcl.config import load_config, to_yaml

TASKS = 2


@lru_cache
def _settings(given: str) -> tuple[str, tuple[str, ...], str]:
    """The YAML of all settings but name and seed, the stack, the scenario: the same for every seed."""
    config = load_config({"strategy": ["finetune"]}, json.loads(given))
    lines = to_yaml(config).splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(("name:", "seed:")))
    return text, tuple(config.strategy), config.scenario.name


def make_run(
    out: Path, name: str, seed: int, accuracy: float | None, settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> Path:
    """Writes ``out/name/seed-N`` and returns it.

    Args:
        accuracy: average accuracy; forgetting is half of it.
        settings: overrides of the defaults, by dotted key.
        summary: overrides of single entries of ``summary.json``.
    """
    text, strategy, scenario = _settings(json.dumps(settings))
    folder = out / name / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"{text}name: {json.dumps(name)}\nseed: {seed}\n", encoding="utf-8")
    content = {
        "name": name, "seed": seed, "strategy": list(strategy), "scenario": scenario,
        "num_tasks": TASKS, "test_counts": [10, 10], "average_accuracy": accuracy,
        "average_incremental_accuracy": accuracy, "forgetting": None if accuracy is None else accuracy / 2,
        "bytes_up": 1000, "model_sha256": f"{'+'.join(strategy)}-{accuracy}", "status": "done", **summary,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(content))
    (folder / "accuracy_matrix.csv").write_text("0.5,\n0.25,0.75\n")
    return folder
