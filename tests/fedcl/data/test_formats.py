"""Every file format, written small into a folder as its publisher lays it out, then read back by name."""

from __future__ import annotations

import bz2
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedcl.config import Data
from fedcl.data import catalog
from fedcl.data.sources import load_dataset
from fedcl.data.store import TensorStore
from fedcl.errors import UsageError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def all_of(store: TensorStore) -> np.ndarray:
    return store.gather(torch.arange(len(store))).numpy()


def load(root: Path, name: str, **options: object) -> object:
    return load_dataset(Data(name=name, root=str(root), **options))  # type: ignore[arg-type]


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "emnist", "emnist_letters", "emnist_digits"])
def test_idx(tmp_path: Path, name: str) -> None:
    entry = catalog.find(name)
    assert entry is not None
    classes = {"emnist": 47, "emnist_letters": 26}.get(name, 10)
    first = 1 if name == "emnist_letters" else 0
    train, test = noise(2 * classes, 28, 28), noise(classes, 28, 28, seed=1)
    labels = np.arange(classes, dtype=np.uint8) + first
    for file, array in zip(entry.files, (train, np.tile(labels, 2), test, labels), strict=True):
        write_idx(tmp_path / file, array)
    found = load_dataset(Data(name=name, root=str(tmp_path)))
    upright = (0, 2, 1) if name.startswith("emnist") else (0, 1, 2)
    assert np.array_equal(all_of(found.train)[:, 0], train.transpose(upright))
    assert np.array_equal(all_of(found.test)[:, 0], test.transpose(upright))
    assert found.test.labels.tolist() == list(range(classes))
    assert len(found.class_names) == classes
    assert found.class_names[0] == {"fashion_mnist": "T-shirt/top", "kmnist": "o", "emnist_letters": "a"}.get(name, "0")
    assert entry.source == found.source


def test_torn_idx(tmp_path: Path) -> None:
    entry = catalog.find("mnist")
    assert entry is not None
    labels = np.arange(10, dtype=np.uint8)
    for file, array in zip(entry.files, (noise(10, 28, 28), labels, noise(10, 28, 28), labels), strict=True):
        write_idx(tmp_path / file, array)
    whole = (tmp_path / entry.files[0]).read_bytes()
    (tmp_path / entry.files[0]).write_bytes(whole[:3000])
    with pytest.raises(UsageError, match=r"data\.name='mnist': cannot be read below") as caught:
        load(tmp_path, "mnist")
    assert "\n" not in str(caught.value)
    (tmp_path / entry.files[3]).unlink()
    with pytest.raises(UsageError, match=r"lacks MNIST/raw/t10k-labels-idx1-ubyte; set data\.download=true"):
        load(tmp_path, "mnist")


