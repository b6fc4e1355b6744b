"""The datasets known by name: what they are, which files they are made of, how to get them.

Light on purpose (no numpy, no torch): ``fedcl list datasets`` and ``fedcl doctor`` only need this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedcl.errors import UsageError

ROOT_VARIABLE = "FEDCL_DATA_ROOT"


@dataclass(frozen=True)
class Entry:
    """A dataset known by name.

    Attributes:
        name: what ``data.name`` says.
        aliases: other spellings of the name; each is also tried as ``ALIAS.npz``.
        summary: one line.
        source: where the images come from and the licence stated there.
        kind: how it is read: embedded | random | torchvision | omniglot | folder | tiny_imagenet.
        bases: folders below the root in which ``files`` are looked for.
        files: all files or folders that must be there.
        reader: name of the torchvision class, empty where none reads it.
        get: how to get the files by hand.
        class_names: for arrays that carry no names; empty: the labels themselves.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    source: str
    kind: str
    bases: tuple[str, ...] = ("",)
    files: tuple[str, ...] = ()
    reader: str = ""
    get: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of ``.npz`` files that hold this dataset, without the suffix."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class DatasetInfo:
    """A line of ``fedcl list datasets``: ``where`` it was found, ``looked`` all places that are tried."""

    name: str
    aliases: tuple[str, ...]
    summary: str
    found: bool
    where: str | None
    looked: tuple[str, ...]


def _idx(folder: str, prefix: str = "", train: str = "train", test: str = "t10k") -> tuple[str, ...]:
    return tuple(
        f"{folder}/raw/{prefix}{part}-{what}-ubyte" for part in (train, test) for what in ("images-idx3", "labels-idx1")
    )


_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def _emnist(split: str, aliases: tuple[str, ...], summary: str) -> Entry:
    return Entry(
        name="emnist" if split == "balanced" else f"emnist_{split}",
        aliases=aliases,
        summary=summary,
        source="Cohen et al. 2017, EMNIST (NIST Special Database 19); no licence stated",
        kind="torchvision",
        files=_idx("EMNIST", f"emnist-{split}-", test="test"),
        reader="EMNIST",
    )


# Kinds of sets that need no files, and where their images come from.
WITHOUT_FILES = {"embedded": "scikit-learn", "random": "drawn when a run starts"}


