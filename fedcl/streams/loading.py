"""The images, the stream of tasks and the split that the settings ask for; nothing here knows a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import config as settings
from ..data.sources import load_dataset
from ..errors import UsageError
from ..partitioning import partition_stream
from ..strategy import Strategy
from ..stream import DatasetLabels, Scenario, Split, Stream
from .clocks import clocked, refuse_own_clocks, without_absent
from .labels import hidden_rows, separated
from .own_classes import client_specific
from .population import draw_population
from .public import set_aside

if TYPE_CHECKING:
    from ..data.store import Dataset
    from ..settings.resolve import Resolved
    from .labels import Mask


def load_stream(config: settings.Config, resolved: Resolved, device: str) -> tuple[Dataset, Stream, Split]:
    """The images, the stream of tasks and its split over the clients, as the strategies arrange it."""
    refuse_own_clocks(config.time, resolved.strategies)
    scenario = resolved.scenario()
    dataset = load_images(config, scenario, device)
    stream = scenario.build(DatasetLabels.of(dataset), config.scenario, config.data.validation, config.seed)
    if config.scenario.first is not None:
        stream = replace(stream, stages=stream.stages[: config.scenario.first])
    stream, public = set_aside(stream, config.partition.public, config.seed)
    split, hidden = _split(config, resolved, dataset, stream)
    learns = any(s.unlabelled == "learns" for s in resolved.strategies)
    split = replace(separated(split, stream, hidden), self_supervised=learns, public=public)
    return dataset, stream, split


def _split(config: settings.Config, resolved: Resolved, dataset: Dataset, stream: Stream) -> tuple[Split, Mask]:
    """Who holds what, and which of it has no label for anybody."""
    clients, partition = config.federation.clients, resolved.partition()
    if config.partition.size:
        _refuse_arranging(config, resolved.strategies)
        split = draw_population(stream, partition, config.partition, clients, config.seed)
        return split, hidden_rows(split, stream, config.labels, config.seed)
    if config.time.order == "client_specific":
        split = client_specific(stream, partition, config)
    else:
        columns = {name: train for name, (train, _) in dataset.columns.items()}
        if dataset.train_domains is not None:
            columns["domain"] = dataset.train_domains
        split = partition_stream(stream, partition, config.partition, clients, config.seed, columns)
        split = clocked(split, stream, config.time, config.seed)
    hidden = hidden_rows(split, stream, config.labels, config.seed)
    rows: list[list[Any]] = [list(task) for task in split.rows]
    arranged = rows
    for strategy in resolved.strategies:
        arranged = strategy.arrange(arranged)
    if arranged is not rows:
        arranged = without_absent(arranged, split)
        kept = len(arranged[0])
        pooled = kept != split.clients
        personal = None if pooled else split.test
        split = replace(
            split,
            clients=kept,
            train=tuple(tuple(np.asarray(ids, dtype=np.int64) for ids in task) for task in arranged),
            test=personal,
            test_store=split.test_store if personal is not None else None,
            clocks=None if pooled else split.clocks,
        )
    return split, hidden


def load_images(config: settings.Config, scenario: Scenario, device: str) -> Dataset:
    """The images and labels as the scenario shows them, on a torch device."""
    own = scenario.dataset(config.scenario, config.seed)
    if own is not None:
        _refuse_unread(config)
    return scenario.images(own or load_dataset(config.data, device), config.data, config.scenario, config.seed)


def _refuse_arranging(config: settings.Config, strategies: Sequence[Strategy]) -> None:
    """Refuses strategies that rewrite who holds what: they would need every client of a drawn population at once."""
    for strategy in strategies:
        if type(strategy).arrange is not Strategy.arrange:
            allowed = f"must be 0 with strategy {strategy.name}, which gathers the images of all clients"
            raise UsageError("partition.size", config.partition.size, allowed)


def _refuse_unread(config: settings.Config) -> None:
    """Refuses settings of the data section that a scenario with images of its own does not read."""
    plain = settings.Data()
    for key in ("limit", "size", "domains", "memory_map"):
        if getattr(config.data, key) != getattr(plain, key):
            allowed = f"is not read with scenario.name={config.scenario.name}, which brings its own images"
            raise UsageError(f"data.{key}", getattr(config.data, key), allowed)
