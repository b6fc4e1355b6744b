"""Readers of arrays: scikit-learn's digits, ``.npz`` files, and what torchvision reads."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedcl.data.catalog import Entry
from fedcl.data.store import Images, Labels
from fedcl.errors import UsageError

Array = npt.NDArray[Any]
_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


class ImageSource(Protocol):
    """Images that can be taken by row."""

    def take(self, ids: Labels, size: int | None) -> Images:
        """Rows ``ids`` as (n, C, H, W) uint8, resized to size x size where a size is given."""


@dataclass(frozen=True)
class ArrayImages:
    """Images in an array (N, H, W) or (N, H, W, C); all rows in order are taken as a view."""

    array: Images

    def take(self, ids: Labels, size: int | None) -> Images:
        """See :class:`ImageSource`."""
        whole = len(ids) == len(self.array) and bool((ids == np.arange(len(ids))).all())
        rows = self.array if whole else self.array[ids]
        channels_last = rows[..., None] if rows.ndim == 3 else rows
        images = channels_last.transpose(0, 3, 1, 2)
        return images if size is None or images.shape[2:] == (size, size) else resized(images, size)


@dataclass(frozen=True)
class Part:
    """One part (train, test or all) of what was read."""

    images: ImageSource
    labels: Labels
    columns: Mapping[str, Labels] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Raw:
    """What a reader returns.

    ``test`` is None where the set has no official split. ``class_names`` is empty, or by label, or one for
    each label that occurs. Where a column ``domain`` exists, ``domain_names`` names its values.
    """

    train: Part
    test: Part | None
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...] = ()


def one_line(error: BaseException) -> str:
    """An error of a library as a short part of one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def resized(images: Images, size: int) -> Images:
    """(N, C, H, W) to (N, C, size, size), bilinear with antialiasing, in chunks."""
    import torch
    from torchvision.transforms.v2.functional import resize

    out = np.empty((*images.shape[:2], size, size), np.uint8)
    for start in range(0, len(images), 1024):
        chunk = torch.from_numpy(np.array(images[start : start + 1024], order="C"))
        out[start : start + 1024] = resize(chunk, [size, size], antialias=True).numpy()
    return out


def checked(path: object, where: str, x: Array, y: Array) -> tuple[Images, Labels]:
    """Images and labels of one part, or one line that says what is wrong with them.

    Raises:
        UsageError: wrong dtype, shape or length, negative labels, or no images.
    """

    def wrong(what: str) -> UsageError:
        return UsageError("data.name", str(path), f"{where}: {what}")

    if x.dtype != np.uint8:
        extra = ""
        if np.issubdtype(x.dtype, np.floating) and x.size:
            if np.isnan(x).any():
                extra = ", with NaN"
            elif x.min() >= 0 and x.max() <= 1:
                extra = " in [0, 1]: multiply by 255 and round"
        raise wrong(f"images must be uint8 in 0..255, not {x.dtype}{extra}")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise wrong(f"images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {x.shape}")
    if x.size == 0:
        raise wrong(f"there are no images (shape {x.shape})")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise wrong(f"labels must be (N,) integers, not {y.shape} {y.dtype}")
    if len(x) != len(y):
        raise wrong(f"{len(x)} images but {len(y)} labels")
    if y.min() < 0 or y.max() > 2**31:
        raise wrong(f"labels must be between 0 and 2^31, not {y.min()}..{y.max()}")
    return x, y.astype(np.int64)


