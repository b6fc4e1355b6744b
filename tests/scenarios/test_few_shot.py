"""Few-shot class-incremental streams: sessions, shots, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.scenarios.few_shot import FewShot
from fedcl.stream import DatasetLabels


def labels_of(classes=10, each=12, test=3):
    names = tuple(f"class {c}" for c in range(classes))
    return DatasetLabels(np.arange(classes * each) % classes, np.arange(classes * test) % classes, classes, names)


def built(data, seed=0, validation=0.0, **options):
    return FewShot().build(data, settings.Scenario(name="few_shot", **options), validation, seed)


@hypothesis_settings(max_examples=30, deadline=None)
@given(shots=st.integers(1, 9), ways=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**40))
def test_sessions(shots, ways, seed):
    data = labels_of()
    stream = built(data, seed, 0.25, base=6, increment=ways, shots=shots)
    assert [len(stage.classes) for stage in stream.stages] == [6] + [ways] * (4 // ways)
    assert len(stream.stages[0].train_ids) == 6 * 9
    for stage in stream.stages[1:]:
        counts = np.bincount(stream.train_labels[stage.train_ids], minlength=10)
        assert counts.tolist() == [shots * (label in stage.classes) for label in range(10)]
        assert len(stage.test_ids) == 3 * ways
    rows = np.concatenate([ids for stage in stream.stages for ids in (stage.train_ids, stage.validation_ids)])
    assert len(np.unique(rows)) == len(rows)


def test_the_published_cifar_100_protocol():
    stream = built(labels_of(100, 20, 2), base=60, increment=5, shots=5)
    assert [len(stage.train_ids) for stage in stream.stages] == [60 * 20] + [25] * 8
    assert stream.num_tasks == 9


def test_shots_of_two_seeds_differ():
    rows = [
        built(labels_of(), seed, base=6, increment=2, shots=3, order="natural").stages[1].train_ids for seed in (0, 1)
    ]
    assert rows[0].tolist() != rows[1].tolist()


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({"base": 6, "increment": 2, "shots": 10}, "scenario.shots", "1 to 9: class class"),
        ({"base": 6, "increment": 2, "shots": 0}, "scenario.shots", "1 to 9"),
        ({"increment": 2}, "scenario.base", "base session"),
        ({"base": 10, "increment": 2}, "scenario.base", "0 to 9"),
        ({"base": 5, "increment": 2}, "scenario.increment", "5 classes after the base session out equally"),
        ({"base": 5, "tasks": 3}, "scenario.tasks", "out equally"),
        ({"base": 5, "increment": 5, "steps": 2}, "scenario.steps", "not read"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, key, text):
    with pytest.raises(UsageError) as caught:
        built(labels_of(), 0, 0.25, **options)
    assert caught.value.key == key
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