def write_pickle(path: Path, content: dict[str, object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    names = [f"class {i}" for i in range(10)]
    pixels = noise(60, 3, 32, 32)
    sums = []
    for part in range(6):
        file = "test_batch" if part == 5 else f"data_batch_{part + 1}"
        rows = pixels[part * 10 : part * 10 + 10].reshape(10, -1)
        sums.append([file, write_pickle(folder / file, {"data": rows, "labels": list(range(10))})])
    meta = write_pickle(folder / "batches.meta", {"label_names": names})
    with pytest.raises(UsageError, match="corrupted"):  # torchvision compares the published checksums
        load(tmp_path, "cifar10")
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    found = load_dataset(Data(name="cifar-10", root=str(tmp_path)))
    assert np.array_equal(all_of(found.train), pixels[:50])
    assert np.array_equal(all_of(found.test), pixels[50:])
    assert found.class_names == tuple(names)


def test_svhn_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    lists, pixels = {}, noise(20, 3, 32, 32)
    labels = np.arange(1, 11)  # the files call the digit 0 ten
    (tmp_path / "svhn").mkdir()
    for where, rows in (("train", pixels[:10]), ("test", pixels[10:])):
        path = tmp_path / "svhn" / f"{where}_32x32.mat"
        savemat(path, {"X": rows.transpose(2, 3, 1, 0), "y": labels[:, None]})
        lists[where] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", lists)
    found = load_dataset(Data(name="svhn", root=str(tmp_path)))
    assert np.array_equal(all_of(found.train), pixels[:10])
    assert found.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_usps_of_torchvision(tmp_path: Path) -> None:
    pixels = noise(10, 256)
    lines = [
        f"{k + 1} " + " ".join(f"{i + 1}:{v / 127.5 - 1:.6f}" for i, v in enumerate(row))
        for k, row in enumerate(pixels)
    ]
    for file in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / file).write_bytes(bz2.compress("\n".join(lines).encode()))
    found = load_dataset(Data(name="usps", root=str(tmp_path)))
    difference = all_of(found.test).reshape(10, 256).astype(int) - pixels.astype(int)
    assert np.abs(difference).max() <= 1
    assert found.train.labels.tolist() == list(range(10))
    (tmp_path / "usps.bz2").write_bytes(b"BZh9torn")
    with pytest.raises(UsageError, match="cannot be read below"):
        load(tmp_path, "usps")


def test_tiny_imagenet(tmp_path: Path) -> None:
    top = tmp_path / "tiny-imagenet-200"
    ids = ["n01", "n02", "n03"]
    pixels = noise(9, 64, 64, 3)
    for k, wnid in enumerate(ids):
        for i in range(2):
            write_image(top / "train" / wnid / "images" / f"{wnid}_{i}.png", pixels[2 * k + i])
        write_image(top / "val" / "images" / f"val_{k}.png", pixels[6 + k])
    (top / "test" / "images").mkdir(parents=True)
    rows = [f"val_{k}.png\t{ids[2 - k]}\t0\t0\t62\t62" for k in range(3)]
    (top / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (top / "words.txt").write_text("n01\tcat, tabby\nn02\tdog\nn03\tcow, ox\nn09\tother\n")
    found = load_dataset(Data(name="tiny_imagenet", root=str(tmp_path)))
    assert np.array_equal(all_of(found.train), pixels[:6].transpose(0, 3, 1, 2))
    assert found.test.labels.tolist() == [2, 1, 0]
    assert found.class_names == ("cat", "dog", "cow")
    (top / "val" / "val_annotations.txt").write_text("val_0.png\tn77\n")
    with pytest.raises(UsageError, match=r"val_annotations\.txt:1"):
        load(tmp_path, "tiny_imagenet")


def test_tiny_imagenet_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny-imagenet-200/train.*cannot download it"):
        load(tmp_path, "tiny_imagenet", download=True)


def test_omniglot_of_torchvision(tmp_path: Path) -> None:
    for part, alphabet in (("background", "Greek"), ("evaluation", "Tibetan")):
        for character in (1, 2):
            for drawer in range(1, 21):
                path = f"omniglot-py/images_{part}/{alphabet}/character0{character}/0{character}_{drawer:02}.png"
                write_image(tmp_path / path, noise(15, 15, seed=drawer))
    found = load_dataset(Data(name="omniglot", root=str(tmp_path)))
    train, test = found.columns["drawer"]
    assert found.class_names[2] == "Tibetan/character01"
    assert (len(set(train.tolist())), len(set(test.tolist()))) == (15, 5)
    assert not set(train.tolist()) & set(test.tolist())
    assert np.array_equal(all_of(found.test)[0, 0], noise(15, 15, seed=int(test[0])))


def domains(root: Path, counts: dict[str, int], size: int = 6) -> Path:
    number = 0
    for domain, count in counts.items():
        for label in ("ant", "bee"):
            for i in range(count):
                write_image(root / domain / label / f"{i:03}.png", noise(size, size, 3, seed=number))
                number += 1
    return root


def test_folder_of_domains(tmp_path: Path) -> None:
    domains(tmp_path / "zoo", {"photo": 10, "sketch": 5})
    found = load_dataset(Data(name="zoo", root=str(tmp_path)))
    assert (found.class_names, found.domain_names) == (("ant", "bee"), ("photo", "sketch"))
    assert found.train_domains is not None
    assert found.test_domains is not None
    cells = np.bincount(found.test_domains * 2 + found.test.labels)
    assert cells.tolist() == [2, 2, 1, 1]
    assert len(found.train) == 24
    one = load_dataset(Data(name="zoo", root=str(tmp_path), domains=["sketch"]))
    assert one.test_domains is not None
    assert one.test_domains.tolist() == [0, 0]
    assert np.array_equal(all_of(one.test), all_of(found.test)[found.test_domains == 1])


def test_folder_of_classes_with_train_and_val(tmp_path: Path) -> None:
    write_image(tmp_path / "pets/train/cat/a.png", noise(5, 5))
    write_image(tmp_path / "pets/train/dog/b.png", noise(5, 5, seed=1))
    write_image(tmp_path / "pets/val/cat/c.png", noise(5, 5, seed=2))
    write_image(tmp_path / "pets/val/dog/d.png", noise(5, 5, seed=3))
    (tmp_path / "pets/train/cat/notes.txt").write_text("not an image")
    found = load_dataset(Data(name="pets", root=str(tmp_path)))
    assert found.train.shape == (1, 5, 5)
    assert found.train_domains is None
    assert np.array_equal(all_of(found.test)[1, 0], noise(5, 5, seed=3))


def test_folder_errors(tmp_path: Path) -> None:
    domains(tmp_path / "zoo", {"photo": 5, "sketch": 5})
    write_image(tmp_path / "zoo/photo/ant/000.png", noise(7, 9, 3))
    with pytest.raises(UsageError, match=r"data\.size=None: .* is 9x7 .*set data\.size"):
        load(tmp_path, "zoo")
    assert load_dataset(Data(name="zoo", root=str(tmp_path), size=4)).train.shape == (3, 4, 4)
    (tmp_path / "zoo/photo/ant/000.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path, "zoo", size=4)
    (tmp_path / "zoo/photo/ant/000.png").unlink()
    (tmp_path / "zoo/photo/cow").mkdir()
    with pytest.raises(UsageError, match=r"photo/cow.*: holds no image"):
        load(tmp_path, "zoo")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "zoo/photo/ant/deep.png")
    (tmp_path / "zoo/photo/cow").rmdir()
    with pytest.raises(UsageError, match="8 bits a channel"):
        load(tmp_path, "zoo", size=4)
