"""New instances: equal parts, complete, every class in every task."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.scenarios.new_instances import NewInstances
from fedcl.stream import DatasetLabels


def built(data, seed=0, validation=0.0, **options):
    return NewInstances().build(data, settings.Scenario(name="new_instances", **options), validation, seed)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(6, 20), min_size=1, max_size=8), tests=st.integers(6, 9), tasks=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_parts_are_complete_and_even(sizes, tests, tasks, seed):
    classes = len(sizes)
    data = DatasetLabels(np.repeat(np.arange(classes), sizes), np.repeat(np.arange(classes), tests), classes)
    stream = built(data, seed, tasks=tasks)
    assert np.sort(np.concatenate([s.train_ids for s in stream.stages])).tolist() == list(range(sum(sizes)))
    assert np.sort(np.concatenate([s.test_ids for s in stream.stages])).tolist() == list(range(tests * classes))
    assert [s.classes for s in stream.stages] == [tuple(range(classes))] + [()] * (tasks - 1)
    counts = np.array([np.bincount(stream.train_labels[s.train_ids], minlength=classes) for s in stream.stages])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    assert counts.min() >= 1
    totals = [len(s.train_ids) for s in stream.stages]
    assert max(totals) - min(totals) <= 1
    columns = [len(s.test_ids) for s in stream.stages]
    assert max(columns) - min(columns) <= 1


def test_held_out_images_are_dealt_too():
    data = DatasetLabels(np.arange(100) % 5, np.arange(20) % 5, 5)
    stream = built(data, 1, 0.2, tasks=4)
    assert [(len(s.train_ids), len(s.validation_ids), len(s.test_ids)) for s in stream.stages] == [(20, 5, 5)] * 4


@pytest.mark.parametrize(
    ("options", "validation", "key", "text"),
    [
        ({"tasks": 7}, 0.0, "scenario.tasks", "1 to 6: a class has 6 training images"),
        ({"tasks": 6}, 0.3, "scenario.tasks", "1 to 4: a class has 4 training images"),
        ({"tasks": 2, "increment": 2}, 0.0, "scenario.increment", "not read"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, validation, key, text):
    data = DatasetLabels(np.arange(60) % 10, np.arange(20) % 10, 10)
    with pytest.raises(UsageError) as caught:
        built(data, 0, validation, **options)
    assert caught.value.key == key
    assert text in str(caught.value)


def test_more_tasks_than_test_images_are_refused():
    with pytest.raises(UsageError, match="1 to 2: there are 2 test images"):
        built(DatasetLabels(np.arange(60) % 2, np.arange(2), 2), tasks=3)
