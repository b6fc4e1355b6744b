"""Random images: counts, size, repetition, and that they are as random as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcl.config import Data
from fedcl.data.noise import pixels
from fedcl.data.sources import load_dataset
from fedcl.errors import UsageError


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [("random_grey", None, (1, 28, 28)), ("random_colour", None, (3, 32, 32)), ("random_colour", 9, (3, 9, 9))],
)
def test_as_many_as_asked_for(name: str, size: int | None, shape: tuple[int, ...]) -> None:
    data = load_dataset(Data(name=name, limit=8, size=size))
    assert data.train.shape == data.test.shape == shape
    assert np.bincount(data.train.labels).tolist() == [8] * 10
    assert np.bincount(data.test.labels).tolist() == [2] * 10
    assert data.train.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    images = data.train.batch(torch.arange(80))
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-2
    again = load_dataset(Data(name=name, limit=8, size=size))
    assert torch.equal(again.train.gather(torch.arange(80)), data.train.gather(torch.arange(80)))
    assert "nothing can be learned" in data.source


def test_without_a_limit_and_with_one_of_one() -> None:
    assert len(load_dataset(Data(name="random_grey", size=1)).train) == 5000
    small = load_dataset(Data(name="random_grey", limit=1))
    assert (len(small.train), len(small.test)) == (10, 10)


def test_training_and_test_images_differ() -> None:
    data = load_dataset(Data(name="random_grey", limit=4))
    first = torch.arange(10)
    assert not torch.equal(data.train.gather(first), data.test.gather(first))


def test_bytes_are_spread_evenly_and_repeat() -> None:
    drawn = pixels((256, 1001), "a")
    assert drawn.shape == (256, 1001)
    assert drawn.dtype == np.uint8
    counts = np.bincount(drawn.ravel(), minlength=256)
    assert abs(counts / 1001 - 1).max() < 0.2
    assert (drawn == pixels((256, 1001), "a")).all()
    assert not (drawn == pixels((256, 1001), "b")).all()


def test_they_are_not_left_on_disk() -> None:
    with pytest.raises(UsageError, match=r"data\.memory_map"):
        load_dataset(Data(name="random_grey", memory_map=True))
