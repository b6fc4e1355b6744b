"""The tensor store and the choices of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl.data.splits import at_most, stratified, validation_split
from fedcl.data.store import Statistics, TensorStore
from fedcl.errors import UsageError


def images(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, 5, 4), dtype=np.uint8)


def store(count: int = 12, **options: object) -> TensorStore:
    return TensorStore(images(count), np.arange(count, dtype=np.int64) % 3, **options)  # type: ignore[arg-type]


def test_statistics_are_those_of_float64_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(50)
    monkeypatch.setattr("fedcl.data.store._CHUNK_BYTES", 7 * x[0].size)
    found = Statistics.of(x)
    scaled = x.astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, scaled.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.std, scaled.std((0, 2, 3)), rtol=1e-13)


def test_constant_channel_is_an_error_instead_of_a_division_by_zero() -> None:
    x = images(4)
    x[:, 1] = 7
    with pytest.raises(ValueError, match="channel 1 has the same value"):
        Statistics.of(x)


def test_a_normalised_store_has_mean_zero_and_deviation_one() -> None:
    s = store(40)
    out = s.batch(torch.arange(40), torch.float64)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


def test_batch_is_gather_pixels_standardise() -> None:
    s, ids = store(), torch.tensor([7, 0, 7])
    raw = s.gather(ids)
    assert raw.dtype == torch.uint8
    assert np.array_equal(raw.numpy(), images(12)[[7, 0, 7]])
    expected = s.standardise(s.pixels(raw))
    assert torch.equal(s.batch(ids), expected)
    assert s.batch(ids, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(s.batch(ids, torch.bfloat16), expected.bfloat16())


def test_ids_of_a_cohort_keep_their_shape() -> None:
    s, ids = store(), torch.tensor([[1, 2, 3], [9, 2, 0]])
    assert torch.equal(s.batch(ids)[1], s.batch(ids[1]))


def test_sizes() -> None:
    s = store()
    assert (len(s), s.shape, s.image_bytes) == (12, (3, 5, 4), 60)
    assert np.array_equal(s.labels, s.label_tensor.numpy())


def test_test_store_is_normalised_by_the_training_images() -> None:
    train = store()
    test = TensorStore(images(5, seed=1), np.zeros(5, np.int64), train.statistics)
    assert torch.equal(test.mean, train.mean)
    own = TensorStore(images(5, seed=1), np.zeros(5, np.int64))
    assert not torch.equal(own.mean, train.mean)


def test_the_store_owns_its_memory() -> None:
    x = images(6)
    s = TensorStore(x, np.zeros(6, np.int64))
    before = s.gather(torch.tensor([0]))
    x[:] = 0
    assert torch.equal(s.gather(torch.tensor([0])), before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_map_gives_the_same_batches(tmp_path: Path, channels_last: bool) -> None:
    x = images(12)
    stored = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if channels_last else x
    np.save(tmp_path / "x.npy", stored)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    view = mapped.transpose(0, 3, 1, 2) if channels_last else mapped
    s = TensorStore(view, store().labels, resident=False)
    ids = torch.tensor([[3, 11], [0, 3]])
    assert torch.equal(s.batch(ids), store().batch(ids))
    assert s._images is None
    assert torch.equal(s.to("cpu").batch(ids), store().to("cpu").batch(ids))


def test_relabelled_shares_the_images_and_leaves_the_original() -> None:
    s = store()
    other = s.relabelled(s.labels + 4)
    assert other._images is s._images
    assert other.label_tensor.tolist() == (s.labels + 4).tolist()
    assert s.label_tensor[1] == 1
    with pytest.raises(ValueError, match="labels are"):
        s.relabelled(s.labels[:3])


def test_ids_outside_are_errors() -> None:
    for resident in (True, False):
        with pytest.raises(IndexError):
            store(resident=resident).gather(torch.tensor([12]))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (images(3).astype(np.float32), np.zeros(3, np.int64), "uint8"),
        (images(3)[:, 0], np.zeros(3, np.int64), r"\(N, C, H, W\)"),
        (images(3), np.zeros(4, np.int64), "labels are"),
        (images(3), np.zeros(3, np.int32), "int64"),
        (images(0), np.zeros(0, np.int64), "no images"),
    ],
)
def test_wrong_arrays_are_refused(x: np.ndarray, y: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorStore(x, y)


LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda v: np.array(v, np.int64))


@settings(max_examples=60, deadline=None)
@given(LABELS, st.floats(0, 0.99), st.integers(0, 3))
def test_validation_split_is_a_stratified_partition(labels: np.ndarray, fraction: float, seed: int) -> None:
    train, held = validation_split(labels, fraction, seed)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label in np.unique(labels):
        n, kept = int((labels == label).sum()), int((labels[train] == label).sum())
        assert kept >= 1
        assert kept == 1 or abs((n - kept) - fraction * n) <= 0.5
    assert np.array_equal(held, validation_split(labels, fraction, seed)[1])


def test_validation_depends_on_the_seed_and_on_no_other_class() -> None:
    labels = np.repeat(np.arange(4), 50)
    held = validation_split(labels, 0.2, 0)[1]
    assert len(held) == 40
    assert not np.array_equal(held, validation_split(labels, 0.2, 1)[1])
    assert np.array_equal(held[:20], validation_split(labels[:100], 0.2, 0)[1])
    assert len(validation_split(labels, 0.0, 0)[1]) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan"), 3])
def test_wrong_fractions(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"data\.validation="):
        validation_split(np.zeros(4, np.int64), fraction, 0)


def test_at_most_is_nested_and_exact() -> None:
    labels = np.repeat(np.arange(3), [4, 30, 1])
    few, many = at_most(labels, 5, "t"), at_most(labels, 9, "t")
    assert np.bincount(labels[few]).tolist() == [4, 5, 1]
    assert set(few.tolist()) <= set(many.tolist())
    assert few.tolist() != list(range(10))


def test_each_group_draws_from_its_own_stream() -> None:
    held = stratified(np.repeat(np.arange(2), 50), 0.5, "a")[1]
    assert held[:25].tolist() != (held[25:] - 50).tolist()


def test_stratified_streams_differ_by_name() -> None:
    labels = np.zeros(100, np.int64)
    assert not np.array_equal(stratified(labels, 0.5, "a")[1], stratified(labels, 0.5, "b")[1])
