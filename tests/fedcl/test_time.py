"""Runs with clocks of the clients' own, absent clients and growing federations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedcl import registry
from fedcl.build import build
from fedcl.cards import render_card
from fedcl.errors import UsageError
from fedcl.federation.call import Call, Header
from fedcl.local.stacked import train_cohort
from fedcl.local.training import train_client
from fedcl.records.checkpoint import unpack_tensors
from fedcl.settings import schema as settings
from fedcl.streams.clocks import own_order

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], "Config"]
ASYNCHRONOUS = {"time.order": "asynchronous", "partition.min_size": 0}
OWN = {"time.order": "client_specific", "time.classes": 2, "time.shared": 0.25, "partition.min_size": 0}


def seed_of(*orders: list[int]) -> int:
    """The first seed with which the clients meet the tasks in these orders."""
    wanted = list(orders)
    time, tasks = settings.Time(order="asynchronous"), len(wanted[0])
    return next(s for s in range(10**4) if [own_order(time, tasks, k, s) for k in range(len(wanted))] == wanted)


@pytest.mark.parametrize("path", ["stacked", "sequential"])
def test_orders_that_are_all_the_common_one_are_the_run_in_step(path: str, tiny: Tiny) -> None:
    more = {
        "seed": seed_of([0, 1], [0, 1]), "federation.clients": 2, "strategy": ["fedlwf", "nearest_mean", "replay"],
        "engine.path": path, "model.head_allocate": "all", "partition.test": "same_mix", "evaluate.every": 1,
    }  # fmt: skip
    step, own = tiny(more), tiny({**more, **ASYNCHRONOUS})
    assert own.matrix == step.matrix
    differ = {"config", "wall_seconds", "own_tasks", "test_counts", "split_sha256", "measured", "session_accuracy"}
    kept = [key for key in step.summary if key not in differ and "weighted" not in key]
    assert {k: own.summary[k] for k in kept} == {k: step.summary[k] for k in kept}
    assert own.summary["own_tasks"]["average_accuracy"]["mean"] == pytest.approx(step.summary["average_accuracy"])
    assert (own.folder / "rounds.csv").read_text() == (step.folder / "rounds.csv").read_text()


def logits_of(experiment: Any, arrays: dict[str, torch.Tensor]) -> np.ndarray:
    node = experiment.node
    rows = torch.arange(len(experiment.stream.test_labels))
    with torch.no_grad():
        scores: np.ndarray = node.forward(arrays, node.test.batch(rows, node.dtype), "eval").logits.numpy()
    return scores


def test_two_clients_by_hand(tiny: Tiny, tiny_config: TinyConfig) -> None:
    """Accuracies from the models after either task, by a loop over images; then their mean, and forgetting."""
    more = {**ASYNCHRONOUS, "seed": seed_of([0, 1], [1, 0]), "federation.clients": 2, "optimiser.lr": 0.3,
            "federation.rounds": 4, "data.limit": 40}  # fmt: skip
    run, experiment = tiny(more), build(tiny_config(more))
    stream = experiment.stream
    first = unpack_tensors((run.folder / "base.safetensors").read_bytes())
    last = dict(run.model.state_dict())
    orders, tables = ([0, 1], [1, 0]), []
    for order in orders:
        table = []
        for after, arrays in enumerate((first, last)):
            known = sorted({c for task in order[: after + 1] for c in stream.stages[task].classes})
            scores = logits_of(experiment, arrays)
            row = []
            for task in order:
                right = 0
                for image in stream.stages[task].test_ids:
                    best = max(known, key=lambda label: scores[image, label])
                    right += int(best == stream.test_labels[image])
                row.append(right / len(stream.stages[task].test_ids))
            table.append(row)
        tables.append(table)
    told = json.loads((run.folder / "client_matrices.json").read_text())["clients"]
    assert [client["matrix"] for client in told] == tables
    assert [client["tasks"] for client in told] == [list(order) for order in orders]
    mean = [[(tables[0][i][j] + tables[1][i][j]) / 2 for j in range(2)] for i in range(2)]
    assert run.matrix == [pytest.approx(row) for row in mean]
    assert tables[0] != tables[1]
    assert run.summary["average_accuracy"] == pytest.approx((mean[1][0] + mean[1][1]) / 2)
    lost = [table[0][0] - table[1][0] for table in tables]
    assert run.summary["forgetting"] == pytest.approx(sum(lost) / 2)
    by_client = run.summary["own_tasks"]["forgetting"]
    assert by_client["mean"] == pytest.approx(sum(lost) / 2)
    assert by_client["worst_decile"] == pytest.approx(max(lost))
    assert by_client["std"] == pytest.approx(abs(lost[0] - lost[1]) / 2)


CASES = {
    "own orders": ASYNCHRONOUS,
    "late ones": {**ASYNCHRONOUS, "scenario.tasks": 3, "time.joining": 0.4},
    "own classes": OWN,
}


@pytest.mark.parametrize("case", CASES)
def test_a_stack_of_unlike_masks_is_one_by_one(case: str, tiny_config: TinyConfig) -> None:
    """One step of clients that know different classes, with a teacher and with the softmax over new classes."""
    more = {**CASES[case], "strategy": ["fedlwf", "supcon", "replay"], "federation.clients": 5, "seed": 3}
    experiment = build(tiny_config(more))
    node, split, stage = experiment.node, experiment.split, 1
    assert split.clocks is not None
    clients = [k for k in split.clocks.present(stage) if split.clocks.own[stage][k] == 1 and split.size(stage, k)]
    own, sets = split.clocks.standings(stage, clients)
    assert len({(known, new) for _, _, known, new in own}) > 1
    width = experiment.stream.num_classes
    header = Header("train", clients, stage, 0, 2, 2, 1, width, list(range(width)), [], own=own, sets=sets)
    model = {n: node.grown(n, a, width, "initial") for n, a in node.initial.items()}
    teacher = {n: a + 0.1 * torch.ones_like(a) if a.is_floating_point() else a for n, a in model.items()}
    call = Call(header, model, teacher, {}, {k: torch.from_numpy(split.rows[stage][k]) for k in clients})
    call = Call.of(Header.from_json(header.to_json()), call.arrays())
    made = [node.client(call, k) for k in clients]
    together = dict(zip(clients, (trained for _, trained in train_cohort(made, limit=1).clients), strict=True))
    for client in made:
        assert client.known.nonzero().flatten().tolist() == list(split.clocks.known(stage, client.id))
        assert client.context(node.stack.strategies[0]).task == 1
        alone = train_client(client, limit=1)
        for name, array in alone.arrays.items():
            assert float((together[client.id].arrays[name] - array).norm()) <= 1e-12 * max(1.0, float(array.norm()))
        assert together[client.id].losses == pytest.approx(alone.losses, abs=1e-12)
        assert alone.losses["fedlwf.distillation"] > 0


@pytest.mark.parametrize("case", CASES)
def test_a_run_stacked_and_one_by_one(case: str, tiny: Tiny) -> None:
    more = {**CASES[case], "strategy": ["fedlwf", "replay"], "federation.clients": 4, "partition.alpha": 0.4}
    alone, together = tiny({**more, "engine.path": "sequential"}), tiny({**more, "engine.path": "stacked"})
    first, second = alone.model.state_dict(), together.model.state_dict()
    for name, array in first.items():
        assert float((array - second[name]).norm()) <= 1e-8 * max(1.0, float(array.norm())), name
    assert alone.matrix == together.matrix
    events = [json.loads(line)["event"] for line in (together.folder / "events.jsonl").open()]
    assert "engine" not in events


def test_an_interrupted_run_goes_on_to_the_same_bits(lab: Any, tiny_config: TinyConfig) -> None:
    more = {
        **ASYNCHRONOUS, "scenario.tasks": 3, "time.joining": 0.3, "time.stragglers": 0.5, "federation.clients": 4,
        "time.straggler_policy": "partial", "strategy": ["replay", "fedewc"], "checkpoint.every": 1,
        "evaluate.every": 1, "federation.batch_min": 2, "engine.path": "sequential", "partition.test": "same_mix",
    }  # fmt: skip
    whole, answer = lab.start(asdict(tiny_config(more)))
    assert answer["error"] == ""
    folder, died = lab.start(asdict(tiny_config(more)), lab.kill("fedcl.conduct:save_checkpoint", 5))
    assert died["signal"]
    assert lab.resume(folder)["error"] == ""
    kept = [lab.results(place) for place in (whole, folder)]
    for found in kept:
        found["summary"].pop("measured", None)
    assert kept[0] == kept[1]
    assert (whole / "client_matrices.json").read_text() == (folder / "client_matrices.json").read_text()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a common clock": ({**ASYNCHRONOUS, "strategy": ["weight_aligning"]}, "must be common with strategy weight_ali"),
    "a pooled bound": ({**ASYNCHRONOUS, "strategy": ["joint"]}, "joint, which pools all clients into one learner"),
    "too many classes": ({**OWN, "time.classes": 6}, "at most 5: a client meets 2 tasks of different classes"),
    "growth": ({"time.start": 2, "time.growth": 2}, r"time\.growth=2: must not lead to 4 clients in task 2: 3 of"),
    "start": ({"time.start": 4}, r"time\.start=4: must not be above federation\.clients=3"),
    "growth alone": ({"time.growth": 1}, r"time\.start=0: must say how many clients"),
    "both": ({"time.start": 1, "time.growth": 1, "time.leaving": 0.5}, "a federation either grows or"),
    "more than all": ({"time.joining": 0.7, "time.leaving": 0.7}, "must add up to at most 1"),
    "drawn": ({**ASYNCHRONOUS, "partition.size": 5}, r"partition\.size=5: must be 0 with tasks or times"),
    "drawn and absent": ({"partition.size": 5, "time.participation": 0.5}, "must be 1 with partition.size"),
    "probes": ({**ASYNCHRONOUS, "evaluate.probes": ["knn"]}, "probes learn from tasks that all clients have in com"),
    "known tasks": ({**ASYNCHRONOUS, "scenario.name": "task_incremental"}, "must be common with .*task_incremental"),
    "least size": ({**OWN, "partition.min_size": 1}, r"partition\.min_size=1: must be 0 with time\.order=client_spec"),
    "speed": ({"time.slowdown": 0.5}, r"time\.slowdown=0\.5: must be at least 1"),
    "too slow": ({"time.stragglers": 0.5, "time.slowdown": 1e308}, r"time\.slowdown=.*: must be at most 1000000"),
    "a sequence in step": ({"time.sequence": "lagged"}, "'lagged': is read with time.order=asynchronous only"),
    "shared in step": ({"time.shared": 0.5}, "is read with time.order=client_specific only"),
    "classes of own orders": ({**ASYNCHRONOUS, "time.classes": 3}, "is read with time.order=client_specific only"),
    "an order": ({"time.order": "async"}, "must be one of common, asynchronous, client_specific"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(case: str, tiny_config: TinyConfig, tmp_path: Path) -> None:
    more, said = REFUSED[case]
    with pytest.raises(UsageError, match=said) as told:
        build(tiny_config(more))
    assert "\n" not in str(told.value)
    assert not list(tmp_path.rglob("config.yaml"))


CLOCKS = {n for n in registry.names("strategies") if registry.load("strategies", n).common_clock} | {"fsa", "aper"}
"""Those that need one clock for all, always or with their usual options."""


@pytest.mark.parametrize("name", registry.names("strategies"))
def test_every_strategy_works_with_own_orders_or_is_refused_by_name(name: str, tiny: Tiny) -> None:
    cls = registry.load("strategies", name)
    more = {**ASYNCHRONOUS, "strategy": [name], "scenario.tasks": 3, "federation.clients": 4, "time.joining": 0.25,
            "federation.rounds": 1, "federation.batch_min": 2, "partition.name": "iid", "model.width": 16,
            "optimiser.lr": 0.02, **cls.tried_with}  # fmt: skip
    if name in CLOCKS:
        with pytest.raises(UsageError, match=f"must be common with strategy {name}, which {cls.common_clock}"):
            tiny(more)
        told = Console(record=True, width=200, file=StringIO())
        told.print(render_card(cls))
        assert cls.common_clock in told.export_text()
        return
    run = tiny(more)
    assert not cls.common_clock
    assert run.summary["status"] == "done"
    # A hypernetwork's model has learned nothing after so few rounds.
    assert 0 < run.summary["average_accuracy"] <= 1 or name == "pefll"
    assert run.summary["own_tasks"]["average_accuracy"]["clients"] == 4
    assert all(entry is not None for row in run.matrix for entry in row)


def test_absent_clients_are_never_asked(tiny: Tiny, tiny_config: TinyConfig) -> None:
    more = {"time.start": 1, "time.growth": 2, "scenario.tasks": 3, "federation.clients": 5, "strategy": ["replay"],
            "partition.name": "iid", "time.participation": 0.7}  # fmt: skip
    run, split = tiny(more), build(tiny_config(more)).split
    assert split.own_clocks is None
    rounds = [e for e in map(json.loads, (run.folder / "events.jsonl").open()) if e["event"] == "round"]
    assert [e["clients"] for e in rounds] == [len(split.present(e["task"])) for e in rounds] == [1, 1, 2, 2, 4, 4]
    stored = {int(path.parent.name) for path in (run.folder / "clients").rglob("*.safetensors")}
    assert stored
    assert stored <= {k for stage in range(3) for k in split.present(stage)}
    assert run.summary["own_tasks"] is None


def test_streams_without_new_classes_and_with_shared_ones(tiny: Tiny) -> None:
    domains = tiny({**ASYNCHRONOUS, "scenario.name": "domain_incremental", "scenario.shift": "permuted"})
    assert domains.summary["forward_transfer"] is not None
    assert domains.summary["test_counts"] == [3 * 30] * 2
    blurry = tiny({**ASYNCHRONOUS, "scenario.name": "si_blurry", "partition.name": "iid"})
    assert blurry.summary["forward_transfer"] is None
    assert "forward_transfer" in blurry.summary["undefined"]
    assert sum(blurry.summary["test_counts"]) == 3 * 30  # whatever the order, each class is first met once


def test_classes_without_any_label_are_known_to_nobody(tiny_config: TinyConfig) -> None:
    more = {**ASYNCHRONOUS, "scenario.name": "open_world", "scenario.base": 6, "scenario.tasks": 3}
    split = build(tiny_config(more)).split
    assert split.own_clocks is not None
    assert split.counts()[:, :, :6].any(axis=(0, 1)).all()
    assert split.unlabelled_counts()[:, :, 6:].any()
    places = [(stage, client) for stage in range(3) for client in range(split.clients)]
    assert {split.own_clocks.known(*place) for place in places} == {tuple(range(6))}
