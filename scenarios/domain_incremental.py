"""Domain-incremental streams: the classes stay, what images look like changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedcl import config as settings
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Scenario, Stream

from ._rows import assemble, check_labels, refuse_unread
from .class_incremental import class_order

if TYPE_CHECKING:
    from fedcl.data.store import Dataset, Images, TensorStore

_READS = {"given": ("datasets",), "permuted": (), "rotated": ("angles",)}


class DomainIncremental(Scenario):
    """One domain a task: domains of the dataset, several datasets, permuted or rotated pixels."""

    name = "domain_incremental"
    aliases = ("dil",)
    summary = "the same classes in new domains: given ones, several data sets, permuted or rotated pixels"
    card = Card(
        title="Three Types of Incremental Learning",
        authors="van de Ven, Tuytelaars, Tolias",
        venue="Nature Machine Intelligence",
        year=2022,
        certainty="Certain for given domains. Permuted pixels are those of Goodfellow et al. 2013, rotated images "
        "those of Lopez-Paz and Ranzato 2017; whether the first task is left as it is differs between papers.",
        notes="scenario.shift=given: a task for each domain in the order of data.domains (all domains: by name), or "
        "for data.name and each of scenario.datasets, of the same classes and image shape (data.size helps). "
        "permuted: scenario.tasks random orders of pixels, equal in all channels. rotated: task t turned by t * 180 / "
        "tasks degrees counter-clockwise, or by scenario.angles; corners are black. The first of the tasks sees the "
        "images as they are (with angles: at its angle). Every permuted or rotated task has all images of the dataset, "
        "each task's copies being samples of their own; only the plain images are kept in memory and changed when a "
        "batch is gathered, and normalisation stays that of the plain ones. Column j of the accuracy matrix is the "
        "test set of domain j. scenario.order orders label positions only. scenario.own_classes=true makes the classes "
        "of each domain classes of their own, so that the stream is class-incremental over domains; data sets may then "
        "differ in classes, and grey images are shown in three channels beside colour ones (5-Datasets).",
    )

    def images(self, dataset: Dataset, data: settings.Data, config: settings.Scenario, seed: int) -> Dataset:
        """The dataset with one domain a task."""
        if config.shift not in _READS:
            raise UsageError("scenario.shift", config.shift, " | ".join(_READS), tuple(_READS))
        refuse_unread(config, f"{self.name}, shift={config.shift}", ("shift", "own_classes", *_READS[config.shift]))
        if config.shift == "given":
            if config.datasets:
                return _joined(dataset, data, config.datasets, config.own_classes)
            return _apart(dataset) if config.own_classes else dataset
        from ._shifts import permutation_map, rotation_map, shifted

        _, height, width = dataset.train.shape
        if config.shift == "permuted":
            orders = [permutation_map(height, width, seed, self.name, task) for task in range(1, config.tasks)]
            found = shifted(dataset, [None, *orders], tuple(f"permutation {task}" for task in range(config.tasks)))
            return _apart(found) if config.own_classes else found
        angles = config.angles or [task * 180 / config.tasks for task in range(config.tasks)]
        turns = [rotation_map(height, width, angle) if angle % 360 else None for angle in angles]
        found = shifted(dataset, turns, tuple(f"{angle:g} degrees" for angle in angles))
        return _apart(found) if config.own_classes else found

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`; ``data`` holds the labels and domains of :meth:`images`.

        Raises:
            UsageError: the dataset has no domains, or a domain lacks training or test images.
        """
        if "domain" not in data.columns:
            allowed = "permuted or rotated: the dataset has no domains (data.name=pacs has), nor are scenario.datasets"
            raise UsageError("scenario.shift", config.shift, f"{allowed} given", ("permuted", "rotated"))
        check_labels(data)
        train, test = data.columns["domain"]
        tasks = len(data.domains)
        for store, domains in (("training", train), ("test", test)):
            missing = np.flatnonzero(np.bincount(domains, minlength=tasks) == 0)
            if len(missing):
                allowed = f"domains with {store} images; {data.domains[missing[0]]} has none"
                raise UsageError("data.domains", data.domains[missing[0]], allowed)
        is_held_out = _held_out(data, train, config.shift, validation, seed)
        return assemble(
            self.name,
            data,
            class_order(data.num_classes, config, seed),
            [np.flatnonzero((train == task) & ~is_held_out) for task in range(tasks)],
            [np.flatnonzero((train == task) & is_held_out) for task in range(tasks)],
            [np.flatnonzero(test == task) for task in range(tasks)],
        )


