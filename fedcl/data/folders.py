"""Readers of image files: class folders, domains of class folders, Tiny-ImageNet, Omniglot.

Labels and domains come from the paths; pixels are decoded only for the images that a run uses.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedcl.data.catalog import Entry
from fedcl.data.readers import Part, Raw, one_line
from fedcl.data.store import Images, Labels
from fedcl.errors import UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
_GREY, _COLOUR = frozenset({"1", "L"}), frozenset({"RGB", "RGBA", "P", "CMYK", "YCbCr", "LA", "PA"})


@dataclass(frozen=True)
class FileImages:
    """Images in files; grey (one channel) where ``grey``, else colour (three)."""

    paths: tuple[Path, ...]
    grey: bool

    def take(self, ids: Labels, size: int | None) -> Images:
        """See :class:`fedcl.data.readers.ImageSource`.

        Raises:
            UsageError: an unreadable image, or images of different sizes without ``data.size``.
        """
        paths = [self.paths[i] for i in ids.tolist()]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            arrays = list(pool.map(lambda path: decode(path, self.grey, size), paths))
        for path, array in zip(paths, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise UsageError(
                    "data.size",
                    None,
                    f"{path} is {array.shape[2]}x{array.shape[1]} and {paths[0]} is "
                    f"{arrays[0].shape[2]}x{arrays[0].shape[1]} pixels; set data.size",
                )
        return np.stack(arrays)


def decode(path: Path, grey: bool, size: int | None) -> Images:
    """One image file as (C, H, W) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in _GREY | _COLOUR:
                raise ValueError(f"mode {image.mode} is not 8 bits a channel")
            out = image.convert("L" if grey else "RGB")
            if size is not None and out.size != (size, size):
                out = out.resize((size, size), Image.Resampling.BILINEAR)
            array = np.asarray(out)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError("data.name", str(path), f"this image cannot be read ({one_line(error)})") from error
    return array[None] if grey else array.transpose(2, 0, 1)


def all_grey(paths: list[Path]) -> bool:
    """Whether every file is a grey image; reads headers only, up to the first colour image."""
    from PIL import Image

    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode not in _GREY:
                    return False
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UsageError("data.name", str(path), f"this image cannot be read ({one_line(error)})") from error
    return True


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def holds_images(folder: Path) -> bool:
    """Whether a folder looks like an image dataset: class folders, perhaps below domains, train and test."""
    inner = folder
    for _ in range(3):
        below = _folders(inner)
        if not below:
            return False
        inner = below[0]
        if _images(inner):
            return True
    return False


@dataclass(frozen=True)
class _File:
    path: Path
    domain: str
    label: str


def _scan(top: Path) -> list[_File]:
    """Files of CLASS/* or DOMAIN/CLASS/*; domain "" for the first."""
    found: list[_File] = []
    empty: list[Path] = []
    depths = set()
    for first in _folders(top):
        below = _folders(first)
        depths.add(2 if below else 1)
        for folder, domain in [(f, first.name) for f in below] or [(first, "")]:
            images = _images(folder)
            found += [_File(path, domain, folder.name) for path in images]
            if not images:
                empty.append(folder)
    if len(depths) != 1:
        what = "some hold images and some hold folders" if depths else "there are none"
        raise UsageError("data.name", str(top), f"needs folders CLASS/* or DOMAIN/CLASS/*: {what}")
    if empty:
        raise UsageError("data.name", str(empty[0]), f"holds no image ({', '.join(sorted(SUFFIXES))})")
    return found


def image_folder(top: Path) -> Raw:
    """Class folders below ``top``: [DOMAIN/]CLASS/*, or train/ and test/ (or val/) that hold these.

    Raises:
        UsageError: another layout, or a class folder without images.
    """
    held_out = next((top / name for name in ("test", "val") if (top / name).is_dir()), None)
    if (top / "train").is_dir() != (held_out is not None):
        raise UsageError("data.name", str(top), "needs both train and test (or val), or neither")
    if held_out is None:
        files = _scan(top)
        return _from_files(files, None)
    return _from_files(_scan(top / "train"), _scan(held_out))


def _from_files(train: list[_File], test: list[_File] | None) -> Raw:
    every = train + (test or [])
    classes = sorted({f.label for f in every})
    domains = sorted({f.domain for f in every})
    if len(domains) > 1 and "" in domains:
        raise UsageError("data.name", str(train[0].path.parent), "train and test must both have domains, or none")
    grey = all_grey([f.path for f in every])
    named = domains != [""]

    def part(files: list[_File]) -> Part:
        labels = np.array([classes.index(f.label) for f in files], np.int64)
        columns = {"domain": np.array([domains.index(f.domain) for f in files], np.int64)} if named else {}
        return Part(FileImages(tuple(f.path for f in files), grey), labels, columns)

    return Raw(part(train), None if test is None else part(test), tuple(classes), tuple(domains) if named else ())


def tiny_imagenet(top: Path) -> Raw:
    """The folder ``tiny-imagenet-200``: train/WNID/images/*, val/images/* with val_annotations.txt.

    Raises:
        UsageError: an annotation names a missing file or an unknown class.
    """
    train: list[_File] = []
    for folder in _folders(top / "train"):
        images = _images(folder / "images") if (folder / "images").is_dir() else []
        if not images:
            raise UsageError("data.name", str(folder), "holds no images/*.JPEG")
        train += [_File(path, "", folder.name) for path in images]
    known = {f.label for f in train}
    test: list[_File] = []
    annotations = top / "val" / "val_annotations.txt"
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in known:
            raise UsageError("data.name", f"{annotations}:{number}", "needs FILE<tab>CLASS with a class of train/")
        test.append(_File(top / "val" / "images" / fields[0], "", fields[1]))
    if not train or not test:
        raise UsageError("data.name", str(top), f"holds {len(train)} training and {len(test)} validation images")
    raw = _from_files(train, test)
    return Raw(raw.train, raw.test, _words(top, raw.class_names))


def _words(top: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The first English word of each WordNet id; the ids where two share a word or there is no list."""
    if not (top / "words.txt").is_file():
        return wnids
    lines = (line.partition("\t") for line in (top / "words.txt").read_text(errors="replace").splitlines())
    words = {wnid: text.split(",")[0].strip() for wnid, _, text in lines}
    named = tuple(words.get(wnid) or wnid for wnid in wnids)
    return named if len(set(named)) == len(named) else wnids


def omniglot(entry: Entry, base: Path, download: bool) -> Raw:
    """All characters of Omniglot, both of torchvision's sets, with the column ``drawer`` (1..20).

    Raises:
        UsageError: the download failed, or there are no images.
    """
    if download:
        from torchvision.datasets import Omniglot

        try:
            for background in (True, False):
                Omniglot(str(base), background=background, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError("data.name", entry.name, f"cannot be downloaded to {base} ({one_line(error)})") from error
    files: list[_File] = []
    for folder in entry.files:
        for alphabet in _folders(base / folder):
            for character in _folders(alphabet):
                files += [_File(path, "", f"{alphabet.name}/{character.name}") for path in _images(character)]
    drawers = []
    for file in files:
        number = file.path.stem.rpartition("_")[2]
        if not number.isdigit():
            raise UsageError("data.name", str(file.path), "the name must end in _DRAWER, as in 0001_05.png")
        drawers.append(int(number))
    if not files:
        raise UsageError("data.name", entry.name, f"there are no images below {base}: {', '.join(entry.files)}")
    raw = _from_files(files, None)
    columns = {"drawer": np.array(drawers, np.int64)}
    return Raw(Part(raw.train.images, raw.train.labels, columns), None, raw.class_names)
