"""What a run costs: FLOPs by hand, floats by hand, what memories hold; alike on every path, seconds apart."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl.errors import RunFailed
from fedcl.measure import costs

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Settings = Callable[[Mapping[str, Any]], "Config"]

# An mlp 64-8 in float64 with a head of 5, then of 10 classes.
ENCODER, WIDTHS = 64 * 8 + 8, (5, 10)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def table(folder: Path) -> list[dict[str, float | None]]:
    with (folder / "costs.csv").open() as file:
        return [{n: float(c) if c else None for n, c in row.items()} for row in csv.DictReader(file)]


def step_by_hand(images: int, classes: int) -> int:
    """Two FLOPs a multiplication and addition: forward, gradient of the weights, and of the hidden units."""
    hidden, head = images * 64 * 8, images * 8 * classes
    return 2 * (2 * hidden + 3 * head)


@pytest.mark.parametrize("path", ["stacked", "sequential"])
def test_flops_are_those_of_matrix_products(tiny: Tiny, path: str) -> None:
    result = tiny({"engine.path": path, "federation.epochs": 2})
    rounds = events(result.folder, "costs")
    assert [(e["task"], e["round"]) for e in rounds] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    sizes = {task: held_by(result, task) for task in (0, 1)}
    for event in rounds:
        mine = sizes[event["task"]]
        assert event["clients"] == [0, 1, 2]
        assert event["steps"] == [2 * -(-n // 8) for n in mine]
        # A batch of n images costs n times one image, so that an epoch costs its images, however they are cut.
        assert event["flops"] == [2 * step_by_hand(n, WIDTHS[event["task"]]) for n in mine]
        assert min(event["seconds"]) > 0
    total = sum(sum(event["flops"]) for event in rounds)
    found = result.summary["costs"]
    assert found["flops"] == total == sum(task["flops"] for task in found["per_task"])
    assert found["flops_per_client_round"] == {"mean": total / 12, "max": max(max(e["flops"]) for e in rounds)}


def test_a_step_is_done_again_with_all_that_it_was_made_of(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        def sources(self, ctx):
            return [Source(ctx.ids[:7], 7)]
        def loss(self, step):
            SEEN.append((len(step.x), int(step.counts.sum())))
            return {}
        """
    )
    result = tiny({**settings, "federation.rounds": 1, "scenario.tasks": 1, "federation.batch_size": 16})
    sizes = held_by(result, 0)
    assert any(0 < n % 16 < 7 for n in sizes)  # a batch with fewer images of the client than of the source
    # The head has no bias to multiply: a step costs its images, wherever they come from.
    expected = [step_by_hand(n + 7 * -(-n // 16), 10) for n in sizes]
    assert events(result.folder, "costs")[0]["flops"] == expected
    assert {count for _, count in plugin.seen(settings)} == set(sizes)


def test_counting_can_be_left_out(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        def loss(self, step):
            SEEN.append(1)
            return {}
        """
    )
    result = tiny({**settings, "evaluate.flops": False})
    rounds = events(result.folder, "costs")
    assert len(plugin.seen(settings)) == sum(sum(e["steps"]) for e in rounds) > 0
    assert all(set(e["flops"]) == {None} for e in rounds)
    assert {"costs.flops", "costs.flops_per_client_round.max"} <= set(result.summary["undefined"])
    assert not any("FLOPs" in e["message"] for e in events(result.folder, "warning"))


def test_an_operation_counts_what_pytorch_s_own_counter_says() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from fedcl.federation.ledger import FlopCount

    x = torch.ones(4, 3, 8, 8, requires_grad=True)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Flatten(), torch.nn.Linear(216, 5))
    attention = torch.nn.MultiheadAttention(64, 2, batch_first=True)
    ours, theirs = FlopCount(), FlopCounterMode(display=False)
    for counter in (ours, theirs):
        with counter:
            layers(x).square().sum().backward()
            q = x.flatten(2)
            attention(q, q, q)[0].sum().backward()
            with torch.inference_mode():
                layers(x.detach())
    assert ours.total == theirs.get_total_flops() > 0


def held_by(result: RunResult, task: int) -> list[int]:
    from fedcl.build import build_split
    from fedcl.config import load_config

    _, split, _ = build_split(load_config(result.folder / "config.yaml"))
    return [split.size(task, client) for client in range(split.clients)]


def test_floats_bytes_and_the_table_add_up(tiny: Tiny) -> None:
    result = tiny({"strategy": ["nearest_mean"]})
    summary, rows = result.summary, table(result.folder)
    assert [(r["task"], r["round"]) for r in rows] == [(0, 0), (0, 1), (0, None), (1, 0), (1, 1), (1, None)]
    for row in rows:
        classes = WIDTHS[int(row["task"] or 0)]
        parameters = ENCODER + 9 * classes
        # After a round: sums of features by class; their counts are no floats.
        up = 8 * classes if row["round"] is None else parameters
        assert row["floats_up"] == 3 * up
        assert row["bytes_up"] == 3 * 8 * (up + (classes if row["round"] is None else 0))
        assert row["floats_down"] == 3 * parameters
        assert (row["flops"] is None) == (row["round"] is None)
    for name in ("floats_up", "floats_down", "bytes_up", "bytes_down"):
        assert summary["costs"][name] == sum(r[name] or 0 for r in rows)
        assert sum(task[name] for task in summary["costs"]["per_task"]) == summary["costs"][name]
    for name in ("bytes_up", "bytes_down"):
        assert summary["costs"][name] == summary[name]
    spent = summary["measured"]
    assert spent["client_seconds"] == pytest.approx(sum(r["seconds"] or 0 for r in rows if r["round"] is not None))
    assert spent["exchange_seconds"] == pytest.approx(sum(r["seconds"] or 0 for r in rows if r["round"] is None))
    assert 0 < spent["exchange_seconds"] < summary["wall_seconds"]
    assert 0 < spent["client_seconds"] < summary["wall_seconds"]


def test_what_memories_hold(tiny: Tiny) -> None:
    budget = 6 * 64 + 5  # six digits of 8 x 8 pixels, and a rest
    result = tiny({"strategy": ["replay"], "options.replay.budget": budget})
    found = result.summary["costs"]
    assert found["exemplar_bytes"] == {"clients": 3 * 6 * 64, "server": 0}
    assert found["model_bytes"] == 8 * (ENCODER + 9 * 10)
    assert found["memory_bytes"] == found["model_bytes"] + 3 * 6 * 64
    assert found["state_bytes"] == {"clients": 3 * 6 * (8 + 8), "server": 8}  # ids and priorities; how many there are
    plain = tiny({}).summary["costs"]
    assert (plain["exemplar_bytes"], plain["state_bytes"]) == ({"clients": 0, "server": 0}, {"clients": 0, "server": 0})
    assert plain["flops"] < found["flops"]  # the memory's images are trained on too
    distilled = tiny({"strategy": ["fedlwf"]}).summary["costs"]
    assert distilled["state_bytes"]["server"] == distilled["model_bytes"]  # the previous model


def test_costs_change_nothing_and_a_bound_sends_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcl.federation import ledger

    settings = {"strategy": ["joint"]}
    counted = tiny(settings).summary
    assert counted["costs"]["flops"] > 0
    null = {f"costs.{n}" for n in ("floats_up", "floats_down", "bytes_up", "bytes_down", "memory_bytes")}
    null |= {f"costs.per_task.{n}" for n in ("floats_up", "floats_down", "bytes_up", "bytes_down")}
    null |= {"costs.exemplar_bytes.clients", "costs.exemplar_bytes.server"}
    assert {n for n in counted["undefined"] if n.startswith("costs")} == null
    monkeypatch.setattr(ledger, "step_flops", lambda *_: (None, "for the test"))
    plain = tiny(settings).summary
    assert plain["model_sha256"] == counted["model_sha256"]
    assert plain["state_sha256"] == counted["state_sha256"]


def test_flops_that_cannot_be_counted_are_null_and_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcl.federation import ledger

    def broken(*_: Any, **__: Any) -> Any:
        raise RunFailed("not countable")

    monkeypatch.setattr(ledger, "train_client", broken)
    result = tiny({"engine.path": "stacked"})
    names = {"costs.flops", "costs.per_task.flops", "costs.flops_per_client_round.mean"}
    assert names <= set(result.summary["undefined"])
    assert result.summary["costs"]["flops"] is None
    warned = [e["message"] for e in events(result.folder, "warning")]
    assert any("not countable" in text for text in warned)
    assert result.summary["costs"]["floats_up"] > 0


def test_each_shape_is_counted_once_a_task(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcl.federation import ledger

    seen: list[tuple[int, tuple[int, ...]]] = []
    original = ledger.step_flops

    def noted(node: Any, call: Any, number: int, shape: tuple[int, ...]) -> Any:
        seen.append((call.header.task, shape))
        return original(node, call, number, shape)

    monkeypatch.setattr(ledger, "step_flops", noted)
    result = tiny({"federation.rounds": 3, "federation.epochs": 2})
    sizes = [(task, n) for task in (0, 1) for n in held_by(result, task)]
    expected = {(task, (8,)) for task, n in sizes if n >= 8} | {(task, (n % 8,)) for task, n in sizes if n % 8}
    assert len(seen) == len(set(seen))
    assert set(seen) == expected


def test_an_interrupted_run_has_the_costs_of_a_whole_one(tiny: Tiny, tiny_config: Settings) -> None:
    from fedcl.federation.server import Federation
    from fedcl.run import execute, resume
    from fedcl.tell.progress import QuietProgress

    settings = {"strategy": ["replay", "nearest_mean"], "checkpoint.every": 1}
    whole, config = tiny(settings), tiny_config(settings)
    original = Federation.aggregate

    def stop(self: Federation, state: Any, reducer: Any) -> Any:
        if (state.task, state.round) == (1, 1):
            raise RunFailed("stopped for the test")
        return original(self, state, reducer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "aggregate", stop)
        with pytest.raises(RunFailed, match="stopped"):
            execute(config, progress=QuietProgress())
    again = resume(Path(config.output.dir) / config.name / "seed-0", progress=QuietProgress())
    assert again.summary["costs"] == whole.summary["costs"]
    plain = [{n: c for n, c in row.items() if "seconds" not in n} for row in table(again.folder)]
    assert plain == [{n: c for n, c in row.items() if "seconds" not in n} for row in table(whole.folder)]


def test_records_by_hand() -> None:
    measured = {
        "floats_up": 1, "floats_down": 2, "bytes_up": 3, "bytes_down": 4, "peak": [[7, None], [9, 5]],
        "counted": {"0:0:8": 10, "0:0:3": 4}, "flops": [],
        "work": [[5, 0.5, {"0:0:8": 2, "0:0:3": 1}], [1, 0.25, {"0:0:3": 2}], [2, 0.125, {}]],
    }  # fmt: skip
    records, did = costs.add_round(costs.begin(), 0, 0, measured)
    assert did == {"clients": [1, 5], "steps": [2, 3], "flops": [8, 24], "seconds": [0.25, 0.5]}
    assert records is not None
    assert records["rounds"] == [[0, 0, 2, 5, 1, 2, 3, 4, 32, 24, 0.75, 0.5]]
    assert records["peak"] == [9, 5]
    meter = {"floats_up": 11, "floats_down": 2, "up": 33, "down": 4, "asked": 1.5}
    lines = costs.costs_csv(costs.add_task(records, meter), False).decode().splitlines()
    assert lines[1:] == ["0,0,2,5,1,2,3,4,32,24,0.75,0.5", "0,,,,10,0,30,0,,,1.5,"]
    assert costs.costs_csv(None, False).decode().splitlines() == [",".join(costs.COLUMNS)]
    unknown, did = costs.add_round(None, 0, 0, {**measured, "counted": {"0:0:8": None, "0:0:3": 4}})
    assert unknown is None
    assert did["flops"] == [8, None]