def _held_out(data: DatasetLabels, domains: Ids, shift: str, validation: float, seed: int) -> Ids:
    """(N,) bool: the same images of every permuted or rotated task, a share of each class of each given domain."""
    from fedcl.data.splits import validation_split

    copies = 1 if shift == "given" else len(data.domains)
    groups = (domains * data.num_classes + data.train_labels)[: len(domains) // copies]
    mask = np.zeros(len(groups), dtype=bool)
    mask[validation_split(groups, validation, seed)[1]] = True
    return np.tile(mask, copies)


def _apart(dataset: Dataset) -> Dataset:
    """The dataset with class ``d * C + c`` for class c of domain d; as it is where it has no domains."""
    if dataset.train_domains is None or dataset.test_domains is None:
        return dataset
    count = dataset.num_classes
    return replace(
        dataset,
        train=dataset.train.relabelled(dataset.train_domains * count + dataset.train.labels),
        test=dataset.test.relabelled(dataset.test_domains * count + dataset.test.labels),
        class_names=tuple(f"{domain}: {name}" for domain in dataset.domain_names for name in dataset.class_names),
    )


def _joined(dataset: Dataset, data: settings.Data, more: list[str], own_classes: bool) -> Dataset:
    """Several datasets as domains of one.

    Args:
        own_classes: whether each keeps its own classes, one set's after the other's.

    Raises:
        UsageError: they differ in image shape, have domains of their own, or differ in classes that are to be shared.
    """
    from fedcl.data.sources import load_dataset
    from fedcl.data.store import Dataset, Statistics
    from fedcl.data.store import TensorStore as Store

    if data.memory_map:
        raise UsageError("data.memory_map", True, "must be false with scenario.datasets, whose images are joined")
    device = str(dataset.train.device)
    sets = [dataset, *(load_dataset(replace(data, name=name), device) for name in more)]
    for other in sets:
        if other.domain_names:
            raise UsageError("scenario.datasets", more, f"data sets without domains; {other.name} has some")
        if other.class_names != dataset.class_names and not own_classes:
            allowed = f"data sets of the same classes (or own_classes=true); {other.name} and {dataset.name} differ"
            raise UsageError("scenario.datasets", more, allowed)
        grey = own_classes and 1 in (other.train.shape[0], dataset.train.shape[0])
        if other.train.shape[grey:] != dataset.train.shape[grey:]:
            shapes = f"{other.name} has {other.train.shape}, {dataset.name} {dataset.train.shape}"
            raise UsageError("scenario.datasets", more, f"images of one shape (C, H, W), see data.size: {shapes}")
    if len({other.name for other in sets}) < len(sets):
        raise UsageError("scenario.datasets", more, f"each data set once, and not {dataset.name}")
    channels = max(other.train.shape[0] for other in sets)
    starts = np.cumsum([0, *(other.num_classes for other in sets)]) * own_classes
    stores: list[TensorStore] = []
    domains: list[Ids] = []
    for parts in ([other.train for other in sets], [other.test for other in sets]):
        images = np.concatenate([_all_images(part, channels) for part in parts])
        labels = np.concatenate([part.labels + start for part, start in zip(parts, starts, strict=False)])
        statistics = stores[0].statistics if stores else Statistics.of(images)
        stores.append(Store(images, labels, statistics, device))
        domains.append(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))
    return Dataset(
        name=" + ".join(other.name for other in sets),
        train=stores[0],
        test=stores[1],
        class_names=tuple(f"{other.name}: {name}" for other in sets for name in other.class_names)
        if own_classes
        else dataset.class_names,
        domain_names=tuple(other.name for other in sets),
        train_domains=domains[0],
        test_domains=domains[1],
        source="; ".join(other.source for other in sets),
    )


def _all_images(store: TensorStore, channels: int) -> Images:
    """All images (N, C, H, W) of a store; grey ones ``channels`` times."""
    import torch

    images = store.gather(torch.arange(len(store), device=store.device)).cpu().numpy()
    return images if images.shape[1] == channels else np.repeat(images, channels, axis=1)
