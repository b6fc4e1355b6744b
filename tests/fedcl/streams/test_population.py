"""Runs whose population is drawn: only sampled clients exist, and runs repeat and resume to the same bits."""

from __future__ import annotations

import gc
import importlib
import json
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl import registry
from fedcl.build import build_split, split_hash
from fedcl.config import load_config
from fedcl.errors import RunFailed, UsageError
from fedcl.federation.cohort import cohort, reached
from fedcl.run import execute
from fedcl.streams.split import draw_split, split_summary, split_table, split_warnings
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
TinyConfig = Callable[[Mapping[str, Any]], "Config"]

MILLION = 10**6
DRAWN: dict[str, Any] = {
    "partition.size": 10,
    "partition.min_size": 0,
    "federation.clients": MILLION,
    "federation.cohort": 6,
}
COMPLETE = "f36a853fef30ef1ea86b9ae372fd5f3012ac385691a8b827f77949a1286ec5f0"
"""Hash of the split of the tiny digits over four clients; runs of earlier versions have it in their checkpoints."""

REPLAY = {**DRAWN, "strategy": ["replay", "fedewc"], "options.replay.budget": 640}


def drawn_clients(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The (task, client) pairs whose rows a run computes, filled while it goes."""
    rule = registry.load("partitions", "dirichlet")
    draw, seen = rule.draw_client, set()

    def noted(self: Any, pool: Any, size: int, config: Any, *stream: Any) -> Any:
        _, _, task, _, client = stream
        seen.add((task, client))
        return draw(self, pool, size, config, *stream)

    monkeypatch.setattr(rule, "draw_client", noted)
    return seen


def test_a_million_clients_exist_only_where_they_are_sampled(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = drawn_clients(monkeypatch)
    config = tiny_config(REPLAY)
    _, split, _ = build_split(config)
    assert seen == set()
    result = execute(config, progress=QuietProgress())
    trained = {
        (task, client) for task in range(2) for round_ in range(2) for client in cohort(config, MILLION, task, round_)
    }
    # An exchange follows the two rounds of each task; each strategy makes one of its own.
    asked = {(t, c) for t in range(2) for more in (0, 1) for c in reached(config, split, t, 2, 4 * t + 2 + more)}
    hashed = {(task, client) for task in range(2) for client in split.some(8)}
    assert len(trained) == 2 * 2 * 6
    assert len(asked) == 2 * 2 * 6
    assert seen == trained | asked | hashed
    stored = sorted(int(path.name) for path in (result.folder / "clients").glob("*/*"))
    remembered = {c for t in range(2) for c in reached(config, split, t, 2, 4 * t + 2)}
    assert remembered <= set(stored) <= {c for _, c in trained | asked}
    assert result.summary["num_clients"] == MILLION


def traced(config: Config) -> tuple[int, int]:
    """Most bytes that Python held at once in a run, and bytes of its newest checkpoint's facts."""
    gc.collect()
    tracemalloc.start()
    try:
        result = execute(config, progress=QuietProgress())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak, max(p.stat().st_size for p in (result.folder / "checkpoints").glob("*/meta.json"))


def test_memory_and_checkpoints_do_not_grow_with_the_population(tiny_config: TinyConfig) -> None:
    execute(tiny_config({**REPLAY, "federation.clients": 1000}), progress=QuietProgress())  # imports and first uses
    few, many = (traced(tiny_config({**REPLAY, "federation.clients": k})) for k in (1000, MILLION))
    # One byte a client would be a million; what differs is the digits of the clients' numbers.
    assert abs(many[0] - few[0]) < 300_000
    assert many[1] < 1.2 * few[1]


def test_repetition_and_resume_give_the_same_bits(lab: Any, tiny_config: TinyConfig, tmp_path: Path) -> None:
    def settings(name: str) -> dict[str, Any]:
        large = {**REPLAY, "federation.clients": 10_000, "checkpoint.every": 1, "evaluate.every": 1, "name": name}
        return asdict(tiny_config(large))

    first, answer = lab.start(settings("one"))
    assert answer["error"] == ""
    whole = lab.results(first)
    second, answer = lab.start(settings("one"))
    assert answer["error"] == ""
    assert second != first
    assert lab.results(second) == whole
    for kill in (5, 8):  # in the second round, and in the second of the exchanges that end the first task
        folder, answer = lab.start(settings("one"), lab.kill("fedcl.federation.server:merge_measured", kill))
        assert answer["signal"]
        assert lab.resume(folder)["error"] == ""
        assert lab.results(folder) == whole


def test_resume_refuses_another_population(lab: Any, tiny_config: TinyConfig) -> None:
    settings = asdict(tiny_config({**DRAWN, "checkpoint.every": 1}))
    folder, answer = lab.start(settings, lab.kill("fedcl.federation.server:merge_measured", 6))
    assert answer["signal"]
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace(f"clients: {MILLION}", f"clients: {MILLION - 1}"))
    assert "not those this run began with" in lab.resume(folder)["error"]


