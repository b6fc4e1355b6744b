"""The datasets known by name: which files each is made of, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass


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
        "mini_imagenet",
        ("miniimagenet", "mini-imagenet"),
        "60,000 colour pictures, 100 classes, mostly read at 84x84",
        "Vinyals et al. 2016, a subset of ImageNet; non-commercial research",
        "folder",
        bases=("mini_imagenet", "mini-imagenet", "miniimagenet"),
        files=("train", "test"),
        get="put the pictures there as train/CLASS/* and test/CLASS/*, or as mini_imagenet.npz",
    ),
    Entry(
        "notmnist",
        ("not_mnist", "notmnist_small"),
        "letters A to J in many fonts, 28x28 grey, 10 classes",
        "Bulatov 2011, notMNIST; no licence stated",
        "folder",
        bases=("notmnist", "notMNIST", "notMNIST_small"),
        files=tuple("ABCDEFGHIJ"),
        get="unpack notMNIST_small.tar.gz there, without its two broken files (torchvision cannot download it)",
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
