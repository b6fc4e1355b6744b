"""Class-incremental streams: sizes, orders, rows."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedcl import config as settings
from fedcl.bridges.avalanche_import import quiet_avalanche
from fedcl.errors import UsageError
from fedcl.scenarios.class_incremental import ClassIncremental, class_order, task_sizes
from fedcl.stream import DatasetLabels


def labels_of(classes, train_each=20, test_each=5):
    rng = np.random.default_rng(classes)
    train = rng.permutation(np.repeat(np.arange(classes), train_each)).astype(np.int64)
    test = rng.permutation(np.repeat(np.arange(classes), test_each)).astype(np.int64)
    return DatasetLabels(train, test, classes, tuple(f"class {c}" for c in range(classes)))


@pytest.mark.parametrize(
    ("classes", "options", "expected"),
    [
        (10, {"tasks": 5}, [2] * 5),
        (10, {"tasks": 3}, [4, 3, 3]),
        (10, {"tasks": 1}, [10]),
        (10, {"tasks": 10}, [1] * 10),
        (100, {"base": 50, "increment": 10}, [50] + [10] * 5),
        (100, {"base": 40, "increment": 20}, [40, 20, 20, 20]),
        (100, {"increment": 30}, [30, 30, 30, 10]),
        (100, {"base": 0, "increment": 10}, [10] * 10),
        (10, {"base": 7, "increment": 2}, [7, 2, 1]),
        (10, {"base": 5, "tasks": 3}, [5, 3, 2]),
    ],
)
def test_classes_of_each_task(classes, options, expected):
    assert task_sizes(classes, settings.Scenario(**options)) == expected


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tasks": 11}, "scenario.tasks"),
        ({"tasks": 0}, "scenario.tasks"),
        ({"tasks": -1}, "scenario.tasks"),
        ({"base": 10, "increment": 1}, "scenario.base"),
        ({"base": -1}, "scenario.base"),
        ({"base": 5, "increment": 6}, "scenario.increment"),
        ({"base": 5, "increment": 0}, "scenario.increment"),
        ({"base": 5, "tasks": 1}, "scenario.tasks"),
        ({"base": 5, "tasks": 7}, "scenario.tasks"),
        ({"order": "randm"}, "scenario.order"),
        ({"order": "given"}, "scenario.classes"),
        ({"order": "given", "classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]}, "scenario.classes"),
        ({"order": "given", "classes": list(range(1, 11))}, "scenario.classes"),
        ({"order": "natural", "classes": [0]}, "scenario.classes"),
    ],
)
def test_wrong_settings_are_one_line(options, key):
    with pytest.raises(UsageError) as caught:
        ClassIncremental().build(labels_of(10), settings.Scenario(**options), 0.0, 0)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_nearest_order_is_suggested():
    with pytest.raises(UsageError, match="Did you mean 'random'"):
        class_order(3, settings.Scenario(order="randm"), 0)


@pytest.mark.parametrize(("store", "index"), [("training", 0), ("test", 1)])
def test_a_class_without_images_is_named(store, index):
    full = labels_of(4)
    cut = [full.train_labels, full.test_labels]
    cut[index] = cut[index][cut[index] != 2]
    with pytest.raises(UsageError, match=f"class 2.*{store} image"):
        ClassIncremental().build(DatasetLabels(cut[0], cut[1], 4, full.names), settings.Scenario(tasks=2), 0, 0)


def test_seed_1993_is_the_order_of_the_published_tables():
    order = class_order(100, settings.Scenario(order="seed1993"), seed=5)
    # the first classes of CIFAR-100 as every class-incremental repository with this seed logs them
    assert order[:10] == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)
    assert sorted(order) == list(range(100))


def test_random_order_follows_the_seed():
    orders = [class_order(10, settings.Scenario(), seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    # stored: the same on every machine and with every NumPy
    assert orders[0] == (3, 9, 0, 8, 5, 7, 6, 2, 4, 1)


@pytest.mark.parametrize("order", ["random", "natural", "seed1993", "given"])
def test_every_row_has_one_place_and_its_class_order_position(order):
    data = labels_of(10)
    config = settings.Scenario(tasks=4, order=order, classes=[9, 1, 8, 2, 7, 3, 6, 4, 5, 0] if order == "given" else [])
    stream = ClassIncremental().build(data, config, 0.25, 3)
    train = np.concatenate([np.concatenate([s.train_ids, s.validation_ids]) for s in stream.stages])
    test = np.concatenate([s.test_ids for s in stream.stages])
    assert np.sort(train).tolist() == list(range(200))
    assert np.sort(test).tolist() == list(range(50))
    assert [len(s.classes) for s in stream.stages] == [3, 3, 2, 2]
    assert (np.array(stream.class_order)[stream.train_labels] == data.train_labels).all()
    assert (np.array(stream.class_order)[stream.test_labels] == data.test_labels).all()
    for stage in stream.stages:
        for ids, labels in (
            (stage.train_ids, stream.train_labels),
            (stage.validation_ids, stream.train_labels),
            (stage.test_ids, stream.test_labels),
        ):
            assert set(labels[ids].tolist()) == set(stage.classes)
            assert (np.diff(ids) > 0).all()
        # a quarter of each class's 20 images
        assert len(stage.validation_ids) == 5 * len(stage.classes)
    assert stream.known(1) == tuple(range(6))
    assert stream.known(3) == tuple(range(10))


def test_validation_zero_holds_out_nothing_and_streams_repeat():
    data = labels_of(6)
    first, second = (ClassIncremental().build(data, settings.Scenario(tasks=3), 0.0, seed=8) for _ in range(2))
    assert all(len(stage.validation_ids) == 0 for stage in first.stages)
    assert first.class_order == second.class_order
    assert all((a.train_ids == b.train_ids).all() for a, b in zip(first.stages, second.stages, strict=True))


def test_fifty_thousand_images_take_less_than_a_second_and_a_half():
    quiet_avalanche()
    data = labels_of(100, 500, 100)
    start = time.perf_counter()
    stream = ClassIncremental().build(data, settings.Scenario(tasks=10), 0.1, 0)
    assert time.perf_counter() - start < 1.5
    assert stream.num_tasks == 10
