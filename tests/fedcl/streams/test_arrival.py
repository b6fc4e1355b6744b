"""Single pass: which images a client has at hand in which round, and that each is seen once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import random as counter
from fedcl.build import build
from fedcl.config import load_config
from fedcl.errors import RunFailed, UsageError
from fedcl.federation.store import ClientStore
from fedcl.local.order import once_batches, plan
from fedcl.streams.arrival import at_hand, chunk, chunk_size, size_at_hand

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Configure = Callable[[Mapping[str, Any]], "Config"]
Run = Callable[[Mapping[str, Any]], "RunResult"]

ONCE = {"federation.passes": "once", "federation.rounds": 3, "scenario.tasks": 2}
HASHES = ("model_sha256", "state_sha256")


def hashes(result: RunResult) -> list[str]:
    return [result.summary[name] for name in HASHES]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.integers(0, 400), unique=True, max_size=60).map(sorted), rounds=st.integers(1, 12),
    seed=st.integers(0, 2**40), timed=st.booleans(),
)  # fmt: skip
def test_chunks_are_disjoint_complete_even_and_in_order(rows: list[int], rounds: int, seed: int, timed: bool) -> None:
    ids = np.array(rows, dtype=np.int64)
    arrival = np.array(counter.permutation(401, "arrival")) if timed else None
    parts = [chunk(ids, arrival, r, rounds, seed, "client", 0) for r in range(rounds)]
    assert sorted(np.concatenate(parts).tolist()) == rows
    sizes = [len(part) for part in parts]
    assert sizes == [chunk_size(len(rows), r, rounds) for r in range(rounds)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert [p.tolist() for p in parts] == [
        chunk(ids, arrival, r, rounds, seed, "client", 0).tolist() for r in range(rounds)
    ]
    if arrival is not None:
        moments = arrival[np.concatenate(parts)]
        assert (np.diff(moments) > 0).all()


def test_chunks_depend_on_seed_client_and_task(tiny_config: Configure) -> None:
    built = [build(tiny_config({**ONCE, "seed": seed, "partition.name": "iid"})) for seed in (0, 0, 1)]
    found = [
        [at_hand(e.config, e.stream, e.split, t, r, k).tolist() for t in (0, 1) for k in (0, 1) for r in range(3)]
        for e in built
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]
    # Not the same shuffle for everybody: places within the client's rows differ.
    split = built[0].split
    orders = {tuple(np.searchsorted(split.rows[t][k], found[0][6 * t + 3 * k])) for t in (0, 1) for k in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("count", "size", "least", "drop"), [(7, 3, 1, False), (7, 3, 2, False), (7, 3, 1, True), (0, 3, 1, False)]
)
@pytest.mark.parametrize("repeats", [1, 3])
def test_batches_follow_the_stream_and_repeat_in_a_row(
    count: int, size: int, least: int, drop: bool, repeats: int
) -> None:
    config = load_config(
        {
            "federation": {
                "passes": "once",
                "repeats": repeats,
                "batch_size": size,
                "batch_min": least,
                "drop_last": drop,
            }
        }
    )
    batches, dropped = plan(count, config, ("any",))
    whole = [list(range(at, min(at + size, count))) for at in range(0, count, size)]
    kept = [b for b in whole if len(b) >= max(least, size if drop else 1)]
    assert [b.tolist() for b in batches] == [b for b in kept for _ in range(repeats)]
    assert dropped == count - sum(map(len, kept))
    assert len(once_batches(count, size, least, drop, repeats)) == repeats * len(kept)


@pytest.mark.parametrize("stack", [["finetune"], ["fedlwf", "supcon", "weight_aligning"]])
def test_one_round_of_one_pass_is_one_epoch(tiny: Run, stack: list[str]) -> None:
    one = {"federation.rounds": 1, "strategy": stack, "model.head_bias": False}
    assert hashes(tiny(one)) == hashes(tiny({**one, "federation.passes": "once"}))


def test_whole_run_equals_the_literal_loop(tiny: Run, tiny_config: Configure, oracle: Any) -> None:
    settings = {**ONCE, "federation.repeats": 2, "federation.batch_size": 4}
    config = tiny_config(settings)
    world = oracle.World.of(config)
    w = world.start
    for task, held in enumerate(world.held):
        w = oracle.grown(w, world, len(world.known[task]))
        seen: list[list[int]] = [[] for _ in held]
        for round_ in range(3):
            sums, total = {n: torch.zeros_like(a) for n, a in w.items()}, 0
            for k, rows in enumerate(held):
                order = [rows[i] for i in counter.permutation(len(rows), 0, "client", k, task, 0, "order", 0)]
                sizes = [len(rows) // 3 + (r < len(rows) % 3) for r in range(3)]
                mine = order[sum(sizes[:round_]) : sum(sizes[: round_ + 1])]
                seen[k] += mine
                if not mine:
                    continue
                own = {n: a.clone() for n, a in w.items()}
                velocity = {n: torch.zeros_like(a) for n, a in own.items()}
                for at in range(0, len(mine), 4):
                    batch = mine[at : at + 4]
                    for _ in range(2):
                        own = oracle.leaves(own)
                        scores = oracle.logits(own, world.x[batch])
                        loss = oracle.cross_entropy(scores, [world.y[i] for i in batch], world.known[task])
                        grads = oracle.gradient(loss, own)
                        with torch.no_grad():
                            for n in own:
                                velocity[n] = 0.9 * velocity[n] + grads[n]
                                own[n] = own[n] - 0.1 * velocity[n]
                total += len(mine)
                for n in sums:
                    sums[n] += len(mine) * own[n].detach()
            w = {n: a / total for n, a in sums.items()}
        assert [sorted(rows) for rows in seen] == [sorted(rows) for rows in held]
    assert oracle.distance(oracle.final(tiny(settings)), w) < 1e-10


@pytest.mark.parametrize(
    "stack",
    [["finetune"], ["replay"], ["fedlwf", "nearest_mean", "supcon", "weight_aligning", "replay"], ["fedmedian"]],
)
def test_stacked_is_one_by_one(tiny: Run, oracle: Any, stack: list[str]) -> None:
    settings = {**ONCE, "strategy": stack, "federation.repeats": 2, "model.head_bias": False}
    one, many = (tiny({**settings, "engine.path": path}) for path in ("sequential", "stacked"))
    assert oracle.distance(oracle.final(one), oracle.final(many)) < 1e-9
    assert one.matrix == many.matrix


def test_a_drawn_population_shows_each_client_its_own_images_once(tiny: Run, tiny_config: Configure) -> None:
    settings = {**ONCE, "partition.size": 10, "partition.name": "iid", "federation.clients": 1000,
                "federation.cohort": 3, "partition.min_size": 0, "strategy": ["replay"]}  # fmt: skip
    experiment = build(tiny_config(settings))
    config, stream, split = experiment.config, experiment.stream, experiment.split
    for client in (0, 999):
        parts = [at_hand(config, stream, split, 1, r, client) for r in range(3)]
        assert sorted(np.concatenate(parts)) == split.train[1][client].tolist()
        assert [len(p) for p in parts] == [size_at_hand(config, split, 1, r, client) for r in range(3)] == [4, 3, 3]
    assert tiny(settings).summary["status"] == "done"


def test_the_memory_is_offered_each_image_once_and_at_once(tiny: Run, tiny_config: Configure) -> None:
    """After the first task of three rounds: all its images; with room for five, those with the least priorities."""
    settings = {**ONCE, "strategy": ["replay"], "scenario.first": 1}
    experiment = build(tiny_config(settings))
    config, stream, split = experiment.config, experiment.stream, experiment.split
    whole, small = tiny(settings), tiny({**settings, "options.replay.budget": 5 * 64})
    stores = [ClientStore(result.folder / "clients", 0) for result in (whole, small)]
    for k in range(3):
        offered: list[tuple[int, int]] = []
        for r in range(3):
            rows = at_hand(config, stream, split, 0, r, k).tolist()
            words = counter.words(len(rows), 0, "client", k, 0, r, "memory")
            offered += [(int(word) >> 1, row) for word, row in zip(words, rows, strict=True)]
        kept = [store.get(k, 10**6)["replay/ids"].tolist() for store in stores]
        assert sorted(kept[0]) == sorted(row for _, row in offered) == split.rows[0][k].tolist()
        assert sorted(kept[1]) == sorted(row for _, row in sorted(offered)[:5])


def test_means_count_each_image_once(tiny: Run, tiny_config: Configure) -> None:
    from fedcl.records.checkpoint import load_newest

    settings = {**ONCE, "strategy": ["nearest_mean"]}
    found = load_newest(tiny(settings).folder / "checkpoints", lambda text: None)
    assert found is not None
    stream = build(tiny_config(settings)).stream
    rows = np.concatenate([stage.train_ids for stage in stream.stages])
    assert found.arrays["strategy/nearest_mean/counts"].tolist() == np.bincount(stream.train_labels[rows]).tolist()


def test_strategies_see_the_images_at_hand(plugin: Any, tiny: Run, tiny_config: Configure) -> None:
    body = """
    reductions = {"n": "sum"}

    def loss(self, step):
        SEEN.append(("counts", step.task, step.round, step.counts.tolist()))
        return {}

    def ask(self, ctx):
        SEEN.append(("asked", ctx.task, ctx.round, ctx.ids.tolist() if ctx.online else None))
        return {"n": torch.tensor(len(ctx.ids))}, ctx.state

    def after_aggregate(self, server):
        server.exchange(self.ask)
        return server.arrays, server.state