def _noise(name: str, aliases: tuple[str, ...], images: str) -> Entry:
    summary = f"random images for benchmarks of speed, {images}, 10 classes; data.limit a class (default 500)"
    return Entry(name, aliases, summary, "drawn at random: nothing can be learned", "random", class_names=_DIGITS)


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "digits",
        ("optdigits",),
        "1,797 handwritten digits, 8x8 grey; shipped inside scikit-learn, no files needed",
        "Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), CC BY 4.0",
        "embedded",
        class_names=_DIGITS,
    ),
    Entry(
        "mnist",
        (),
        "70,000 handwritten digits, 28x28 grey, 10 classes",
        "LeCun et al. 1998; no licence stated by the authors",
        "torchvision",
        files=_idx("MNIST"),
        reader="MNIST",
        class_names=_DIGITS,
    ),
    Entry(
        "fashion_mnist",
        ("fashionmnist", "fashion-mnist", "fmnist"),
        "70,000 pictures of clothes, 28x28 grey, 10 classes",
        "Xiao et al. 2017, Fashion-MNIST; MIT",
        "torchvision",
        files=_idx("FashionMNIST"),
        reader="FashionMNIST",
        class_names=_FASHION,
    ),
    Entry(
        "kmnist",
        ("kuzushiji_mnist",),
        "70,000 cursive Japanese characters, 28x28 grey, 10 classes",
        "Clanuwat et al. 2018, Kuzushiji-MNIST; CC BY-SA 4.0",
        "torchvision",
        files=_idx("KMNIST"),
        reader="KMNIST",
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
    _emnist("balanced", ("emnist_balanced",), "131,600 letters and digits, 28x28 grey, 47 classes"),
    _emnist("letters", (), "145,600 letters, 28x28 grey, 26 classes"),
    _emnist("digits", (), "280,000 digits, 28x28 grey, 10 classes"),
    Entry(
        "usps",
        (),
        "9,298 handwritten digits, 16x16 grey, 10 classes",
        "Hull 1994, USPS zip codes; no licence stated",
        "torchvision",
        bases=("", "USPS", "usps"),
        files=("usps.bz2", "usps.t.bz2"),
        reader="USPS",
        class_names=_DIGITS,
    ),
    Entry(
        "cifar10",
        ("cifar-10", "cifar_10"),
        "60,000 colour pictures, 32x32, 10 classes",
        "Krizhevsky 2009; no licence stated, asks for citation",
        "torchvision",
        files=(
            *(f"cifar-10-batches-py/data_batch_{part}" for part in range(1, 6)),
            "cifar-10-batches-py/test_batch",
            "cifar-10-batches-py/batches.meta",
        ),
        reader="CIFAR10",
    ),
    Entry(
        "cifar100",
        ("cifar-100", "cifar_100"),
        "60,000 colour pictures, 32x32, 100 classes",
        "Krizhevsky 2009; no licence stated, asks for citation",
        "torchvision",
        files=("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
        reader="CIFAR100",
    ),
    Entry(
        "svhn",
        (),
        "99,289 street-view house numbers, 32x32 colour, 10 classes",
        "Netzer et al. 2011, SVHN; non-commercial use",
        "torchvision",
        bases=("", "SVHN", "svhn"),
        files=("train_32x32.mat", "test_32x32.mat"),
        reader="SVHN",
        class_names=_DIGITS,
    ),
    Entry(
        "tiny_imagenet",
        ("tinyimagenet", "tiny-imagenet-200", "tiny-imagenet"),
        "110,000 colour pictures, 64x64, 200 classes",
        "Stanford CS231n, a subset of ImageNet; non-commercial research",
        "tiny_imagenet",
        bases=("tiny-imagenet-200", "tiny_imagenet", "tiny-imagenet"),
        files=("train", "val/val_annotations.txt", "val/images"),
        get="unpack tiny-imagenet-200.zip of Stanford CS231n there (torchvision cannot download it)",
    ),
    Entry(
        "omniglot",
        ("omniglot_small",),
        "characters of 50 alphabets by 20 drawers, 105x105 grey; 15 drawers train, 5 test",
        "Lake et al. 2015, Omniglot; MIT",
        "omniglot",
        files=("omniglot-py/images_background", "omniglot-py/images_evaluation"),
        reader="Omniglot",
    ),
    Entry(
        "pacs",
        ("pacs64",),
        "9,991 pictures of 7 classes in 4 domains (photo, art painting, cartoon, sketch), colour",
        "Li et al. 2017, PACS; academic use",
        "folder",
        bases=("pacs64", "PACS", "pacs"),
        files=("art_painting", "cartoon", "photo", "sketch"),
        get="put the pictures there as DOMAIN/CLASS/* (torchvision cannot download it)",
    ),
    _noise("random_grey", (), "28x28 grey"),
    _noise("random_colour", ("random_color",), "32x32 colour"),
)


def canonical(name: str) -> str:
    """The spelling that names are compared in.

    >>> canonical("CIFAR-100")
    'cifar_100'
    """
    return name.strip().lower().replace("-", "_")


def find(name: str) -> Entry | None:
    """The entry of a name or alias, None where there is none.

    >>> find("FashionMNIST").name
    'fashion_mnist'
    """
    wanted = canonical(name)
    return next((e for e in ENTRIES if wanted in {canonical(stem) for stem in e.stems}), None)


def names() -> list[str]:
    """All names and aliases, for suggestions."""
    return [stem for entry in ENTRIES for stem in entry.stems]


def data_root(configured: str | None) -> Path:
    """The folder that datasets are looked for in: ``data.root``, else FEDCL_DATA_ROOT, else ``./data``."""
    return Path(configured or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def check_root(configured: str | None) -> Path:
    """:func:`data_root`, which must be a folder where it was asked for by name.

    Raises:
        UsageError: ``data.root`` or FEDCL_DATA_ROOT names no folder.
    """
    root = data_root(configured)
    if configured is not None or os.environ.get(ROOT_VARIABLE):
        origin = "" if configured is not None else f" (from {ROOT_VARIABLE})"
        if not root.is_dir():
            raise UsageError("data.root", str(root), f"there is no such folder{origin}; name an existing one")
    return root


def npz_of(entry: Entry, root: Path) -> Path | None:
    """The first ``.npz`` file below the root that holds the dataset."""
    return next((p for p in (root / f"{stem}.npz" for stem in entry.stems) if p.is_file()), None)


def base_of(entry: Entry, root: Path) -> Path | None:
    """The first base folder that holds all of the dataset's files."""
    for base in entry.bases:
        if entry.files and all((root / base / file).exists() for file in entry.files):
            return root / base
    return None


def missing(entry: Entry, root: Path) -> str:
    """What an incomplete dataset lacks, in words; empty where nothing of it is there."""
    for base in entry.bases:
        lacking = [file for file in entry.files if not (root / base / file).exists()]
        if 0 < len(lacking) < len(entry.files):
            return f"{root / base} lacks {', '.join(lacking)}"
    return ""


def looked(entry: Entry, root: Path) -> tuple[str, ...]:
    """Every place that the dataset is looked for in, in that order."""
    if entry.kind in WITHOUT_FILES:
        return ()
    first = entry.files[0] if entry.files else ""
    return (
        *(str(root / f"{stem}.npz") for stem in entry.stems),
        *(str(root / base / first) for base in entry.bases),
    )


def available(root: str | None = None) -> list[DatasetInfo]:
    """All datasets known by name, and the ``.npz`` files of the user's own below the root.

    Args:
        root: as ``data.root``.
    """
    folder = data_root(root)
    infos = []
    for entry in ENTRIES:
        place = npz_of(entry, folder) or base_of(entry, folder)
        if place == folder:
            place = folder / Path(entry.files[0]).parts[0]
        where = WITHOUT_FILES.get(entry.kind) or (None if place is None else str(place))
        infos.append(
            DatasetInfo(entry.name, entry.aliases, entry.summary, where is not None, where, looked(entry, folder))
        )
    for path in sorted(folder.glob("*.npz")) if folder.is_dir() else []:
        if find(path.stem) is None:
            infos.append(DatasetInfo(path.stem, (), "arrays of your own", True, str(path), (str(path),)))
    return infos
