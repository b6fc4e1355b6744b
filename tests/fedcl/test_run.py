"""Whole runs: repetition, agreement with plain centralised training, settings, and a start from elsewhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from fedcl.config import Config, load_config
from fedcl.errors import UsageError
from fedcl.records.runfolder import RunFolder
from fedcl.run import run

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
HASHES = ("model_sha256", "state_sha256", "split_sha256")
STACK = {
    "strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning", "replay"],
    "federation.batch_min": 2,
}


def hashes(result: RunResult) -> list[str]:
    return [result.summary[name] for name in HASHES]


def without_time(result: RunResult) -> dict[str, Any]:
    return {n: v for n, v in result.summary.items() if n not in ("wall_seconds", "measured")}


# the same numbers again


@pytest.mark.parametrize("stack", [{"strategy": ["finetune"]}, STACK, {"strategy": ["replay", "fedewc"]}])
def test_same_seed_same_bits_other_seed_other_bits(tiny: Tiny, stack: dict[str, Any]) -> None:
    one, again, other = tiny(stack), tiny(stack), tiny({**stack, "seed": 1})
    assert without_time(one) == without_time(again)
    assert one.matrix == again.matrix
    stateless = stack["strategy"] == ["finetune"]
    for name in HASHES:
        assert (one.summary[name] != other.summary[name]) or (stateless and name == "state_sha256")


def test_the_stored_config_repeats_the_run(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny({**STACK, "engine.threads": 0, "engine.device": "auto", "engine.dtype": "float32"})
    stored = load_config(first.folder / "config.yaml")
    assert stored.engine.threads > 0
    assert "auto" not in (stored.engine.device, stored.engine.path, stored.engine.memory_format)
    again = run(first.folder / "config.yaml", overrides={"output.dir": str(tmp_path / "again")})
    assert without_time(again) == without_time(first)


@pytest.mark.slow
def test_the_command_line_repeats_a_stored_config(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny({"strategy": ["replay"]})
    command = [
        sys.executable,
        "-m",
        "fedcl",
        "run",
        str(first.folder / "config.yaml"),
        "--out",
        str(tmp_path / "cli"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    again = json.loads(done.stdout)
    assert [again[name] for name in HASHES] == hashes(first)


def test_what_is_not_a_setting_of_the_numbers_changes_none(tiny: Tiny) -> None:
    plain = tiny({})
    for other in ({"evaluate.every": 1}, {"checkpoint.every": 1}, {"evaluate.batch_size": 3}, {"name": "b"}):
        assert hashes(tiny(other)) == hashes(plain), other


def test_summary_numbers_are_finite(tiny: Tiny) -> None:
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for v in value.values():
                walk(v)
        elif isinstance(value, list):
            for v in value:
                walk(v)
        elif isinstance(value, float):
            assert math.isfinite(value)

    walk(tiny({**STACK, "partition.test": "same_mix"}).summary)


# one client is plain training


def literal_training(config: Config) -> dict[str, torch.Tensor]:
    """Cross entropy on an mlp in a plain PyTorch loop with torch's own modules and SGD.

    Only what is random is taken from the engine: initial values, the split and the order of the images.
    """
    from fedcl.build import build
    from fedcl.local.order import plan

    experiment = build(config)
    node, stages = experiment.node, experiment.stream.stages
    linear, head = torch.nn.Linear(64, 8).double(), None
    linear.load_state_dict(
        {
            n.removeprefix("encoder.1.").removeprefix("encoder.0."): a
            for n, a in experiment.initial.items()
            if n.startswith("encoder.")
        }
    )
    store = node.store
    for task, stage in enumerate(stages):
        width = len(experiment.stream.known(task))
        grown = torch.nn.Linear(8, width).double()
        with torch.no_grad():
            for name, parameter in grown.named_parameters():
                parameter.copy_(node.grown(f"head.{name}", experiment.initial[f"head.{name}"], width, "initial"))
                if head is not None:
                    parameter[: len(head.bias)] = dict(head.named_parameters())[name]
        head = grown
        ids = torch.from_numpy(experiment.split.train[task][0])
        assert sorted(ids.tolist()) == sorted(stage.train_ids.tolist())
        for round_ in range(config.federation.rounds):
            parameters = [*linear.parameters(), *head.parameters()]
            optimiser = torch.optim.SGD(parameters, lr=config.optimiser.lr, momentum=0.9, weight_decay=1e-3)
            batches, _ = plan(len(ids), config, (config.seed, "client", 0, task, round_))
            for picked in batches:
                rows = ids[picked]
                x, y = store.batch(rows, torch.float64), store.label_tensor[rows]
                logits = head(F.relu(linear(x.flatten(1))))
                optimiser.zero_grad()
                F.cross_entropy(logits, y).backward()
                optimiser.step()
    assert head is not None
    return {"encoder": linear.weight.detach(), "head": head.weight.detach(), "bias": head.bias.detach()}


def test_one_client_is_plain_centralised_training(tiny: Tiny) -> None:
    overrides = {
        "federation.clients": 1,
        "federation.epochs": 3,
        "data.limit": 40,
        "optimiser.weight_decay": 1e-3,
    }
    result = tiny(overrides)
    expected = literal_training(load_config(result.folder / "config.yaml"))
    arrays = dict(result.model.named_parameters())
    weight = next(a for n, a in arrays.items() if n.startswith("encoder.") and n.endswith("weight"))
    assert (weight - expected["encoder"]).abs().max() < 1e-8
    assert (arrays["head.weight"] - expected["head"]).abs().max() < 1e-8
    assert (arrays["head.bias"] - expected["bias"]).abs().max() < 1e-8
    assert (
        hashes(tiny({**overrides, "strategy": ["joint"], "scenario.tasks": 1}))[0]
        == hashes(tiny({**overrides, "scenario.tasks": 1}))[0]
    )


# federation and optimiser settings


def test_partial_participation_samples_the_stated_cohort(tiny: Tiny) -> None:
    result = tiny({"federation.clients": 6, "federation.participation": 0.5, "federation.rounds": 4})
    rounds = [e for e in RunFolder.view(result.folder).events() if e["event"] == "round"]
    assert [e["clients"] for e in rounds] == [3] * 8
    assert len({e["samples"] for e in rounds}) > 2  # other clients each time
    assert tiny({"federation.clients": 6, "federation.participation": 0.01}).summary["bytes_up"] > 0  # never nobody


def test_steps_in_place_of_epochs(tiny: Tiny) -> None:
    result = tiny({"federation.epochs": None, "federation.steps": 7})
    rounds = [e for e in RunFolder.view(result.folder).events() if e["event"] == "round"]
    assert [e["steps"] for e in rounds] == [3 * 7] * 4


def test_uniform_weighting_differs_from_weighting_by_samples(tiny: Tiny) -> None:
    assert hashes(tiny({"federation.weighting": "uniform"}))[0] != hashes(tiny({}))[0]
    one = {"federation.clients": 1}
    pair = [tiny({**one, "federation.weighting": w}).model.state_dict() for w in ("uniform", "samples")]
    assert all(torch.allclose(pair[0][n], pair[1][n], rtol=1e-10, atol=1e-12) for n in pair[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"optimiser.name": "adam", "optimiser.lr": 0.01},
        {"optimiser.name": "adamw", "optimiser.lr": 0.01, "optimiser.weight_decay": 0.1},
        {"optimiser.nesterov": True},
        {"optimiser.clip": 0.01},
        {"optimiser.schedule": "cosine", "optimiser.per": "step"},
        {"optimiser.schedule": "linear", "optimiser.per": "round"},
        {"optimiser.schedule": "step", "optimiser.milestones": [1], "optimiser.per": "task"},
        {"optimiser.warmup": 2},
    ],
)
def test_each_optimiser_setting_runs_and_acts(tiny: Tiny, settings: dict[str, Any]) -> None:
    result = tiny({**settings, "name": "it"})
    assert result.summary["status"] == "done"
    assert hashes(result)[0] != hashes(tiny({}))[0]


def test_a_schedule_over_rounds_is_the_stated_rate(tiny: Tiny) -> None:
    """With linear decay to 0 over one round a task of two, the second round trains at half the rate."""
    linear = tiny(
        {"optimiser.schedule": "linear", "federation.clients": 1, "scenario.tasks": 1, "federation.rounds": 1}
    )
    constant = tiny({"federation.clients": 1, "scenario.tasks": 1, "federation.rounds": 1})
    assert hashes(linear)[0] == hashes(constant)[0]  # the first round has the whole rate


# a start from elsewhere


def test_init_from_another_runs_base_session(tiny: Tiny) -> None:
    from safetensors.torch import load_file

    base = tiny({"name": "base"})
    encoder = load_file(base.folder / "base.safetensors")
    settings = {
        "federation.participation": 0.34,
        "federation.rounds": 1,
        "optimiser.lr": 1e-30,
        "scenario.tasks": 1,
    }
    started = tiny({**settings, "init": f"{base.folder}@task0"})
    arrays = started.model.state_dict()
    for name in (n for n in encoder if n.startswith("encoder.")):
        assert torch.allclose(arrays[name], encoder[name], atol=1e-20)
    assert not torch.allclose(arrays["head.weight"][:5], encoder["head.weight"])  # the head is the run's own
    assert (
        hashes(tiny({**settings, "init": str(base.folder / "base.safetensors"), "name": "f"}))[0] == hashes(started)[0]
    )
    final = tiny({**settings, "init": str(base.folder), "name": "g"})
    assert hashes(final)[0] != hashes(started)[0]  # a folder alone is its last state


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere@task0", "does not exist"),
        ("nowhere.safetensors", "does not exist"),
        ("nowhere@task3", "RUN@task0"),
    ],
)
def test_init_from_nowhere_is_a_usage_error(tiny: Tiny, source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        tiny({"init": source})
    assert caught.value.key == "init"


def test_init_of_another_width_is_a_usage_error(tiny: Tiny) -> None:
    base = tiny({"name": "base"})
    with pytest.raises(UsageError, match="shape"):
        tiny({"init": f"{base.folder}@task0", "model.width": 16})
