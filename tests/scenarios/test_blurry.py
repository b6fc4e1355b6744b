"""i-Blurry and Si-Blurry: the published properties, what moves, what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.scenarios.blurry import IBlurry, SiBlurry, pool_sizes
from fedcl.stream import DatasetLabels


def labels_of(classes, each, test=2):
    train, tests = np.arange(classes * each) % classes, np.arange(classes * test) % classes
    return DatasetLabels(train, tests, classes)


def built(scenario, data, seed=0, validation=0.0, **options):
    return scenario().build(data, settings.Scenario(name=scenario.name, **options), validation, seed)


def tasks_of(stream):
    """Original class -> tasks that show it, and all rows in the order of the tasks."""
    original = np.array(stream.class_order)
    where: dict[int, set[int]] = {}
    for stage in stream.stages:
        for c in np.unique(original[stream.train_labels[stage.train_ids]]).tolist():
            where.setdefault(c, set()).add(stage.index)
    return where, np.concatenate([stage.train_ids for stage in stream.stages])


percent = st.integers(0, 100)
cases = st.tuples(
    st.integers(2, 23), st.integers(1, 12), st.integers(1, 6), percent, percent, st.integers(0, 2**60)
)  # fmt: skip


@pytest.mark.parametrize("scenario", [IBlurry, SiBlurry])
@hypothesis_settings(max_examples=80, deadline=None)
@given(case=cases)
def test_the_published_properties(scenario, case):
    classes, each, tasks, n, m, seed = case
    data = labels_of(classes, each)
    try:
        stream = built(scenario, data, seed, tasks=tasks, disjoint=n / 100, blurred=m / 100)
    except UsageError as error:
        if error.key != ("scenario.tasks" if tasks > classes else "scenario.name"):
            raise
        reject()
    disjoint = n * classes // 100 // tasks * tasks
    blurry = (classes - disjoint) // tasks * tasks
    where, rows = tasks_of(stream)
    # the union of the tasks is all images of the kept classes, none twice
    assert len(where) == disjoint + blurry
    assert np.sort(rows).tolist() == np.flatnonzero(np.isin(data.train_labels, list(where))).tolist()
    # at least the disjoint classes are in exactly one task; without moved images all are
    assert sum(len(places) == 1 for places in where.values()) >= disjoint
    if m == 0:
        assert all(len(places) == 1 for places in where.values())


@hypothesis_settings(max_examples=40, deadline=None)
@given(case=cases)
def test_i_blurry_gives_every_task_as_many_classes_and_images(case):
    classes, each, tasks, n, m, seed = case
    data = labels_of(classes, each)
    try:
        stream = built(IBlurry, data, seed, tasks=tasks, disjoint=n / 100, blurred=m / 100)
    except UsageError:
        reject()
    sizes = [len(stage.train_ids) for stage in stream.stages]
    assert max(sizes) - min(sizes) <= 1
    # blurry classes leave exactly the asked share of their images, counted by task
    disjoint, blurry = pool_sizes(classes, tasks, Fraction(n, 100))
    plain = built(IBlurry, data, seed, tasks=tasks, disjoint=n / 100, blurred=0.0)
    cut = m * (blurry // tasks * each) // 100
    for before, after in zip(plain.stages, stream.stages, strict=True):
        assert len(np.setdiff1d(before.train_ids, after.train_ids)) <= cut
    assert disjoint % tasks == blurry % tasks == 0


rows_of_tasks = st.lists(st.integers(0, 30), min_size=1, max_size=6)


@pytest.mark.parametrize("scenario", [IBlurry, SiBlurry])
@hypothesis_settings(max_examples=80, deadline=None)
@given(sizes=rows_of_tasks, moved=percent, seed=st.integers(0, 2**40))
def test_the_first_images_of_each_task_move_and_the_rest_stays(scenario, sizes, moved, seed):
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(a, b) for a, b in pairwise(starts.tolist())]
    after = scenario().blur(rows, Fraction(moved, 100), seed)
    assert sorted(np.concatenate(after).tolist()) == list(range(sum(sizes)))
    kept = []
    for mine, now in zip(rows, after, strict=True):
        # what stays stands in front, in the order of the dataset, and is the end of what the task had
        stay = next((s for s in range(min(len(mine), len(now)), -1, -1) if (now[:s] == mine[len(mine) - s :]).all()), 0)
        kept.append(stay)
    left = [len(mine) - stay for mine, stay in zip(rows, kept, strict=True)]
    if scenario is IBlurry:
        cuts = [moved * size // 100 for size in sizes]
        assert all(gone <= cut for gone, cut in zip(left, cuts, strict=True))
        pool = sum(cuts)
        back = [len(now) - (size - cut) for now, size, cut in zip(after, sizes, cuts, strict=True)]
        assert all(pool // len(sizes) <= share <= pool // len(sizes) + 1 for share in back)
        assert sum(back) == pool
    else:
        assert sum(left) <= math.floor(Fraction(moved, 100) * sum(sizes))


def test_si_blurry_follows_the_sampler_step_by_step(monkeypatch):
    """Three blurry tasks of 4, 2 and 4 rows, half of them moved: shares 1, 3 and 1 by hand."""
    from fedcl.scenarios import blurry

    monkeypatch.setattr(blurry, "_cuts", lambda bound, tasks, *stream: [1, 4])
    monkeypatch.setattr(blurry.counter, "permutation", lambda count, *stream: np.arange(count)[::-1])
    rows = [np.arange(4), np.arange(4, 6), np.arange(6, 10)]
    after = SiBlurry().blur(rows, Fraction(1, 2), 0)
    # task 2 has only two to give: pool 0, 4, 5, 6; reversed 6, 5, 4, 0; shares 1, 3, then nothing is left
    assert [part.tolist() for part in after] == [[1, 2, 3, 6], [5, 4, 0], [7, 8, 9]]


def test_random_cuts_cover_the_whole_pool_and_differ_between_seeds():
    pool = tuple(range(40))
    shares = []
    for seed in range(60):
        parts = SiBlurry().classes(pool, 5, seed)
        assert sum(parts, ()) == pool
        shares.append([len(part) for part in parts])
    assert np.abs(np.mean(shares, axis=0) - 8).max() < 2.5
    assert np.std(shares) > 4


def test_columns_follow_the_first_image():
    data = labels_of(10, 20, test=3)
    stream = built(IBlurry, data, 1, 0.1, tasks=2, disjoint=0.2, blurred=0.4)
    # eight blurry classes move 32 of 80 images from each task: the first task shows all of them
    assert [len(stage.classes) for stage in stream.stages] == [9, 1]
    assert [len(stage.test_ids) for stage in stream.stages] == [27, 3]
    assert [len(stage.validation_ids) for stage in stream.stages] == [18, 2]
    assert stream.known(1) == tuple(range(10))


def test_classes_lost_by_rounding_are_never_shown():
    stream = built(SiBlurry, labels_of(10, 30), 5, tasks=3, disjoint=0.5, blurred=0.1)
    where, _ = tasks_of(stream)
    assert len(where) == 9
    lost = stream.class_order[9]
    assert lost not in where
    assert all(9 not in stage.classes for stage in stream.stages)


def test_a_share_is_taken_as_it_is_written():
    # 0.29 * 100 is 28.999... as a float
    assert pool_sizes(100, 1, Fraction("0.29")) == (29, 71)
    stream = built(IBlurry, labels_of(100, 2), 0, tasks=1, disjoint=0.29, blurred=0.0)
    assert len(stream.stages[0].classes) == 100


@pytest.mark.parametrize("scenario", [IBlurry, SiBlurry])
@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({"tasks": 11}, "scenario.tasks", "1 to 10: the dataset has 10 classes"),
        ({"disjoint": 1.5}, "scenario.disjoint", "[0, 1]"),
        ({"blurred": -0.1}, "scenario.blurred", "[0, 1]"),
        ({"base": 3}, "scenario.base", "not read"),
        ({"shots": 3}, "scenario.shots", "not read"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(scenario, options, key, text):
    with pytest.raises(UsageError) as caught:
        built(scenario, labels_of(10, 5), **options)
    assert caught.value.key == key
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_without_images_is_refused():
    data = labels_of(2, 3)
    refused = 0
    for seed in range(40):
        try:
            built(SiBlurry, data, seed, tasks=2, disjoint=1.0, blurred=0.0)
        except UsageError as error:
            refused += "task" in str(error) and "gets no training image" in str(error)
    # the one cut of two classes is 0 or 1: half of the seeds leave the first task without a class
    assert 8 < refused < 32