def digits() -> Raw:
    """The 1,797 digits of scikit-learn, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.floor(bunch.images * (255.0 / 16.0) + 0.5).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    return Raw(Part(ArrayImages(images), labels), None, tuple("0123456789"))


def npz(path: Path, entry: Entry | None, memory_map: bool = False) -> Raw:
    """Arrays of an ``.npz``: train_x, train_y, test_x, test_y, or x, y without a split; optional class_names.

    Further integer arrays of one number a sample become columns: ``drawer``, or ``train_drawer`` and
    ``test_drawer``; the column ``domain`` is named by ``domain_names``.

    Raises:
        UsageError: a torn file, missing keys, wrong dtypes, shapes or lengths.
    """

    def wrong(what: str) -> UsageError:
        return UsageError("data.name", str(path), what)

    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = set(archive.files)
            lazy = {"train_x", "test_x", "x"} if memory_map else set()
            arrays = {key: archive[key] for key in keys - lazy}
        arrays |= {key: map_member(path, key) for key in keys & lazy}
    except _BROKEN as error:
        raise wrong(f"cannot be read as an .npz of plain arrays ({one_line(error)})") from error
    prefixes = {"train": "train_", "test": "test_"} if "train_x" in keys else {"all": ""}
    lacking = [p + key for p in prefixes.values() for key in ("x", "y") if p + key not in keys]
    if lacking:
        held = ", ".join(sorted(keys)) or "nothing"
        raise wrong(f"lacks {', '.join(lacking)}; it needs train_x, train_y, test_x, test_y or x, y; it holds {held}")
    parts = {where: _npz_part(path, where, prefix, arrays) for where, prefix in prefixes.items()}
    names = _strings(path, "class_names", arrays) or (entry.class_names if entry is not None else ())
    train, test = next(iter(parts.values())), parts.get("test")
    if test is not None and set(test.columns) != set(train.columns):
        raise wrong(f"train and test differ in their columns: {sorted(train.columns)} and {sorted(test.columns)}")
    return Raw(train, test, names, _strings(path, "domain_names", arrays))


def _npz_part(path: Path, where: str, prefix: str, arrays: Mapping[str, Array]) -> Part:
    x, y = checked(path, where, arrays[prefix + "x"], arrays[prefix + "y"])
    columns = {}
    for key, value in arrays.items():
        name = key.removeprefix(prefix)
        plain = key.startswith(prefix) and name not in ("x", "y", "class_names", "domain_names")
        if plain and np.issubdtype(value.dtype, np.integer):
            if value.shape != y.shape:
                raise UsageError("data.name", str(path), f"{key} is {value.shape}, not one number a sample {y.shape}")
            columns[name] = value.astype(np.int64)
    return Part(ArrayImages(x), y, columns)


def _strings(path: Path, key: str, arrays: Mapping[str, Array]) -> tuple[str, ...]:
    if key not in arrays:
        return ()
    if arrays[key].ndim != 1 or arrays[key].dtype.kind != "U":
        kind = f"{arrays[key].shape} {arrays[key].dtype}"
        raise UsageError("data.name", str(path), f"{key} must be one row of strings, not {kind}")
    return tuple(str(name) for name in arrays[key])


def map_member(path: Path, key: str) -> Array:
    """Memory map of one array inside an uncompressed ``.npz``.

    Raises:
        ValueError: the member is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{key} is compressed: data.memory_map needs np.savez, not np.savez_compressed")
    with path.open("rb") as file:
        # the local header repeats name and extra field with lengths that can differ from the central ones
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", file.read(30))
        file.seek(name_length + extra_length, 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{key} holds Python objects")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def torchvision_set(entry: Entry, base: Path, download: bool) -> Raw:
    """A dataset that torchvision reads (and, when allowed, downloads) below ``base``.

    Raises:
        UsageError: the files are torn or of another version, or the download failed.
    """
    try:
        return _torchvision_set(entry, base, download)
    except UsageError:
        raise
    except Exception as error:  # torchvision's readers fail in whatever way the bytes make them fail
        done = "downloaded to" if download else "read below"
        remedy = "remove its files and get them again" if not download else "check the network"
        raise UsageError("data.name", entry.name, f"cannot be {done} {base} ({one_line(error)}); {remedy}") from error


def _torchvision_set(entry: Entry, base: Path, download: bool) -> Raw:
    from torchvision import datasets

    root = str(base)
    split = entry.name.partition("_")[2] or "balanced"
    parts = []
    names: tuple[str, ...] = entry.class_names
    for train in (True, False):
        where = "train" if train else "test"
        if entry.reader == "EMNIST":
            read = datasets.EMNIST(root, split=split, train=train, download=download)
        elif entry.reader == "SVHN":
            read = datasets.SVHN(root, split=where, download=download)
        else:
            read = getattr(datasets, entry.reader)(root, train=train, download=download)
        images = np.asarray(read.data)
        if entry.reader == "EMNIST":
            images = images.transpose(0, 2, 1)  # the published files hold transposed images
        if entry.reader == "SVHN":
            images = images.transpose(0, 2, 3, 1)
        labels = np.asarray(read.labels if entry.reader == "SVHN" else read.targets)
        x, y = checked(entry.name, where, images, labels)
        parts.append(Part(ArrayImages(x), y))
        names = names or tuple(getattr(read, "classes", ()))
    return Raw(parts[0], parts[1], names)
