"""load_dataset: digits, .npz files good and bad, options, missing data; the real sets where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcl.config import Data
from fedcl.data.sources import load_dataset
from fedcl.data.store import TensorStore
from fedcl.errors import UsageError

REAL = os.environ.get("FEDCL_DATA_ROOT")
needs_data = pytest.mark.skipif(not REAL, reason="FEDCL_DATA_ROOT is not set")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels_of(store: TensorStore) -> np.ndarray:
    return store.gather(torch.arange(len(store))).numpy()


def arrays(classes: int = 3, each: int = 8) -> dict[str, np.ndarray]:
    labels = np.tile(np.arange(classes), each)
    return {
        "train_x": noise(len(labels), 6, 6, 3),
        "train_y": labels,
        "test_x": noise(2 * classes, 6, 6, 3, seed=1),
        "test_y": np.tile(np.arange(classes), 2),
        "class_names": np.array([f"c{i}" for i in range(classes)]),
    }


def save(root: Path, content: dict[str, np.ndarray]) -> Data:
    np.savez(root / "own.npz", **content)  # type: ignore[arg-type]
    return Data(name="own", root=str(root))


def test_digits_need_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDCL_DATA_ROOT", raising=False)
    found = load_dataset(Data())
    assert (len(found.train), len(found.test), found.train.shape, found.num_classes) == (
        1438,
        359,
        (1, 8, 8),
        10,
    )
    pixels = found.train.gather(torch.arange(1438))
    assert (int(pixels.min()), int(pixels.max()), len(torch.bincount(pixels.flatten().int()).nonzero())) == (
        0,
        255,
        17,
    )
    shares = np.bincount(found.test.labels) / (np.bincount(found.train.labels) + np.bincount(found.test.labels))
    assert np.abs(shares - 0.2).max() < 0.004
    assert torch.equal(load_dataset(Data()).test.gather(torch.arange(359)), found.test.gather(torch.arange(359)))


def test_digits_keep_every_image_once() -> None:
    from sklearn.datasets import load_digits

    found = load_dataset(Data())
    both = np.concatenate([s.gather(torch.arange(len(s))).numpy()[:, 0] for s in (found.train, found.test)])
    labels = np.concatenate([found.train.labels, found.test.labels])
    published = load_digits()
    expected = np.round(published.images * 255 / 16).astype(np.uint8)

    def rows(x: np.ndarray, y: np.ndarray) -> list[bytes]:
        return sorted(image.tobytes() + bytes([label]) for image, label in zip(x, y, strict=True))

    assert rows(both, labels) == rows(expected, published.target)


def test_npz(tmp_path: Path) -> None:
    content = arrays()
    config = save(tmp_path, content)
    found = load_dataset(config)
    assert np.array_equal(pixels_of(found.train), content["train_x"].transpose(0, 3, 1, 2))
    assert found.test.labels.tolist() == content["test_y"].tolist()
    assert found.class_names == ("c0", "c1", "c2")
    by_path = load_dataset(Data(name=str(tmp_path / "own.npz")))
    assert torch.equal(by_path.train.gather(torch.arange(24)), found.train.gather(torch.arange(24)))


def test_gaps_in_the_labels_close_and_names_stay(tmp_path: Path) -> None:
    content = arrays()
    for key in ("train_y", "test_y"):
        content[key] = np.array([1, 4, 7])[content[key]]
    content["class_names"] = np.array([f"name {i}" for i in range(9)])
    found = load_dataset(save(tmp_path, content))
    assert found.class_names == ("name 1", "name 4", "name 7")
    assert found.train.labels[:4].tolist() == [0, 1, 2, 0]
    content["class_names"] = np.array(["a", "b", "c"])
    assert load_dataset(save(tmp_path, content)).class_names == ("a", "b", "c")
    del content["class_names"]
    assert load_dataset(save(tmp_path, content)).class_names == ("1", "4", "7")


def test_npz_without_split_and_with_domains(tmp_path: Path) -> None:
    x, y = noise(60, 5, 5), np.repeat(np.arange(2), 30)
    domain = np.tile(np.arange(2), 30)
    content = {
        "x": x,
        "y": y,
        "domain": domain,
        "domain_names": np.array(["a", "b"]),
        "writer": np.arange(60),
    }
    found = load_dataset(save(tmp_path, content))
    train, test = found.columns["writer"]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(60))
    assert found.test_domains is not None
    assert np.bincount(found.test.labels * 2 + found.test_domains).tolist() == [3, 3, 3, 3]
    assert np.array_equal(pixels_of(found.test)[:, 0], x[test])


def test_memory_map(tmp_path: Path) -> None:
    config = save(tmp_path, arrays())
    held = load_dataset(config)
    config.memory_map = True
    mapped = load_dataset(config)
    assert not mapped.train.resident
    base: object = mapped.train._host
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    ids = torch.tensor([5, 0, 23])
    assert torch.equal(mapped.train.batch(ids), held.train.batch(ids))
    assert mapped.train.statistics == held.train.statistics
    np.savez_compressed(tmp_path / "own.npz", **arrays())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="compressed"):
        load_dataset(config)
    with pytest.raises(UsageError, match=r"data\.memory_map"):
        load_dataset(Data(name="digits", memory_map=True))


def change(**new: np.ndarray | None) -> dict[str, np.ndarray]:
    return {key: value for key, value in (arrays() | new).items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(test_x=None), "lacks test_x"),
        ({"images": noise(3)}, "lacks x, y"),
        (change(train_x=noise(24, 6, 6, 3) / 255), r"float64 in \[0, 1\]: multiply by 255"),
        (change(train_x=np.full((24, 6, 6), np.nan)), "with NaN"),
        (change(train_x=noise(24, 6, 6).astype(np.int32)), "not int32"),
        (change(train_x=noise(24, 36)), r"must be \(N, H, W\)"),
        (change(train_x=noise(24, 3, 6, 6)), r"must be \(N, H, W\)"),
        (change(train_x=noise(0, 6, 6), train_y=np.zeros(0, int)), "no images"),
        (change(train_x=noise(23, 6, 6, 3)), "23 images but 24 labels"),
        (change(train_y=np.zeros(24)), r"labels must be \(N,\) integers"),
        (change(train_y=np.arange(24) - 1), "labels must be between 0"),
        (change(test_y=np.full(6, 9)), "every class needs training images; these have none: 9"),
        (change(test_y=np.zeros(6, int)), "every class needs test images; these have none: c1, c2"),
        (change(class_names=np.array(["a", "b"])), "2 class names for 3 classes"),
        (change(class_names=np.array(["a", "b", "b"])), "must differ"),
        (change(class_names=np.arange(3)), "class_names must be one row of strings"),
        (change(class_names=np.array(["a", "b", "c"], object)), "cannot be read"),
        (change(test_x=noise(6, 5, 5, 3)), r"training images are \(3, 6, 6\), test images \(3, 5, 5\)"),
        (change(train_x=np.zeros((24, 6, 6, 3), np.uint8)), "same value in every pixel"),
        (change(train_drawer=np.zeros(24, int)), "differ in their columns"),
        (change(train_drawer=np.zeros(5, int), test_drawer=np.zeros(6, int)), "not one number a sample"),
        (change(train_domain=np.zeros(24, int), test_domain=np.zeros(6, int)), "only together"),
    ],
)
def test_bad_npz(tmp_path: Path, content: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset(save(tmp_path, content))
    assert caught.value.key == "data.name"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 100, 2000, -30])
def test_torn_npz(tmp_path: Path, kept: int) -> None:
    config = save(tmp_path, arrays())
    path = tmp_path / "own.npz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"data\.name=.*cannot be read as an \.npz"):
        load_dataset(config)


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    config = save(tmp_path, arrays())
    path = tmp_path / "own.npz"
    content = bytearray(path.read_bytes())
    content[600] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match="cannot be read"):
        load_dataset(config)


def test_limit_and_size(tmp_path: Path) -> None:
    config = save(tmp_path, arrays())
    config.limit, config.size = 4, 3
    found = load_dataset(config)
    assert found.train.shape == (3, 3, 3)
    assert np.bincount(found.train.labels).tolist() == [4, 4, 4]
    assert np.bincount(found.test.labels).tolist() == [1, 1, 1]
    config.size = None
    rows = load_dataset(config).train.gather(torch.arange(12)).numpy()
    whole = arrays()["train_x"].transpose(0, 3, 1, 2)
    assert all(any(np.array_equal(row, image) for image in whole) for row in rows)


def test_resizing_antialiases() -> None:
    found = load_dataset(Data(size=2))
    whole = load_dataset(Data())
    assert found.train.shape == (1, 2, 2)
    means = [s.gather(torch.arange(100)).float().mean((1, 2, 3)) for s in (whole.train, found.train)]
    assert float((means[0] - means[1]).abs().max()) < 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Data(name="digitz"), r"data\.name='digitz'.*Did you mean 'digits'"),
        (Data(name="digits", size=0), r"data\.size=0"),
        (Data(name="digits", size=5000), r"data\.size=5000"),
        (Data(name="digits", limit=0), r"data\.limit=0"),
        (Data(name="digits", domains=["a"]), r"data\.domains=.*has no domains"),
        (Data(name="svhn"), r"looked for .*svhn\.npz, .*train_32x32\.mat.*; set data\.download=true"),
        (Data(name="missing.npz"), r"there is no .*missing\.npz"),
    ],
)
def test_wrong_options(config: Data, message: str, tmp_path: Path) -> None:
    config.root = str(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset(config)
    assert "\n" not in str(caught.value)


def test_wrong_root() -> None:
    with pytest.raises(UsageError, match=r"data\.root='nowhere': there is no such folder"):
        load_dataset(Data(name="mnist", root="nowhere"))


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from torchvision.datasets import mnist

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setattr(mnist, "download_and_extract_archive", offline)
    with pytest.raises(UsageError, match=r"data\.name='mnist': cannot be downloaded to .*check the network") as caught:
        load_dataset(Data(name="mnist", root=str(tmp_path), download=True))
    assert "\n" not in str(caught.value)


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "classes", "mean", "std"),
    [
        ("mnist", 60000, 10000, (1, 28, 28), 10, [0.1307], [0.3081]),
        ("fashion_mnist", 60000, 10000, (1, 28, 28), 10, [0.2860], [0.3530]),
        ("cifar100", 50000, 10000, (3, 32, 32), 100, [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
        ("usps", 7291, 2007, (1, 16, 16), 10, None, None),
        ("omniglot", 3630, 1210, (1, 105, 105), 242, None, None),
    ],
)
def test_real_sets(
    name: str,
    train: int,
    test: int,
    shape: tuple[int, ...],
    classes: int,
    mean: list[float] | None,
    std: list[float] | None,
) -> None:
    found = load_dataset(Data(name=name))
    assert (len(found.train), len(found.test), found.train.shape) == (train, test, shape)
    assert sorted(set(found.train.labels.tolist())) == list(range(classes))
    if mean is not None:
        assert found.train.statistics.mean == pytest.approx(mean, abs=6e-5)
        assert found.train.statistics.std == pytest.approx(std, abs=6e-5)


@needs_data
@pytest.mark.data
def test_real_pacs() -> None:
    found = load_dataset(Data(name="pacs", limit=20))
    assert found.domain_names == ("art_painting", "cartoon", "photo", "sketch")
    assert found.class_names == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    assert (len(found.train), len(found.test), found.train.shape) == (140, 35, (3, 64, 64))
    some = load_dataset(Data(name="pacs", limit=5, domains=["sketch", "photo"], size=16))
    assert some.domain_names == ("sketch", "photo")
    assert some.train.shape == (3, 16, 16)
    with pytest.raises(UsageError, match="Did you mean 'cartoon'"):
        load_dataset(Data(name="pacs", domains=["cartoons"]))
