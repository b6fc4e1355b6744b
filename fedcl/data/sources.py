"""From a dataset's name to tensor stores: find the files, read them, restrict, split, normalise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedcl import random
from fedcl.config import Data
from fedcl.data import catalog, folders, noise, readers
from fedcl.data.catalog import Entry
from fedcl.data.readers import Part, Raw
from fedcl.data.splits import at_most, stratified
from fedcl.data.store import Dataset, Images, Labels, Statistics, TensorStore
from fedcl.errors import UsageError

TEST_SHARE = 0.2  # of sets without an official split
TEST_DRAWERS = 0.25  # of the drawers: 5 of Omniglot's 20


def load_dataset(config: Data, device: str = "cpu") -> Dataset:
    """The dataset that ``data.*`` describes; the same for every run seed.

    Args:
        config: the section ``data``.
        device: a torch device, for example ``cpu`` or ``cuda:0``.

    Raises:
        UsageError: unknown name, missing or broken files, wrong option values.
    """
    _check_options(config)
    raw, name, source = _read(config)
    _check_domains(raw, config)
    names = raw.domain_names
    train, test = _split(raw)
    if config.domains:
        train, test = _restrict(train, config.domains, names), _restrict(test, config.domains, names)
        names = tuple(config.domains)
    train, test, class_names = _contiguous(train, test, raw.class_names, config)
    if config.limit is not None:
        train = _rows(train, at_most(train.labels, config.limit, "limit", "train"))
        test = _rows(test, at_most(test.labels, max(1, config.limit // 4), "limit", "test"))
    stores: list[TensorStore] = []
    statistics: Statistics | None = None
    for part in (train, test):
        assert isinstance(part.images, _Chosen)
        images = part.images.source.take(part.images.ids, config.size)
        if stores and images.shape[1:] != stores[0].shape:
            raise UsageError(
                "data.name",
                config.name,
                f"training images are {stores[0].shape}, test images {images.shape[1:]}, (C, H, W)",
            )
        try:
            store = TensorStore(images, part.labels, statistics, device, resident=not config.memory_map)
        except ValueError as error:
            raise UsageError("data.name", config.name, str(error)) from error
        statistics = store.statistics
        stores.append(store)
    return Dataset(
        name=name,
        train=stores[0],
        test=stores[1],
        class_names=class_names,
        domain_names=names,
        train_domains=train.columns.get("domain"),
        test_domains=test.columns.get("domain"),
        columns={key: (train.columns[key], test.columns[key]) for key in train.columns if key != "domain"},
        source=source,
    )


def _check_options(config: Data) -> None:
    for key, value in (("data.size", config.size), ("data.limit", config.limit)):
        if value is not None and value < 1:
            raise UsageError(key, value, "null, or a whole number of at least 1")
    if config.size is not None and config.size > 4096:
        raise UsageError("data.size", config.size, "pixels of a side, at most 4096")
    if config.memory_map and config.size is not None:
        raise UsageError("data.memory_map", True, "images left on disk cannot be resized: leave out data.size")


def _read(config: Data) -> tuple[Raw, str, str]:
    """What the files hold, the dataset's name, and its source."""
    entry = catalog.find(config.name)
    if entry is not None and entry.kind == "embedded":
        _no_map(config)
        return readers.digits(), entry.name, entry.source
    if entry is not None and entry.kind == "random":
        _no_map(config)
        return noise.images(entry.name, config.size, config.limit), entry.name, entry.source
    path = Path(config.name).expanduser()
    if path.suffix == ".npz" and path.is_absolute():
        root = path.parent
    else:
        root = catalog.data_root(config.root) if config.download else catalog.check_root(config.root)
    if entry is not None:
        return _read_known(entry, root, config), entry.name, entry.source
    if path.suffix == ".npz":
        places = [path] if path.is_absolute() else [root / path, path]
    else:
        places = [root / f"{config.name}.npz", root / path]
    for place in places:
        if place.suffix == ".npz" and place.is_file():
            return readers.npz(place, None, config.memory_map), place.stem, f"the user's file {place.name}"
        if place.is_dir() and folders.holds_images(place):
            _no_map(config)
            return folders.image_folder(place), place.name, f"the user's folder {place.name}"
    known = [e.name for e in catalog.ENTRIES]
    raise UsageError(
        "data.name",
        config.name,
        f"is no known dataset ({', '.join(known)}) and there is no {' or '.join(map(str, places))}",
        catalog.names(),
    )


def _read_known(entry: Entry, root: Path, config: Data) -> Raw:
    arrays = catalog.npz_of(entry, root)
    if arrays is not None:
        return readers.npz(arrays, entry, config.memory_map)
    base = catalog.base_of(entry, root)
    by_torchvision = entry.kind in ("torchvision", "omniglot")
    if base is None and not (config.download and by_torchvision):
        get = entry.get or "set data.download=true, or put its files there"
        lacking = catalog.missing(entry, root)
        places = f"{lacking}; {get}" if lacking else f"looked for {', '.join(catalog.looked(entry, root))}; {get}"
        raise UsageError(
            "data.name",
            entry.name,
            f"not found below {root} (data.root or {catalog.ROOT_VARIABLE}): {places}",
        )
    _no_map(config)
    if entry.kind == "folder":
        assert base is not None
        return folders.image_folder(base)
    if entry.kind == "tiny_imagenet":
        assert base is not None
        return folders.tiny_imagenet(base)
    reader: Callable[[Entry, Path, bool], Raw]
    reader = folders.omniglot if entry.kind == "omniglot" else readers.torchvision_set
    return reader(entry, base or root, base is None)


