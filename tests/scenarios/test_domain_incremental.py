"""Domain-incremental streams: given domains, several data sets, permuted and rotated pixels."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.build import build
from fedcl.data.sources import load_dataset
from fedcl.data.store import TensorStore
from fedcl.errors import UsageError
from fedcl.scenarios._shifts import ShiftedStore, permutation_map, rotation_map
from fedcl.scenarios.domain_incremental import DomainIncremental
from fedcl.stream import DatasetLabels


def shown(data, seed=0, validation=0.0, **options):
    """Dataset and stream of the settings of the data section and of the scenario."""
    config = settings.Scenario(name="domain_incremental", **options)
    scenario = DomainIncremental()
    dataset = scenario.images(load_dataset(data), data, config, seed)
    return dataset, scenario.build(DatasetLabels.of(dataset), config, validation, seed)


def pixels(store, ids):
    return store.gather(torch.as_tensor(ids)).numpy()


def images_of(count=6, channels=3, height=5, width=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def arrays(folder, name, shade, classes=3, domains=0, size=4):
    """An .npz of ``classes`` classes: every pixel ``shade`` plus the row's number."""
    labels = np.arange(classes * 8) % classes
    images = (
        np.full((len(labels), size, size), shade, dtype=np.uint8)
        + np.arange(len(labels), dtype=np.uint8)[:, None, None]
    )
    more = {}
    if domains:
        column = np.arange(len(labels)) // classes % domains
        more = {
            "domain_names": np.array([f"d{i}" for i in range(domains)]),
            "train_domain": column,
            "test_domain": column,
        }
    np.savez(folder / f"{name}.npz", train_x=images, train_y=labels, test_x=images, test_y=labels, **more)
    return settings.Data(name=name, root=str(folder))


def test_a_quarter_turn_is_exact():
    images = torch.from_numpy(images_of(height=5, width=5))
    for quarter in range(4):
        turned = rotation_map(5, 5, 90.0 * quarter)(images)
        assert torch.equal(turned, torch.rot90(images, quarter, (2, 3)))


