"""Open-world streams: who is known, who has a label, what is tested."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.scenarios.open_world import OpenWorld
from fedcl.stream import DatasetLabels


def labels_of(classes=8, each=24, test=7):
    names = tuple(f"class {c}" for c in range(classes))
    return DatasetLabels(np.arange(classes * each) % classes, np.arange(classes * test) % classes, classes, names)


def built(data, seed=0, validation=0.0, **options):
    return OpenWorld().build(data, settings.Scenario(name="open_world", **options), validation, seed)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    base=st.integers(2, 5), mixed=st.sampled_from([0.0, 0.25, 0.5, 0.9]), labelled=st.sampled_from([0.0, 0.3, 1.0]),
    validation=st.sampled_from([0.0, 0.25]), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_roles(base, mixed, labelled, validation, seed):
    data = labels_of()
    stream = built(data, seed, validation, base=base, increment=1, mixed=mixed, labelled=labelled)
    assert stream.num_tasks == 9 - base
    assert [stage.classes for stage in stream.stages] == [tuple(range(base))] + [()] * (8 - base)
    kept = 24 - int(24 * validation)
    rows = np.concatenate([stage.train_ids for stage in stream.stages])
    assert len(np.unique(rows)) == len(rows) == 8 * kept
    hidden = set(stream.unlabelled.tolist())
    for session, stage in enumerate(stream.stages):
        counts = np.bincount(stream.train_labels[stage.train_ids], minlength=8)
        assert not counts[base + session :].any()  # no class before its session
        new = range(base) if session == 0 else [base + session - 1]
        moved = int(mixed * kept) if session < stream.num_tasks - 1 else 0
        assert all(counts[c] == kept - moved for c in new)
        for label in range(8):
            mine = stage.train_ids[stream.train_labels[stage.train_ids] == label].tolist()
            named = len(set(mine) - hidden)
            expected = 0 if label >= base else len(mine) if session == 0 else int(labelled * len(mine) + 0.5 + 1e-9)
            assert named == expected
    tests = np.concatenate([stage.test_ids for stage in stream.stages])
    assert sorted(tests.tolist()) == np.flatnonzero(stream.test_labels < base).tolist()
    assert max(len(s.test_ids) for s in stream.stages) - min(len(s.test_ids) for s in stream.stages) <= 1
    assert stream.unnamed[0].tolist() == np.flatnonzero(stream.test_labels >= base).tolist()
    assert (stream.train_labels[stream.unnamed[1]] >= base).all()
    assert len(stream.unnamed[1]) == (8 - base) * (24 - kept)
    held = [stage.validation_ids for stage in stream.stages]
    assert (stream.train_labels[np.concatenate(held)] < base).all()
    assert len(np.unique(np.concatenate(held))) == base * (24 - kept)
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_the_same_stream_on_every_machine():
    stream = built(labels_of(), 3, 0.1, base=4, increment=2, mixed=0.3, labelled=0.4)
    parts = [*(s.train_ids for s in stream.stages), *(s.test_ids for s in stream.stages), stream.unlabelled]
    text = ";".join(",".join(map(str, ids.tolist())) for ids in parts)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9451956d71bd2ed3"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "scenario.base=None"),
        ({"base": 8, "increment": 1}, "scenario.base=8"),
        ({"base": 4, "increment": 1, "labelled": 1.5}, "scenario.labelled=1.5"),
        ({"base": 4, "increment": 1, "shots": 3}, "scenario.shots=3"),
    ],
)
def test_refusals(options, told):
    with pytest.raises(UsageError) as caught:
        built(labels_of(), **options)
    assert told in str(caught.value)


def test_novelty_by_hand(tiny, tiny_config):
    """From the final model: known test images against those of every class that has no name."""
    import torch
    from sklearn.metrics import roc_auc_score

    world = {"scenario.name": "open_world", "scenario.base": 6, "scenario.tasks": 3, "data.limit": 20}
    result = tiny(world)
    assert set(result.summary["probes"]) == {"novelty"}
    experiment = build(tiny_config(world))
    stream = experiment.stream
    known = np.concatenate([stage.test_ids for stage in stream.stages])
    rows = np.concatenate([known, stream.unnamed[0]])
    assert len(rows) == len(stream.test_labels)
    logits = result.model(experiment.test.batch(torch.from_numpy(rows), torch.float64)).logits
    truth = [1] * len(known) + [0] * len(stream.unnamed[0])
    found = result.summary["probes"]["novelty"]
    assert logits.shape[1] == 6
    assert found["auroc_softmax"] == pytest.approx(roc_auc_score(truth, logits.softmax(1).amax(1).tolist()))
    assert found["auroc_energy"] == pytest.approx(roc_auc_score(truth, logits.logsumexp(1).tolist()))
    assert all(value is not None for row in result.matrix for value in row)


def test_where_no_class_is_unknown_novelty_is_undefined(tiny):
    summary = tiny({"evaluate.probes": ["novelty"]}).summary
    assert set(summary["probes"]["novelty"].values()) == {None}
    assert {f"probes.novelty.{n}" for n in summary["probes"]["novelty"]} <= set(summary["undefined"])


def test_a_tuning_run_reads_no_test_image(tiny_config):
    world = {"scenario.name": "open_world", "scenario.base": 6, "scenario.tasks": 3, "data.validation": 0.25}
    experiment = build(tiny_config({**world, "evaluate.on": "validation"}))
    stream = experiment.stream
    assert len(stream.unnamed[0])
    assert stream.unnamed[0].tolist() == stream.unnamed[1].tolist()
    held = np.concatenate([np.concatenate(task) for task in experiment.split.rows])
    assert not set(stream.unnamed[0].tolist()) & {*held.tolist(), *experiment.split.hidden.tolist()}


def test_a_tuning_run_has_all_its_columns(tiny):
    world = {"scenario.name": "open_world", "scenario.base": 6, "scenario.tasks": 3, "data.validation": 0.25}
    summary = tiny({**world, "evaluate.on": "validation"}).summary
    assert summary["average_accuracy"] is not None
    assert summary["test_counts"] == [6, 6, 6]


@pytest.mark.parametrize("name", ["joint", "noisy_labels", "cumulative"])
def test_a_changed_stream_is_about_the_same(name, tiny_config):
    world = {"scenario.base": 6, "scenario.increment": 2, "scenario.of": ["open_world"]}
    assert build(tiny_config({**world, "scenario.name": name})).config.evaluate.probes == ["novelty"]


def test_personal_tests_ask_for_known_classes_only(tiny_config):
    world = {"scenario.name": "open_world", "scenario.base": 6, "scenario.tasks": 3, "partition.test": "holdout(0.3)"}
    split = build(tiny_config({**world, "federation.clients": 4, "partition.held_out": 1})).split
    for part in (split, split.held_out):
        tested = np.concatenate([np.concatenate(task) for task in part.test])
        assert len(tested)
        assert split.train_labels[tested].max() < 6
        assert not set(tested.tolist()) & set(split.hidden.tolist())