def _no_map(config: Data) -> None:
    if config.memory_map:
        raise UsageError("data.memory_map", True, f"{config.name!r} is no .npz; only those stay on disk")


class _Chosen:
    """Some rows of an image source: nothing is decoded or copied before all choices are made."""

    def __init__(self, source: readers.ImageSource, ids: Labels) -> None:
        self.source, self.ids = source, ids

    def take(self, ids: Labels, size: int | None) -> Images:
        return self.source.take(self.ids[ids], size)


def _rows(part: Part, ids: Labels) -> Part:
    images = part.images
    chosen = _Chosen(images.source, images.ids[ids]) if isinstance(images, _Chosen) else _Chosen(images, ids)
    return Part(chosen, part.labels[ids], {key: column[ids] for key, column in part.columns.items()})


def _check_domains(raw: Raw, config: Data) -> None:
    parts = [part for part in (raw.train, raw.test) if part is not None]
    has = bool(raw.domain_names) and all("domain" in part.columns for part in parts)
    if has:
        top = len(raw.domain_names)
        for ids in (part.columns["domain"] for part in parts):
            if ids.min() < 0 or ids.max() >= top:
                raise UsageError("data.name", config.name, f"domain ids must be at least 0 and below {top}")
    elif raw.domain_names or any("domain" in part.columns for part in parts):
        raise UsageError("data.name", config.name, "a column domain and domain_names come only together")
    if config.domains and not has:
        raise UsageError("data.domains", config.domains, f"{config.name!r} has no domains; leave it empty")
    if len(set(config.domains)) != len(config.domains):
        raise UsageError("data.domains", config.domains, "each domain once")
    for name in config.domains:
        if name not in raw.domain_names:
            raise UsageError("data.domains", name, f"one of {', '.join(raw.domain_names)}", raw.domain_names)


def _split(raw: Raw) -> tuple[Part, Part]:
    """Training and test part: the official ones, else by drawer, else 80/20 by domain and class."""
    every = raw.train
    if raw.test is not None:
        return every, raw.test
    if "drawer" in every.columns:
        drawers = np.unique(every.columns["drawer"])
        count = int(TEST_DRAWERS * len(drawers))
        chosen = drawers[random.permutation(len(drawers), "test split", "drawer")[:count]]
        held_out = np.isin(every.columns["drawer"], chosen)
        train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    else:
        domain = every.columns.get("domain", np.zeros_like(every.labels))
        groups = domain * (every.labels.max() + 1) + every.labels
        train, test = stratified(groups, TEST_SHARE, "test split")
    return _rows(every, train), _rows(every, test)


def _restrict(part: Part, domains: list[str], names: tuple[str, ...]) -> Part:
    """The samples of some domains; domain ids become places in ``domains``."""
    position = np.full(len(names), -1, np.int64)
    position[[names.index(name) for name in domains]] = np.arange(len(domains))
    chosen = _rows(part, np.flatnonzero(position[part.columns["domain"]] >= 0))
    return replace(chosen, columns={**chosen.columns, "domain": position[chosen.columns["domain"]]})


def _contiguous(train: Part, test: Part, given: tuple[str, ...], config: Data) -> tuple[Part, Part, tuple[str, ...]]:
    """Both parts with class ids 0..C-1 in the order of the labels, and the names that belong to them."""
    present = np.unique(train.labels)
    top = int(max(train.labels.max(initial=-1), test.labels.max(initial=-1)))

    def wrong(what: str) -> UsageError:
        return UsageError("data.name", config.name, what)

    lacks = (("training", np.setdiff1d(test.labels, present)), ("test", np.setdiff1d(present, test.labels)))
    for kind, labels in lacks:
        if len(labels):
            shown = [given[i] if top < len(given) else str(i) for i in labels[:3].tolist()]
            more = ", ..." if len(labels) > 3 else ""
            raise wrong(f"every class needs {kind} images; these have none: {', '.join(shown)}{more}")
    if not given:
        names = tuple(str(label) for label in present.tolist())
    elif top < len(given):
        names = tuple(given[label] for label in present.tolist())
    elif len(given) == len(present):
        names = given
    else:
        raise wrong(f"{len(given)} class names for {len(present)} classes, the largest label {top}")
    if len(set(names)) != len(names):
        raise wrong("class names must differ from each other")

    def relabel(part: Part) -> Part:
        chosen = _rows(part, np.arange(len(part.labels)))
        return replace(chosen, labels=np.searchsorted(present, chosen.labels).astype(np.int64))

    return relabel(train), relabel(test), names
