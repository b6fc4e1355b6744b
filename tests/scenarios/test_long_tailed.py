"""Long-tailed streams: the profile, who gets which rank, composition, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.scenarios.class_incremental import ClassIncremental
from fedcl.scenarios.long_tailed import LongTailed, profile
from fedcl.stream import DatasetLabels


def labels_of(classes=10, each=60, test=2):
    return DatasetLabels(np.arange(classes * each) % classes, np.arange(classes * test) % classes, classes)


def built(data, seed=0, validation=0.0, **options):
    return LongTailed().build(data, settings.Scenario(name="long_tailed", **options), validation, seed)


def counts_of(stream):
    return np.bincount(
        stream.train_labels[np.concatenate([s.train_ids for s in stream.stages])], minlength=stream.num_classes
    ).tolist()


def test_the_profile_of_cifar_100_lt():
    sizes = profile(500, 100, 100)
    # 500 * 0.01^(r / 99), the numbers that every repository with this profile prints
    assert sizes[:5] == [500, 477, 455, 434, 415]
    assert sizes[-1] == 5
    assert sum(sizes) == 10847


@hypothesis_settings(max_examples=60, deadline=None)
@given(largest=st.integers(1, 5000), classes=st.integers(1, 200), imbalance=st.floats(1, 500))
def test_a_profile_falls_from_the_largest_to_its_share(largest, classes, imbalance):
    sizes = profile(largest, classes, imbalance)
    assert sizes[0] == largest
    assert sizes == sorted(sizes, reverse=True)
    if classes > 1:
        assert abs(sizes[-1] - largest / imbalance) <= 1


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    imbalance=st.sampled_from([1.0, 3.0, 20.0]),
    tail=st.sampled_from(["shuffled", "ordered"]),
)
def test_only_training_rows_go(seed, imbalance, tail):
    data = labels_of()
    plain = ClassIncremental().build(data, settings.Scenario(), 0.2, seed)
    stream = built(data, seed, 0.2, imbalance=imbalance, tail=tail)
    found = counts_of(stream)
    wanted = profile(48, 10, imbalance)
    assert sorted(found, reverse=True) == wanted
    if tail == "ordered":
        assert found == wanted
    for mine, theirs in zip(stream.stages, plain.stages, strict=True):
        assert set(mine.train_ids.tolist()) <= set(theirs.train_ids.tolist())
        assert mine.classes == theirs.classes
        assert (mine.validation_ids == theirs.validation_ids).all()
        assert (mine.test_ids == theirs.test_ids).all()


def test_a_shuffled_tail_follows_the_seed():
    found = [counts_of(built(labels_of(), seed, imbalance=20.0)) for seed in range(4)]
    assert len({tuple(counts) for counts in found}) == 4


def test_unequal_classes_are_cut_to_the_smallest():
    data = DatasetLabels(np.repeat(np.arange(3), [50, 20, 30]), np.arange(3), 3)
    assert sorted(counts_of(built(data, tasks=3, imbalance=4.0))) == [5, 10, 20]


def test_it_composes_with_other_streams():
    stream = built(
        labels_of(), 1, tasks=2, imbalance=6.0, of=["few_shot"], base=8, increment=2, shots=6, tail="ordered"
    )
    # the smallest class has six images: ten ranks from 6 down to 1
    assert counts_of(stream) == profile(6, 10, 6.0)
    blurred = built(labels_of(), 1, tasks=2, imbalance=6.0, of=["i_blurry"], blurred=0.3)
    assert sorted(counts_of(blurred), reverse=True) == profile(60, 10, 6.0)


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({"imbalance": 61.0}, "scenario.imbalance", "at most 60"),
        ({"imbalance": 0.5}, "scenario.imbalance", "at least 1"),
        ({"of": ["long_tailed"]}, "scenario.of", "other scenarios than long_tailed"),
        ({"of": ["i_blury"]}, "scenario.of", "Did you mean 'i_blurry'"),
        ({"of": ["class_incremental", "i_blurry"]}, "scenario.of", "not read with scenario.name=class_incremental"),
        ({"tasks": 11}, "scenario.tasks", "1 to 10"),
        ({"noise_rate": 0.1}, "scenario.noise_rate", "not read"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, key, text):
    with pytest.raises(UsageError) as caught:
        built(labels_of(), **options)
    assert caught.value.key == key
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