def test_what_decides_a_client_is_in_the_hash(tiny_config: TinyConfig) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"partition.size": 11}, {"partition.alpha": 0.4}, {"federation.clients": 999_999},
        {"partition.name": "iid"}, {"data.limit": 11}, {"partition.size": 0, "federation.clients": 6},
    ]  # fmt: skip
    # Changes a few clients of a million, none of those whose rows are in the hash.
    skewed = {"partition.name": "quantity_skew", "partition.skew": 20.0}
    changes += [skewed, {**skewed, "partition.min_size": 2}]
    hashes = [split_hash(*build_split(tiny_config({**DRAWN, **change}))[:2]) for change in changes]
    assert len(set(hashes)) == len(changes)
    assert split_hash(*build_split(tiny_config({**DRAWN, "federation.cohort": 3}))[:2]) == hashes[0]


def test_the_hash_of_a_rules_code(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = split_hash(*build_split(tiny_config(DRAWN))[:2])
    rule = registry.load("partitions", "dirichlet")
    draw = rule.draw_client
    monkeypatch.setattr(rule, "draw_client", lambda self, pool, size, config, *s: draw(self, pool, size, config, *s, 1))
    assert split_hash(*build_split(tiny_config(DRAWN))[:2]) != before


def test_a_complete_split_has_the_hash_it_always_had(tiny_config: TinyConfig) -> None:
    config = tiny_config({"federation.clients": 4})
    assert split_hash(*build_split(config)[:2]) == COMPLETE


def asked(plugin: Any, tiny: Tiny, **settings: Any) -> list[list[int]]:
    """The clients of each task that an exchange with the default choice reached."""
    probe = plugin(
        """
        reductions = {"n": "sum"}
        def note(self, ctx):
            SEEN.append((ctx.task, ctx.client))
            return {"n": torch.tensor(1)}, ctx.state
        def finish_task(self, server):
            server.exchange(self.note)
            return Finished(server.arrays), server.state
        """,
        **settings,
    )
    tiny(probe)
    return [[c for t, c in plugin.seen(probe) if t == task] for task in range(2)]


def test_whom_an_exchange_reaches(plugin: Any, tiny: Tiny, tiny_config: TinyConfig) -> None:
    config = tiny_config(DRAWN)
    anew = asked(plugin, tiny, **DRAWN)
    assert [len(clients) for clients in anew] == [6, 6]
    assert anew[0] != anew[1]
    assert anew == asked(plugin, tiny, **DRAWN)
    trained = asked(plugin, tiny, **DRAWN, **{"federation.exchange": "trained"})
    for task in range(2):
        assert trained[task] == sorted({c for r in range(2) for c in cohort(config, MILLION, task, r)})
    assert [len(clients) for clients in asked(plugin, tiny, **DRAWN, **{"federation.exchange": 9})] == [9, 9]
    every = {**DRAWN, "federation.clients": 8, "federation.exchange": "all"}
    assert asked(plugin, tiny, **every) == [list(range(8))] * 2


def test_an_exchange_over_a_complete_split(plugin: Any, tiny: Tiny) -> None:
    complete = {"federation.clients": 8, "federation.participation": 0.25, "partition.name": "iid"}
    assert asked(plugin, tiny, **complete) == [list(range(8))] * 2
    few = asked(plugin, tiny, **complete, **{"federation.exchange": 3})
    assert [len(clients) for clients in few] == [3, 3]
    holders = {"federation.clients": 40, "partition.name": "iid", "partition.min_size": 0, "data.limit": 4}
    assert asked(plugin, tiny, **holders) == [list(range(20))] * 2  # of 20 images, the first clients have one each


def test_holders_of_a_drawn_population_are_told_by_their_size(plugin: Any, tiny: Tiny, tiny_config: TinyConfig) -> None:
    skewed = {**DRAWN, "partition.name": "quantity_skew", "partition.skew": 0.2, "federation.exchange": 40}
    config = tiny_config(skewed)
    _, split, _ = build_split(config)
    found = asked(plugin, tiny, **skewed)
    for task in range(2):
        asked_for = reached(config, split, task, 2, 3 * task + 2)
        assert len(asked_for) == 40
        assert found[task] == [c for c in asked_for if len(split.train[task][c])]
        assert len(found[task]) < 40


def test_strategies_that_look_at_all_clients_are_refused(tiny: Tiny, plugin: Any) -> None:
    for bound in ("joint", "cumulative"):
        with pytest.raises(UsageError, match=rf"partition.size=10: must be 0 with strategy {bound}"):
            tiny({**DRAWN, "strategy": [bound]})
    probe = plugin(
        """
        def check(self, config, stream, split):
            assert all(len(rows) for task in split.train for rows in task)
        """,
        **DRAWN,
    )
    with pytest.raises(RunFailed, match="failed in check: TypeError: 'Drawn' object is not iterable"):
        tiny(probe)


def test_rules_that_count_their_cohorts_work_with_a_drawn_population(tiny: Tiny) -> None:
    assert tiny({**DRAWN, "strategy": ["fedmedian"]}).summary["bytes_up"] > 0
    with pytest.raises(UsageError, match=r"krum|num_malicious|cohort"):
        tiny({**DRAWN, "federation.cohort": 3, "strategy": ["krum"], "options.krum.num_malicious_nodes": 2})


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({**DRAWN, "partition.test": "same_mix"}, "partition.test='same_mix': must be global with partition.size"),
        ({**DRAWN, "partition.balance": True}, "partition.balance"),
        ({**DRAWN, "partition.min_size": 11}, "partition.min_size=11: must not be above partition.size=10"),
        ({**DRAWN, "partition.size": -1}, "partition.size=-1: must be at least 0"),
        ({**DRAWN, "federation.participation": 0.5}, "at most one of them must be set"),
        ({"federation.cohort": 4}, "federation.cohort=4: must not be above federation.clients=3"),
        ({"federation.exchange": "some"}, "must be one of auto, all, trained, or a number"),
        ({"federation.exchange": 0}, "must be one of auto, all, trained, or a number"),
        ({"federation.exchange": 4}, "must be one of auto, all, trained, or a number"),
        ({"federation.exchange": True}, "federation.exchange"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_config: TinyConfig, overrides: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        tiny_config(overrides)
    assert text in str(refusal.value)


def test_a_cohort_takes_the_place_of_a_lower_layers_participation() -> None:
    lower = {"federation": {"participation": 0.5}}
    assert load_config(lower, ["federation.cohort=2"]).federation.participation == 1.0
    assert load_config({"federation": {"cohort": 2}}, ["federation.participation=0.5"]).federation.cohort == 0


def test_a_cohort_of_a_stated_size(tiny_config: TinyConfig) -> None:
    config = tiny_config({"federation.cohort": 2})
    assert [len(cohort(config, 3, 0, round_)) for round_ in range(3)] == [2, 2, 2]
    assert cohort(config, 1, 0, 0) == [0]  # the one learner of a centralised bound
    assert cohort(tiny_config({"federation.participation": 0.67}), 3, 0, 0) == cohort(config, 3, 0, 0)


def test_table_picture_and_warnings_show_some_clients_and_say_so(tiny_config: TinyConfig, tmp_path: Path) -> None:
    stream, split, names = build_split(tiny_config(DRAWN))
    data = split_summary(split, stream, names)
    assert json.loads(json.dumps(data)) == data
    assert data["clients"] == MILLION
    assert len(data["shown"]) == 20
    assert data["tasks"][0]["sizes"] == [10] * 20
    assert data["tasks"][0]["empty"] == []
    for entry in data["tasks"][1]["classes"]:
        held = [sum(split.train_labels[split.train[1][c]] == entry["position"]) for c in data["shown"]]
        assert entry["clients"] == held
    text = split_table(split, stream, names)
    assert "Task 1: 200 training images held by 20 of the 1000000 clients" in text
    assert f"c{data['shown'][-1]}" in text
    (line,) = split_warnings(split, stream, names)
    assert "two may hold the same image" in line
    assert line not in text
    picture = tmp_path / "split.png"
    draw_split(split, stream, names, picture)
    assert picture.stat().st_size > 1000


def test_a_run_says_what_its_population_is(tiny_config: TinyConfig) -> None:
    said: list[str] = []

    class Listening(QuietProgress):
        def message(self, text: str) -> None:
            said.append(text)

    execute(tiny_config(DRAWN), progress=Listening())
    assert any("two may hold the same image" in text for text in said)
    assert any("reaches 6 of 1000000 clients" in text for text in said)
    said.clear()
    execute(tiny_config({**DRAWN, "federation.exchange": 6}), progress=Listening())
    assert not any("reaches" in text for text in said)


def test_the_benchmark_measures_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("fedcl.experiments.bench.population")
    small = {"data.limit": 12, "partition.size": 10, "federation.cohort": 3, "federation.rounds": 3}
    monkeypatch.setattr(bench, "SETTINGS", {**bench.SETTINGS, **small})
    found = bench.measure("fedewc+replay", MILLION)
    assert found["clients"] == MILLION
    assert found["stored_clients"] in range(1, 7)  # three clients remember at the end of each task
    assert 0 < found["round_seconds"] < found["start_seconds"]
    assert found["peak_mib"] > 100
    assert found["checkpoint_kib"] > 1
    machine = {"cpu": "a processor", "cpus": 2, "versions": {"torch": "2", "flwr": "1"}}
    recorded = {"machine": machine, "command": "x", "revision": "r", "note": "n", "stacks": {"fedewc+replay": [found]}}
    (row,) = [line for line in bench.page(recorded).splitlines() if line.startswith("| 1,000,000 |")]
    assert row.count("|") == 7