"""
    settings = {**plugin(body), **ONCE, "engine.path": "sequential", "federation.clients": 1, "partition.name": "iid"}
    tiny(settings)
    seen = plugin.seen(settings)
    experiment = build(tiny_config(settings))
    config, stream, split = experiment.config, experiment.stream, experiment.split
    hands = {(t, r): at_hand(config, stream, split, t, r, 0) for t in range(2) for r in range(3)}
    asked = {(t, r): ids for what, t, r, ids in seen if what == "asked"}
    assert asked == {place: rows.tolist() for place, rows in hands.items()}
    for (task, round_), rows in hands.items():
        counts = np.bincount(stream.train_labels[rows], minlength=len(stream.known(task))).tolist()
        assert ("counts", task, round_, counts) in seen


def test_asking_after_the_last_round_is_an_error_that_names_the_strategy(plugin: Any, tiny: Run) -> None:
    body = """
    def ask(self, ctx):
        return {}, ctx.state

    def finish_task(self, server):
        server.exchange(self.ask)
        return Finished(server.arrays), server.state
"""
    with pytest.raises(RunFailed, match=r"asks clients after the last round of task 1; with federation\.passes=once"):
        tiny({**plugin(body), **ONCE})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"federation.epochs": 2}, "federation.epochs=2: must be 1 with federation.passes=once"),
        (
            {"federation.epochs": None, "federation.steps": 3},
            "federation.steps=3: must be null, and federation.epochs 1",
        ),
        ({"federation.passes": "many", "federation.repeats": 2}, "is only read with federation.passes=once"),
        ({"federation.repeats": 0}, "federation.repeats=0: must be at least 1"),
        ({"federation.passes": "twice"}, "must be one of many, once"),
        (
            {"strategy": ["fedewc"]},
            "many with strategy fedewc, which needs a task's images again to measure the Fisher",
        ),
        ({"strategy": ["cumulative"]}, "many with strategy cumulative, which repeats old images"),
        ({"strategy": ["joint"]}, "many with strategy joint"),
        ({"scenario.name": "cumulative"}, "many with scenario.name=cumulative, whose tasks hold images of earlier"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tiny_config: Configure, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(tiny_config({**ONCE, **settings}))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_clients_with_fewer_images_than_rounds_are_named(tiny: Run, tiny_config: Configure) -> None:
    settings = {**ONCE, "federation.rounds": 30, "partition.name": "iid"}
    noted = build(tiny_config(settings)).warnings
    assert any("in 6 cases a client has fewer images of a task to train on" in text for text in noted)
    assert tiny(settings).summary["empty_rounds"] == 2 * (30 - 20)


def test_the_order_of_a_fading_stream_is_its_own(tiny: Run, tiny_config: Configure) -> None:
    """Round by round of its one task of the middle, images of the second set of classes become more."""
    settings = {**ONCE, "federation.rounds": 5, "scenario.name": "linear_blurry", "scenario.overlap": 0.5,
                "data.limit": 60, "federation.clients": 1, "partition.name": "iid"}  # fmt: skip
    experiment = build(tiny_config(settings))
    config, stream, split = experiment.config, experiment.stream, experiment.split
    late = [stream.train_labels[at_hand(config, stream, split, 0, r, 0)] >= 5 for r in range(5)]
    shares = [float(np.mean(part)) for part in late]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] > 0.25


def test_resumed_in_the_middle_of_a_task_it_ends_with_the_same_bits(lab: Any, tiny_config: Configure) -> None:
    settings = asdict(
        tiny_config({**ONCE, "strategy": ["replay", "nearest_mean"], "federation.repeats": 2, "checkpoint.every": 1,
                     "evaluate.every": 1, "engine.path": "sequential"})
    )  # fmt: skip
    folder, answer = lab.start(settings)
    assert answer["error"] == ""
    whole = lab.results(folder)
    assert whole["summary"]["anytime_accuracy"] is not None
    again = {**settings, "name": "stopped"}
    folder, _ = lab.start(again, lab.kill("fedcl.conduct:save_checkpoint", 5))
    answer = lab.resume(folder)
    assert any("task 2, round 2" in message for message in answer["messages"])
    found = lab.results(folder)
    found["summary"]["name"] = whole["summary"]["name"]
    assert found == whole


@pytest.mark.ray
@pytest.mark.skipif("ray" in os.environ.get("FEDCL_SKIP", "").split(","), reason="FEDCL_SKIP names ray")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: fedcl-sim[ray]")
def test_in_actors_of_ray_the_same(tiny: Run) -> None:
    settings = {**ONCE, "strategy": ["replay"], "engine.path": "sequential"}
    remote = {"engine.runtime": "ray", "engine.nodes": 1}
    assert hashes(tiny(settings)) == hashes(tiny({**settings, **remote}))
