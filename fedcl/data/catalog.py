"""The datasets known by name: which of them are here, and where they are looked for.

Light on purpose (no numpy, no torch): ``fedcl list datasets`` and ``fedcl doctor`` only need this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedcl.data.known import ENTRIES, WITHOUT_FILES, Entry
from fedcl.errors import UsageError

__all__ = ["ENTRIES", "ROOT_VARIABLE", "WITHOUT_FILES", "DatasetInfo", "Entry"]

ROOT_VARIABLE = "FEDCL_DATA_ROOT"


@dataclass(frozen=True)
class DatasetInfo:
    """A line of ``fedcl list datasets``: ``where`` it was found, ``looked`` all places that are tried."""

    name: str
    aliases: tuple[str, ...]
    summary: str
    found: bool
    where: str | None
    looked: tuple[str, ...]


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