@hypothesis_settings(max_examples=40, deadline=None)
@given(degrees=st.floats(-400, 400), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_turn_is_bilinear(degrees, height, width, seed):
    images = images_of(2, 1, height, width, seed)
    found = rotation_map(height, width, degrees)(torch.from_numpy(images)).numpy()[:, 0]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    padded = np.pad(images[:, 0].astype(float), ((0, 0), (20, 20), (20, 20)))
    for y in range(height):
        for x in range(width):
            right, down = x - (width - 1) / 2, y - (height - 1) / 2
            from_x = (width - 1) / 2 + cos * right - sin * down
            from_y = (height - 1) / 2 + sin * right + cos * down
            x0, y0 = int(np.floor(from_x)), int(np.floor(from_y))
            fx, fy = from_x - x0, from_y - y0
            window = padded[:, y0 + 20 : y0 + 22, x0 + 20 : x0 + 22]
            wanted = (window * np.outer([1 - fy, fy], [1 - fx, fx])).sum(axis=(1, 2))
            # coordinates have eight bits below the pixel: at most 255 / 512 for each of two axes, and the rounding
            assert np.abs(found[:, y, x] - wanted).max() <= 1.5


def test_a_permutation_moves_whole_pixels():
    images = images_of()
    order = permutation_map(5, 4, 3, "order")
    found = order(torch.from_numpy(images)).numpy()
    assert np.array_equal(found.reshape(6, 3, 20), images.reshape(6, 3, 20)[:, :, order.source[0].numpy()])
    assert sorted(order.source[0].tolist()) == list(range(20))


def test_bytes_are_the_same_on_every_machine():
    images = torch.from_numpy((np.arange(8 * 3 * 81) * 37 % 251).astype(np.uint8).reshape(8, 3, 9, 9))
    found = [rotation_map(9, 9, 36.0)(images), permutation_map(9, 9, 0, "stored")(images)]
    assert [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in found] == STORED


STORED = ["78f5de99d41e9ad2", "66baca874e5defca"]


@pytest.mark.parametrize("resident", [True, False])
def test_a_shifted_store_keeps_the_plain_images_only(resident):
    images = images_of()
    plain = TensorStore(images, np.arange(6) % 2, resident=resident)
    turn, order = rotation_map(5, 4, 50.0), permutation_map(5, 4, 1)
    store = ShiftedStore(plain, [None, turn, order])
    assert len(store) == 18
    assert store.labels.tolist() == [0, 1] * 9
    assert store._host is plain._host
    wanted = torch.cat([torch.from_numpy(images), turn(torch.from_numpy(images)), order(torch.from_numpy(images))])
    ids = torch.tensor([[17, 0, 7], [7, 12, 5]])
    for made in (store, store.to("cpu"), store.relabelled(np.zeros(18, dtype=np.int64))):
        assert torch.equal(made.gather(ids), wanted[ids])
    assert store.gather(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 5, 4)
    for wrong in (18, -1):
        with pytest.raises(IndexError):
            store.gather(torch.tensor([wrong]))


@pytest.mark.parametrize("shift", ["permuted", "rotated"])
def test_every_task_has_all_images_changed(shift):
    data = settings.Data(limit=8)
    plain = load_dataset(data)
    dataset, stream = shown(data, 3, 0.25, shift=shift, tasks=3)
    assert dataset.train.statistics == plain.train.statistics
    assert [stage.classes for stage in stream.stages] == [tuple(range(10)), (), ()]
    first = stream.stages[0]
    assert (pixels(dataset.train, first.train_ids) == pixels(plain.train, first.train_ids)).all()
    for stage in stream.stages[1:]:
        # the same images held out in every task: none is trained in another guise
        assert (stage.train_ids == first.train_ids + stage.index * len(plain.train)).all()
        assert (stage.validation_ids == first.validation_ids + stage.index * len(plain.train)).all()
        assert (stage.test_ids == first.test_ids + stage.index * len(plain.test)).all()
        for store, original, ids in (
            (dataset.train, plain.train, stage.train_ids),
            (dataset.test, plain.test, stage.test_ids),
        ):
            mine, theirs = pixels(store, ids), pixels(original, ids % len(original))
            assert (mine != theirs).mean() > 0.3
            if shift == "permuted":
                assert (np.sort(mine.reshape(len(ids), -1)) == np.sort(theirs.reshape(len(ids), -1))).all()
            assert (dataset.train.labels[stage.train_ids] == plain.train.labels[first.train_ids]).all()


def test_given_angles():
    dataset, stream = shown(settings.Data(limit=4), shift="rotated", angles=[0.0, 90.0, 180.0])
    assert stream.num_tasks == 3
    upright, turned = (pixels(dataset.train, stream.stages[task].train_ids) for task in (0, 1))
    assert (turned == np.rot90(upright, 1, (2, 3))).all()


def test_given_domains_come_in_the_given_order(tmp_path):
    data = arrays(tmp_path, "zoo", 0, domains=4)
    data.domains = ["d2", "d0"]
    dataset, stream = shown(data, 1, 0.3, shift="given")
    assert dataset.domain_names == ("d2", "d0")
    assert [stage.classes for stage in stream.stages] == [(0, 1, 2), ()]
    assert dataset.train_domains is not None
    for stage in stream.stages:
        assert set(dataset.train_domains[stage.train_ids].tolist()) == {stage.index}
        assert set(dataset.train_domains[stage.validation_ids].tolist()) == {stage.index}
        assert set(dataset.test_domains[stage.test_ids].tolist()) == {stage.index}
        assert len(stage.test_ids) == 6
    assert sorted(np.concatenate([s.test_ids for s in stream.stages]).tolist()) == list(range(12))


def test_several_data_sets_are_domains(tmp_path):
    data = arrays(tmp_path, "one", 0)
    arrays(tmp_path, "two", 100)
    dataset, stream = shown(data, datasets=["two"])
    assert dataset.domain_names == ("one", "two")
    assert [(len(s.train_ids), len(s.test_ids)) for s in stream.stages] == [(24, 24), (24, 24)]
    shades = [pixels(dataset.train, stage.train_ids)[:, 0, 0, 0] for stage in stream.stages]
    assert [part.tolist() for part in shades] == [list(range(24)), list(range(100, 124))]
    assert dataset.train.labels[stream.stages[1].train_ids].tolist() == [row % 3 for row in range(24)]


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({}, "scenario.shift", "no domains"),
        ({"shift": "turned"}, "scenario.shift", "permuted"),
        ({"shift": "permuted", "angles": [1.0]}, "scenario.angles", "not read"),
        ({"shift": "rotated", "datasets": ["two"]}, "scenario.datasets", "not read"),
        ({"shift": "rotated", "increment": 2}, "scenario.increment", "not read"),
        ({"datasets": ["other"]}, "scenario.datasets", "same classes"),
        ({"datasets": ["large"]}, "scenario.datasets", "one shape"),
        ({"datasets": ["zoo"]}, "scenario.datasets", "without domains"),
        ({"datasets": ["one"]}, "scenario.datasets", "once"),
        ({"datasets": ["nowhere"]}, "data.name", "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, key, text, tmp_path):
    data = arrays(tmp_path, "one", 0)
    arrays(tmp_path, "other", 0, classes=4)
    arrays(tmp_path, "large", 0, size=5)
    arrays(tmp_path, "zoo", 0, domains=2)
    with pytest.raises(UsageError) as caught:
        shown(data, **options)
    assert caught.value.key == key
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_forward_transfer_is_defined_where_no_task_brings_a_class(tiny):
    permuted = {"scenario.name": "domain_incremental", "scenario.shift": "permuted", "scenario.tasks": 3}
    summary = tiny({**permuted, "strategy": ["replay"]}).summary
    assert summary["forward_transfer"] is not None
    assert not {"average_accuracy", "forgetting", "forward_transfer"} & set(summary["undefined"])


ROOT = os.environ.get("FEDCL_DATA_ROOT")


@pytest.mark.data
@pytest.mark.skipif(not ROOT, reason="FEDCL_DATA_ROOT is not set")
@pytest.mark.parametrize(
    ("options", "needs", "tasks"),
    [
        ({"data.name": "pacs", "data.size": 16, "data.limit": 60}, "pacs64", 4),
        ({"data.name": "mnist", "scenario.datasets": ["usps"], "data.size": 16, "data.limit": 6}, "usps.npz", 2),
    ],
)
def test_real_domains(options, needs, tasks, tiny_config):
    assert ROOT is not None
    if not (Path(ROOT) / needs).exists():
        pytest.skip(f"no {needs}")
    stream = build(tiny_config({"scenario.name": "domain_incremental", **options})).stream
    assert stream.num_tasks == tasks
    assert all(len(stage.train_ids) and len(stage.test_ids) for stage in stream.stages)


def test_domains_with_classes_of_their_own_are_a_class_incremental_stream(tmp_path):
    """Two sets of 3 and 2 classes, the second in colour: five classes, in the order of the sets."""
    data = arrays(tmp_path, "grey", 10)
    arrays(tmp_path, "other", 100, classes=2)
    found = np.load(tmp_path / "other.npz")
    colour = {key: np.stack([value] * 3, axis=-1) if key.endswith("_x") else value for key, value in found.items()}
    np.savez(tmp_path / "other.npz", **colour)
    dataset, stream = shown(data, datasets=["other"], own_classes=True)
    assert dataset.class_names == ("grey: 0", "grey: 1", "grey: 2", "other: 0", "other: 1")
    assert [stage.classes for stage in stream.stages] == [(0, 1, 2), (3, 4)]
    assert dataset.train.shape == (3, 4, 4)
    first = pixels(dataset.train, stream.stages[0].train_ids)
    assert (first == first[:, :1]).all()
    assert pixels(dataset.train, stream.stages[1].train_ids).min() == 100
    original = np.array(stream.class_order)[stream.train_labels]
    assert sorted(set(original[stream.stages[1].train_ids])) == [3, 4]


def test_permutations_with_classes_of_their_own_show_the_same_images(tmp_path):
    data = arrays(tmp_path, "grey", 10)
    shared, together = shown(data, shift="permuted", tasks=3)
    own, apart = shown(data, shift="permuted", tasks=3, own_classes=True)
    assert apart.num_classes == 9
    assert [len(stage.classes) for stage in apart.stages] == [3, 3, 3]
    for one, other in zip(together.stages, apart.stages, strict=True):
        assert np.array_equal(one.train_ids, other.train_ids)
        assert np.array_equal(pixels(shared.train, one.train_ids), pixels(own.train, other.train_ids))
    names = {own.class_names[apart.class_order[c]] for c in apart.stages[2].classes}
    assert names == {f"permutation 2: {c}" for c in range(3)}
    assert shown(data, own_classes=False, shift="permuted", tasks=3)[1].num_classes == 3


def test_sets_of_other_classes_need_classes_of_their_own(tmp_path):
    data = arrays(tmp_path, "grey", 10)
    arrays(tmp_path, "other", 100, classes=2)
    with pytest.raises(UsageError, match="own_classes=true"):
        shown(data, datasets=["other"])
