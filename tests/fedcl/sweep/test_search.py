"""Search under the rules of continual learning: what a trial sees, that it can be repeated, what it cost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.config import load_config, to_yaml
from fedcl.errors import Interrupted, RunFailed, UsageError
from fedcl.records.runs import find_runs
from fedcl.sweep import command
from fedcl.sweep.board import Board
from fedcl.sweep.command import sweep
from fedcl.sweep.grid import Axis, Range
from fedcl.sweep.job import Job, Outcome, perform
from fedcl.sweep.plan import Point
from fedcl.sweep.prepare import Asked
from fedcl.sweep.search import Rule, check_apart, objective, parse_rule
from fedcl.sweep.trials import settle

pytest.importorskip("optuna")


class Here:
    """Runs points one after the other in this process."""

    title = "in this process"

    def __init__(self) -> None:
        self.ran: list[Point] = []
        self.most: int | None = None

    def run(self, points: Sequence[Point], board: Board) -> list[Outcome]:
        outcomes = []
        for place, point in enumerate(points):
            if self.most is not None and len(self.ran) >= self.most:
                outcomes.append(Outcome("waiting"))
                continue
            board.started(place)
            self.ran.append(point)
            outcomes.append(perform(Job.of(point), lambda message: None))
            board.ended(place, outcomes[-1])
        return outcomes

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    scheduler = Here()
    monkeypatch.setattr(command, "make_scheduler", lambda *given: scheduler)
    return scheduler


@pytest.fixture
def asked(tmp_path: Path, tiny_config: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Asked]:
    def build(*overrides: str, name: str = "s", trials: int = 5, seeds: str = "3", tune_on: str = "first:1") -> Asked:
        own = {
            "data.validation": 0.25, "federation.rounds": 1, "output.dir": str(tmp_path / "runs"), "name": name,
            "scenario.tasks": 3,
        }  # fmt: skip
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(tiny_config(own)))
        return Asked(str(file), overrides, seeds=seeds, search=trials, tune_on=tune_on, quiet=True)

    return build


def test_a_search_is_judged_on_validation_images_gone_on_with_and_repeated(
    asked: Any, here: Here, tmp_path: Path
) -> None:
    space = ("strategy=fedprox", "options.fedprox.mu=0.01..10:log", "optimiser.lr=0.01..0.3:log")
    request = asked(*space, seeds="3-4")
    here.most = 2
    with pytest.raises(Interrupted, match="interrupted in the search; go on with: fedcl sweep"):
        sweep(request)
    here.most = None
    swept = sweep(request)
    trials = [point for point in here.ran if "trial" in point.variant]
    assert len({point.folder for point in trials}) == len(trials) == 5, "what is done is not run again"
    assert all(p.config.evaluate.on == "validation" for p in trials)
    assert all((p.config.scenario.first, p.config.seed) == (1, 3) for p in trials)
    found = json.loads((tmp_path / "runs" / "s" / "search.json").read_text())
    assert found == swept.searched
    assert found["budget"]["trials"] == found["budget"]["rounds"] == 5

    # What a trial was worth is what its own run says of the validation images, and the best one is taken.
    method = found["methods"][0]
    values = [
        json.loads((Path(t["folder"]) / "summary.json").read_text())["validation_accuracy"] for t in method["trials"]
    ]
    assert values == [trial["value"] for trial in method["trials"]]
    assert method["best"]["value"] == max(values)
    # The final runs see the whole stream and are tested on test images.
    assert [point.seed for point in swept.points] == [3, 4]
    assert all(p.config.evaluate.on == "test" and p.config.scenario.first is None for p in swept.points)
    assert swept.points[0].config.options == {"fedprox": {"mu": method["best"]["settings"]["options.fedprox.mu"]}}
    assert re.fullmatch(r"mu=[\d.]+,lr=[\d.]+", swept.points[0].variant)
    assert "budget    5 trials, 5 rounds" in swept.text
    # A comparison of the sweep's folder sees the final runs alone.
    assert {run.folder for run in find_runs([tmp_path / "runs" / "s"]).runs} == {p.folder for p in swept.points}

    # Not stopped, in another folder: the same trials.
    once = sweep(asked(*space, name="t"))
    assert once.searched is not None
    again = once.searched["methods"][0]
    for trial, other in zip(method["trials"], again["trials"], strict=True):
        assert {**trial, "folder": "", "seconds": 0} == {**other, "folder": "", "seconds": 0}


def test_each_method_is_searched_on_its_own_with_its_own_options(asked: Any, here: Here) -> None:
    space = ("strategy=finetune,fedprox", "options.fedprox.mu=0.01..10:log", "optimiser.lr=0.1,0.2")
    swept = sweep(asked(*space, trials=2))
    assert swept.searched is not None
    methods = swept.searched["methods"]
    assert [[part["key"] for part in method["space"]] for method in methods] == [
        ["optimiser.lr"],
        ["optimiser.lr", "options.fedprox.mu"],
    ]
    assert [len(method["trials"]) for method in methods] == [2, 2]
    assert [point.variant.split(",")[0] for point in swept.points] == ["finetune", "fedprox"]


def test_images_trained_on_are_counted(asked: Any, here: Here) -> None:
    swept = sweep(asked("strategy=finetune", "federation.epochs=2", "optimiser.lr=0.1,0.2", trials=3))
    assert swept.searched is not None
    method = swept.searched["methods"][0]
    events = (Path(method["trials"][0]["folder"]) / "events.jsonl").read_text().splitlines()
    samples = next(e["samples"] for e in map(json.loads, events) if e["event"] == "round")
    assert 0 < samples < 120
    # Two values make two trials, however many were allowed.
    assert [trial["images"] for trial in method["trials"]] == [2 * samples, 2 * samples]
    assert method["budget"]["images"] == swept.searched["budget"]["images"] == 4 * samples


def test_a_trial_that_fails_is_counted_and_all_failing_is_an_error(asked: Any, here: Here) -> None:
    swept = sweep(asked("strategy=finetune", "federation.clients=3,500", trials=4))
    assert swept.searched is not None
    method = swept.searched["methods"][0]
    assert method["best"]["settings"] == {"federation.clients": 3}
    failed = [trial for trial in method["trials"] if trial["value"] is None]
    assert failed
    assert all("partition" in trial["cause"] and trial["status"] == "failed" for trial in failed)
    with pytest.raises(RunFailed, match="no trial of finetune has a validation accuracy; the first: "):
        sweep(asked("strategy=finetune", "federation.clients=500,501", name="none", trials=2))


def test_another_stream_to_tune_on(asked: Any, here: Here) -> None:
    swept = sweep(asked("strategy=finetune", "optimiser.lr=0.1,0.2", trials=1, tune_on="stream:9"))
    trial = here.ran[0].config
    assert (trial.seed, trial.scenario.first, trial.evaluate.on) == (9, None, "validation")
    assert swept.searched is not None
    assert swept.searched["judged_by"] == "validation_accuracy: validation images of the stream of seed 9"


def test_the_objective_reads_no_run_that_saw_test_images(tiny: Any) -> None:
    result = tiny({"data.validation": 0.2})
    config = load_config(result.folder / "config.yaml")
    point = Point("x", {}, config, result.folder, "done")
    with pytest.raises(RuntimeError, match=r"must run with evaluate.on=validation"):
        objective(point)
    judged = replace(point, config=replace(config, evaluate=replace(config.evaluate, on="validation")))
    with pytest.raises(RuntimeError, match=r"must run with evaluate.on=validation"):
        objective(judged)


@pytest.mark.parametrize(
    ("key", "whole"), [("optimiser.lr", False), ("federation.rounds", True), ("options.fedprox.mu", False)]
)
def test_an_interval_of_whole_numbers_is_one_of_numbers_where_the_setting_is(key: str, whole: bool) -> None:
    assert settle(Range(key, 0, 9, False, True)) == Range(key, 0, 9, False, whole)
    assert settle(Axis(key, (1, 2))) == Axis(key, (1, 2))


def test_what_a_trial_may_see() -> None:
    assert parse_rule(None, [5, 6]) == Rule(2, 5)
    assert parse_rule("stream:7", [5, 6]) == Rule(None, 7)
    assert Rule(1, 5).words == "validation images of the first 1 task of the stream of seed 5"
    with pytest.raises(UsageError, match="they have 0, 1, 2, 3, 4, 5, 6, 7 and more"):
        parse_rule("stream:3", range(20))


ROTATED = {"scenario.name": "domain_incremental", "scenario.shift": "rotated"}


@pytest.mark.parametrize(
    ("settings", "rule", "refused"),
    [
        ({}, Rule(4, 0), ""),
        ({}, Rule(5, 0), "fewer tasks than the stream has, 5"),
        ({"scenario.increment": 4}, Rule(2, 0), ""),
        ({"scenario.increment": 4}, Rule(3, 0), "fewer tasks than the stream has, 3"),
        ({"scenario.first": 2}, Rule(2, 0), "fewer tasks than the stream has, 2"),
        ({}, Rule(0, 0), "at least first:1"),
        ({}, Rule(None, 9), ""),
        ({"scenario.order": "natural"}, Rule(None, 9), "every seed has the same tasks"),
        ({"scenario.name": "task_incremental", "scenario.order": "natural"}, Rule(None, 9), "every seed has the same"),
        (ROTATED, Rule(None, 9), "every seed has the same tasks"),
        ({**ROTATED, "scenario.shift": "permuted"}, Rule(None, 9), ""),
    ],
)
def test_trials_never_see_all_tasks_of_the_final_runs(settings: Mapping[str, Any], rule: Rule, refused: str) -> None:
    config = load_config({}, {"data.limit": 20, **settings})
    if not refused:
        check_apart(rule, config)
        return
    with pytest.raises(UsageError, match=refused) as error:
        check_apart(rule, config)
    assert error.value.key == "--tune-on"


def test_what_a_search_lacks_is_said_before_anything_is_written(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has nothing to search"):
        sweep(asked("strategy=finetune"))
    with pytest.raises(UsageError, match="it is what trials are judged on"):
        sweep(asked("strategy=finetune", "optimiser.lr=0.1,0.2", "data.validation=0"))
    assert not (tmp_path / "runs").exists()


def test_without_optuna_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sys; found = u.find_spec;"
        "u.find_spec = lambda name, package=None: None if name == 'optuna' else found(name, package)\n"
        "from fedcl.commands.cli import run_command_line; sys.exit(run_command_line(sys.argv[1:]))"
    )
    words = ["sweep", "--search", "2", "optimiser.lr=0.1..1", "--out", str(tmp_path), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2
    said = "fedcl: --search=2: optuna is not installed; it comes with the extra: pip install 'fedcl-sim[search]'.\n"
    assert done.stderr == said


def test_runs_on_validation_images_read_no_test_image(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedcl.build import build
    from fedcl.data.store import TensorStore
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress

    settings = {"data.validation": 0.25, "partition.test": "same_mix", "evaluate.probes": ["nearest_mean"]}
    plain = execute(tiny_config(settings), progress=QuietProgress())
    config = tiny_config({**settings, "evaluate.on": "validation"})
    experiment = build(config)
    assert len(experiment.test) == len(experiment.node.store)
    assert experiment.split.test is None
    for stage in experiment.stream.stages:
        assert np.array_equal(stage.test_ids, stage.validation_ids)
        assert not set(stage.train_ids) & set(stage.test_ids)

    # Every store that is not the training images: reading it is an error.
    sizes = {len(experiment.node.store)}
    read = TensorStore.batch

    def guarded(self: TensorStore, *given: Any, **named: Any) -> Any:
        assert len(self) in sizes, "a test image was read"
        return read(self, *given, **named)

    monkeypatch.setattr(TensorStore, "batch", guarded)
    with pytest.raises(RunFailed, match="a test image was read"):
        execute(tiny_config(settings), progress=QuietProgress())
    judged = execute(config, progress=QuietProgress())
    assert judged.summary["model_sha256"] == plain.summary["model_sha256"], "what is measured does not change training"
    total = judged.summary["test_counts"]
    right = sum(share * count for share, count in zip(judged.matrix[-1], total, strict=True) if share is not None)
    assert right / sum(total) == pytest.approx(judged.summary["validation_accuracy"])
    assert judged.summary["validation_accuracy"] == plain.summary["validation_accuracy"]


def test_runs_on_validation_images_need_some(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match=r"data.validation=0.0: must be above 0 with evaluate.on=validation"):
        tiny_config({"evaluate.on": "validation"})
