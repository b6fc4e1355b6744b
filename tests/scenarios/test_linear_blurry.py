"""Linear-decay transitions: by hand, by numeric integration, and against Avalanche's continuous streams."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.bridges.avalanche_import import quiet_avalanche, sealed
from fedcl.errors import UsageError
from fedcl.scenarios.class_incremental import ClassIncremental
from fedcl.scenarios.linear_blurry import LinearBlurry, passed, shown_at
from fedcl.stream import DatasetLabels


def labels_of(classes=6, each=40, test=2):
    return DatasetLabels(np.arange(classes * each) % classes, np.arange(classes * test) % classes, classes)


def built(data, seed=0, validation=0.0, **options):
    return LinearBlurry().build(data, settings.Scenario(name="linear_blurry", **options), validation, seed)


def composition(stream, groups, width):
    """(T, groups): training rows of each class set in each task; the sets have ``width`` classes each."""
    out = np.zeros((stream.num_tasks, groups), dtype=int)
    for stage in stream.stages:
        out[stage.index] = np.bincount(stream.train_labels[stage.train_ids] // width, minlength=groups)
    return out


def test_shares_by_hand():
    # three sets of 80 images, overlap 1/4: each leaks 1/16 of its images into a neighbour
    stream = built(labels_of(), tasks=3)
    assert composition(stream, 3, 2).tolist() == [[75, 5, 0], [5, 70, 5], [0, 5, 75]]


def test_steps_make_the_ramp_visible():
    # two sets of 120 images, overlap 1/2, four tasks a set: 30 images a task, a rise of 1/4 a task around the boundary
    stream = built(labels_of(), tasks=2, steps=4, overlap=0.5)
    found = composition(stream, 2, 3)
    assert found.sum(axis=1).tolist() == [30] * 8
    assert found[:, 1].tolist() == [0, 0, 4, 11, 19, 26, 30, 30]


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    sets=st.integers(1, 6), percent=st.integers(0, 50), time=st.fractions(0, 6, max_denominator=20),
)  # fmt: skip
def test_passed_is_the_integral_of_the_probability(sets, percent, time):
    overlap = Fraction(percent, 100)
    time = min(time, Fraction(sets))
    everything = [passed(index, sets, time, overlap) for index in range(sets)]
    assert sum(everything) == time  # the probabilities sum to 1 at every time
    assert all(0 <= part <= 1 for part in everything)
    assert [passed(index, sets, Fraction(sets), overlap) for index in range(sets)] == [1] * sets
    moments = (np.arange(1000) + 0.5) / 1000 * float(time)
    for index, part in enumerate(everything):
        assert abs(probability(index, sets, moments, float(overlap)).mean() * float(time) - part) < 0.01


def probability(index, sets, time, overlap):
    """The chance of a class set at a time, from the definition: a line up, a plateau, a line down."""
    if overlap == 0:
        return ((time >= index) & (time < index + 1)).astype(float)
    up = np.clip((time - index + overlap) / (2 * overlap), 0, 1) if index else np.ones_like(time)
    down = np.clip((index + 1 + overlap - time) / (2 * overlap), 0, 1) if index < sets - 1 else np.ones_like(time)
    return np.minimum(up, down)


def test_the_probabilities_are_those_of_avalanche():
    quiet_avalanche()
    sets, iterations, size = 3, 16, 1500
    with sealed(5):
        import torch
        from avalanche.benchmarks import tensors_benchmark
        from avalanche.benchmarks.scenarios.online import split_continuous_linear_decay_stream

        parts = [(torch.zeros(30, 1), torch.full((30,), index)) for index in range(sets)]
        stream = tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0] * sets).train_stream
        continuous = split_continuous_linear_decay_stream(
            stream, size, iters_per_virtual_epoch=iterations, beta=4, shuffle=True
        )
        drawn = [[int(y) for y in experience.dataset.targets] for experience in continuous]
    theirs = np.array([np.bincount(labels, minlength=sets) / size for labels in drawn])
    starts = np.arange(sets * iterations) / iterations
    mine = np.stack([probability(index, sets, starts, 0.25) for index in range(sets)], axis=1)
    assert theirs.shape == mine.shape
    # their own sampling: a standard deviation of at most 0.013
    assert np.abs(theirs - mine).max() < 0.065


def test_without_overlap_it_is_class_incremental():
    data = labels_of()
    plain = ClassIncremental().build(data, settings.Scenario(tasks=3), 0.2, 4)
    stream = built(data, 4, 0.2, tasks=3, overlap=0.0)
    assert stream.class_order == plain.class_order
    for mine, theirs in zip(stream.stages, plain.stages, strict=True):
        assert mine.classes == theirs.classes
        assert (mine.train_ids == theirs.train_ids).all()
        assert (mine.validation_ids == theirs.validation_ids).all()
        assert (mine.test_ids == theirs.test_ids).all()


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    sets=st.integers(1, 4), count=st.integers(1, 30), overlap=st.integers(0, 50).map(lambda x: x / 100), data=st.data()
)
def test_an_image_comes_when_as_many_have_passed(sets, count, overlap, data):
    index = data.draw(st.integers(0, sets - 1))
    moments = shown_at(index, sets, count, overlap)
    assert (np.diff(moments) > 0).all()
    for place, moment in enumerate(moments.tolist()):
        share = passed(index, sets, Fraction(moment), Fraction(str(overlap)))
        assert float(share) == pytest.approx((place + 0.5) / count, abs=1e-9)


def test_tasks_follow_each_other_in_time():
    stream = built(labels_of(each=37), 2, 0.1, tasks=3, steps=5, overlap=0.4)
    shown = np.concatenate([stage.train_ids for stage in stream.stages])
    ends = [(stream.arrival[s.train_ids].min(), stream.arrival[s.train_ids].max()) for s in stream.stages]
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert len(np.unique(stream.arrival[shown])) == len(shown)
    sha = hashlib.sha256(np.ascontiguousarray(stream.arrival, dtype="<i8").tobytes()).hexdigest()
    assert sha[:16] == "9d3484ff9eac0a2f"


def test_every_image_is_dealt_once():
    data = labels_of(each=37)
    stream = built(data, 2, 0.1, tasks=3, steps=5, overlap=0.4)
    rows = np.concatenate([ids for stage in stream.stages for ids in (stage.train_ids, stage.validation_ids)])
    assert np.sort(rows).tolist() == list(range(6 * 37))
    assert stream.stages[-1].classes == ()
    assert len(stream.stages[-1].test_ids) == 0


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tasks": 7}, "scenario.tasks"),
        ({"tasks": 2, "overlap": 0.6}, "scenario.overlap"),
        ({"tasks": 2, "overlap": -0.1}, "scenario.overlap"),
        ({"tasks": 2, "steps": 400}, "scenario.name"),
        ({"tasks": 2, "disjoint": 0.2}, "scenario.disjoint"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, key):
    with pytest.raises(UsageError) as caught:
        built(labels_of(), **options)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)
