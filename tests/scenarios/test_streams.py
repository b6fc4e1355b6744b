"""What holds for every scenario: rows, positions, splits, repetition, pictures, nodes, whole runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl import registry
from fedcl.build import build, build_split
from fedcl.errors import UsageError
from fedcl.partitioning import partition_stream
from fedcl.runtimes.setup import Setup, build_node, images_digest
from fedcl.stream import DatasetLabels
from fedcl.streams.labels import masked
from fedcl.streams.split import draw_split

DEFAULT_STACK = {
    "strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning"],
    "options": {"nearest_mean": {"score": "both"}, "supcon": {"weight": 0.1}, "weight_aligning": {"clip": False}},
    "model.head_bias": False,
}

CASES: dict[str, dict[str, object]] = {
    "class_incremental": {"tasks": 2},
    "i_blurry": {"tasks": 2, "blurred": 0.3},
    "si_blurry": {"tasks": 2, "blurred": 0.3},
    "linear_blurry": {"tasks": 2, "steps": 2},
    "new_instances": {"tasks": 2},
    "few_shot": {"base": 6, "increment": 2, "shots": 3},
    "long_tailed": {"tasks": 2, "imbalance": 5.0},
    "noisy_labels": {"tasks": 2, "of": ["i_blurry"], "noise": "asymmetric"},
    "domain_incremental": {"tasks": 2, "shift": "rotated"},
    "task_incremental": {"tasks": 2},
    "cumulative": {"tasks": 2},
    "joint": {"tasks": 2, "of": ["i_blurry"]},
    "open_world": {"base": 6, "increment": 2, "mixed": 0.25, "labelled": 0.3},
    "category_discovery": {"base": 6, "increment": 2, "mixed": 0.25},
}
"""Settings that fit ten classes, by scenario; all but class_incremental and few_shot keep all classes in sight."""

NEVER_NAMED = {"open_world", "category_discovery"}
"""Scenarios that show classes which no task exposes; their rows are tested by themselves."""


def every_scenario(*, without=frozenset()):
    return pytest.mark.parametrize("name", sorted(set(CASES) - without))


def of_run(name):
    return {f"scenario.{key}": value for key, value in {"name": name, **CASES[name]}.items()}


def shown(name, data, validation, seed, **more):
    """The stream of a scenario over bare labels, prepared as its images would be."""
    config = settings.Scenario(name=name, **{**CASES[name], **more})
    scenario = registry.load("scenarios", name)()
    if name == "domain_incremental":
        copies = config.tasks
        train, test = (np.tile(labels, copies) for labels in (data.train_labels, data.test_labels))
        domains = tuple(np.repeat(np.arange(copies), len(x)) for x in (data.train_labels, data.test_labels))
        names = tuple(str(task) for task in range(copies))
        data = DatasetLabels(train, test, data.num_classes, data.names, names, {"domain": domains})
    if name == "noisy_labels":
        data = replace(data, columns={"clean_label": (data.train_labels, data.test_labels)})
    return data, scenario.build(data, config, validation, seed)


def cycling(classes=10, each=12, test=4):
    """Row i has class i mod ``classes``."""
    train = np.arange(classes * each, dtype=np.int64) % classes
    return DatasetLabels(train, np.arange(classes * test, dtype=np.int64) % classes, classes)


def test_every_registered_scenario_has_a_case_here():
    own = {entry.name for entry in registry.entries("scenarios") if entry.origin == "fedcl-sim"}
    assert own == {*CASES, "benchmark"}  # a benchmark is made of other code's images and has tests of its own


@every_scenario()
def test_the_card_says_what_there_is_to_know(name):
    cls = registry.load("scenarios", name)
    assert cls.card.title
    assert cls.card.year
    assert cls.card.notes
    assert name == "class_incremental" or cls.card.certainty
    keys = set(CASES[name]) - {"tasks"}
    assert all(key in cls.card.notes for key in keys), keys


@every_scenario(without=NEVER_NAMED)
@hypothesis_settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_rows_positions_and_columns(name, data):
    seed = data.draw(st.integers(0, 2**40), "seed")
    each = data.draw(st.integers(8, 14), "each")
    validation = data.draw(st.sampled_from([0.0, 0.2]), "validation")
    order = np.argsort(np.array(data.draw(st.permutations(range(10 * each)), "rows")))
    plain = cycling(10, each)
    labels = replace(plain, train_labels=plain.train_labels[order])
    try:
        labels, stream = shown(name, labels, validation, seed)
    except UsageError as error:
        if "no training image" not in str(error):
            raise
        reject()
    original = np.array(stream.class_order)
    assert sorted(stream.class_order) == list(range(10))
    assert (original[stream.train_labels] == labels.train_labels).all()
    assert (original[stream.test_labels] == labels.test_labels).all()
    assert stream.repeats == (name == "cumulative")
    rows = [ids for stage in stream.stages for ids in (stage.train_ids, stage.validation_ids)]
    if name == "cumulative":
        rows = [ids for stage in stream.stages for ids in (stage.validation_ids,)] + [stream.stages[-1].train_ids]
    everything = np.concatenate(rows)
    assert len(np.unique(everything)) == len(everything)
    tested = np.concatenate([stage.test_ids for stage in stream.stages])
    assert len(np.unique(tested)) == len(tested)
    first: dict[int, int] = {}
    for stage in stream.stages:
        assert len(stage.train_ids)
        for ids in (stage.train_ids, stage.validation_ids, stage.test_ids):
            assert (np.diff(ids) > 0).all()
        known = stream.known(stage.index)
        assert known == tuple(range(len(known)))  # the head grows by appending rows
        here = set(stream.train_labels[stage.train_ids].tolist())
        assert here <= set(known)
        for label in here:
            first.setdefault(label, stage.index)
        if name not in ("new_instances", "domain_incremental"):
            assert set(stream.test_labels[stage.test_ids].tolist()) == set(stage.classes)
            assert set(stream.train_labels[stage.validation_ids].tolist()) <= set(stage.classes)
    assert first == {label: stage.index for stage in stream.stages for label in stage.classes}


@every_scenario()
@pytest.mark.parametrize("rule", ["iid", "dirichlet", "shards"])
def test_a_split_deals_every_training_row_to_one_client(name, rule):
    _, stream = shown(name, cycling(), 0.2, 3)
    partition = registry.load("partitions", rule)()
    split = partition_stream(stream, partition, settings.Partition(name=rule), 3, 3)
    for stage, clients in zip(stream.stages, split.rows, strict=True):
        assert np.sort(np.concatenate(clients)).tolist() == stage.train_ids.tolist()


def digest(stream):
    parts = [np.array(stream.class_order), stream.train_labels, stream.test_labels]
    parts += [ids for s in stream.stages for ids in (s.classes, s.train_ids, s.validation_ids, s.test_ids)]
    sha = hashlib.sha256()
    for part in parts:
        raw = np.ascontiguousarray(part, dtype="<i8").tobytes()
        sha.update(len(raw).to_bytes(8, "little") + raw)
    return sha.hexdigest()[:16]


STORED = {
    "class_incremental": "2894dca7914ec4ee",
    "i_blurry": "b9045cfd22fd67ed",
    "si_blurry": "16e1d3bc3c1ecd27",
    "linear_blurry": "ec9f04928c134511",
    "new_instances": "5cf47555ab9e1b56",
    "few_shot": "2f61148a26d9cfbc",
    "long_tailed": "1211fd8131296e3c",
    "noisy_labels": "2a4be66e58a85b2e",
    "domain_incremental": "c0e3703f43200613",
    "task_incremental": "2894dca7914ec4ee",  # that of class_incremental
    "cumulative": "fcb2fe07b33f723c",
    "joint": "605f6298ad225d9e",
    "open_world": "171cdf4233282b21",
    "category_discovery": "548f5d94f78bc2b6",
}


@every_scenario()
def test_the_same_seed_gives_the_same_stream_on_every_machine(name):
    found = digest(shown(name, cycling(), 0.2, 7)[1])
    assert found == digest(shown(name, cycling(), 0.2, 7)[1])
    assert found != digest(shown(name, cycling(), 0.2, 8)[1])
    assert found == STORED[name]


@every_scenario()
def test_its_picture(name, tiny_config, tmp_path):
    stream, split, names = build_split(tiny_config(of_run(name)))
    draw_split(split, stream, names, tmp_path / "split.png")
    assert (tmp_path / "split.png").stat().st_size > 5000


@every_scenario()
def test_a_node_elsewhere_holds_the_same_images(name, tiny_config, tmp_path):
    experiment = build(tiny_config(of_run(name)))
    setup = Setup.from_json(Setup.of(experiment, tmp_path).to_json())
    node = build_node(setup, {"state-dir": str(tmp_path / "states")})
    here = experiment.node
    for mine, there in ((here.store, node.store), (here.test, node.test)):
        assert images_digest(mine) == images_digest(there)
        every = torch.arange(len(mine))
        assert torch.equal(mine.gather(every), there.gather(every))
    assert (node.store.labels == masked(experiment.stream.train_labels, experiment.stream.unlabelled)).all()


@every_scenario()
def test_runs_with_finetune(name, tiny):
    result = tiny({**of_run(name), "data.validation": 0.1})
    matrix, tasks = result.matrix, result.summary["num_tasks"]
    assert (len(matrix), result.summary["status"]) == (tasks, "done")
    empty = [task for task in range(tasks) if matrix[-1][task] is None or np.isnan(matrix[-1][task])]
    # nothing is first exposed in the second half of two sets that fade into one another
    assert empty == ([3] if name == "linear_blurry" else [])
    assert (result.summary["average_accuracy"] is None) == bool(empty)
    assert ("average_accuracy" in result.summary["undefined"]) == bool(empty)
    assert 0 < result.summary["average_accuracy_weighted"] <= 1


@every_scenario()
def test_runs_with_the_default_stack(name, tiny):
    settings_ = {**of_run(name), **DEFAULT_STACK}
    summary = tiny(settings_).summary
    assert summary["status"] == "done"
    assert 0 < summary["average_accuracy_weighted"] <= 1
