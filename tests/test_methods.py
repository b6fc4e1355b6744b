"""The bench of methods: every class-incremental strategy takes part, every run can be built, the page is true."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf

from fedcl.errors import RunFailed

if TYPE_CHECKING:
    from fedcl.run import RunResult

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RUNS: Any = OmegaConf.to_container(OmegaConf.load(EXPERIMENTS / "methods.yaml").sweep.runs)
# About clients that differ, not about tasks that follow each other.
FAMILIES = {"federated", "personalised", "hypernetwork", "heterogeneity"}
LEFT_OUT = {
    **dict.fromkeys(("aper", "fsa", "simplecil", "teen"), "for an encoder that was trained before"),
    **dict.fromkeys(("barlow_twins", "byol", "dcl", "simclr", "simsiam", "vicreg"), "for images without labels"),
    **dict.fromkeys(("metric_loss", "view_loss"), "losses of other libraries"),
    "avalanche": "its plugins that have adapters take part by themselves",
    "fedproto": "about clients that differ",
    "fot": "tasks are known at test",
    "temperature_scaling": "leaves every decision as it is",
}


def stack(entry: dict[str, Any]) -> list[str]:
    return [entry["strategy"]] if isinstance(entry["strategy"], str) else entry["strategy"]


def test_every_class_incremental_method_takes_part() -> None:
    points = [p for p in entry_points(group="fedcl.strategies") if p.value.startswith("fedcl.strategies.")]
    wanted = {p.name for p in points if p.value.split(".")[2] not in FAMILIES}
    there = {name for entry in RUNS for name in stack(entry)}
    assert wanted - there == set(LEFT_OUT)


@pytest.mark.parametrize("entry", RUNS, ids=lambda entry: entry["name"])
def test_every_run_can_be_built(entry: dict[str, Any]) -> None:
    from fedcl.build import build
    from fedcl.config import load_config
    from fedcl.records.runs import flat

    own = {key: value for key, value in entry.items() if key not in ("name", "strategy")}
    build(load_config("stream-digits", {"strategy": stack(entry), **flat(own)}))


def test_the_page_ranks_what_was_measured(tiny: Callable[..., RunResult], tmp_path: Path) -> None:
    from fedcl.experiments.methods.__main__ import measured, streams, table
    from fedcl.records.runs import find_runs

    for name, settings in (
        ("finetune", {}),
        ("known", {"strategy": ["cumulative"]}),
        ("joint", {"strategy": ["joint"]}),
    ):
        for seed in (0, 1):
            tiny({**settings, "seed": seed, "name": f"{name},stream", "output.dir": str(tmp_path)})
    found = streams(find_runs([tmp_path]).runs)
    assert list(found) == ["digits"]
    result = measured(found["digits"], "finetune")
    means = [row["average_accuracy"]["mean"] for row in result["rows"]]
    assert means == sorted(means, reverse=True)
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["finetune"]["against"] is None
    gap = rows["known"]["average_accuracy"]["mean"] - rows["finetune"]["average_accuracy"]["mean"]
    assert rows["known"]["against"]["mean"] == pytest.approx(gap)
    assert rows["joint"]["bytes_up"] is None
    assert rows["joint"]["keeps"] == "all images (bound)"
    lines = table(result["rows"], "finetune").splitlines()
    assert len(lines) == 2 + len(rows)
    assert "| - |" in next(line for line in lines if "joint" in line)
    with pytest.raises(RunFailed, match="0 methods are called 'nobody'"):
        measured(found["digits"], "nobody")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["joint"], "all images (bound)"), (["cumulative"], "all images (bound)"), (["replay", "supcon"], "images"),
        (["avalanche_replay"], "images"), (["target"], "made images"), (["target", "replay"], "images"),
        (["fedlwf", "ccvr"], "no images"),
    ],
)  # fmt: skip
def test_what_a_stack_keeps(names: list[str], says: str) -> None:
    from fedcl.experiments.methods.__main__ import keeps

    assert keeps(names) == says
