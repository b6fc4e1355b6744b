"""Any Avalanche benchmark, its images copied once into tensor stores."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Scenario, Stage, Stream

from ._rows import refuse_unread

if TYPE_CHECKING:
    from fedcl.data.store import Dataset

Image = npt.NDArray[np.uint8]

_PIXELS = (
    "a benchmark whose images are uint8 or lie in [0, 1] (fedcl normalises itself; try "
    "scenario.arguments={train_transform: null, eval_transform: null})"
)


# With the evaluation transform if that leaves pixels, else without it. Avalanche removes from each nested
# dataset its own current group, "train" in some and "eval" in others: one of the ways reaches them all.
_VIEWS: tuple[Callable[[Any], Any], ...] = (
    lambda dataset: dataset.eval(),
    lambda dataset: dataset.eval().remove_current_transform_group(),
    lambda dataset: dataset.train().remove_current_transform_group(),
)


@dataclass(frozen=True)
class _Materialised:
    """A benchmark's images (N, C, H, W), original labels (N,) and experience numbers (N,), by stream."""

    images: tuple[Image, Image]
    labels: tuple[Ids, Ids]
    experience: tuple[Ids, Ids]


class Benchmark(Scenario):
    """The streams of an Avalanche benchmark object, made by the function ``scenario.benchmark`` names.

    Images are taken as the evaluation transform gives them if that is a picture or a tensor in [0, 1], else
    without the benchmark's current transforms (frozen ones, such as pixel permutations, stay).
    """

    name = "benchmark"
    aliases = ("avalanche",)
    summary = "any Avalanche benchmark by dotted name (scenario.benchmark, scenario.arguments)"
    card = Card(
        title="Avalanche: an End-to-End Library for Continual Learning",
        authors="Lomonaco et al.",
        venue="CVPR Workshops",
        year=2021,
        notes="Label positions follow first exposure. A test row counts for the task that first exposes its "
        "class; the rows of a task without new classes (domain and instance streams) count for that task. "
        "Random draws of the benchmark follow the run's seed unless scenario.arguments has one of its own. "
        "The data section's name is not used.",
    )

    def __init__(self) -> None:
        self._made: tuple[object, _Materialised] | None = None

    def dataset(self, config: settings.Scenario, seed: int) -> Dataset:
        """The benchmark's images, uint8. Class ids are the sorted original labels' places."""
        from fedcl.data.store import Dataset, Statistics, TensorStore

        _refuse_unread(config)
        made = self._materialise(config, seed)
        originals = np.unique(made.labels[0])
        train, test = (np.searchsorted(originals, labels) for labels in made.labels)
        try:
            statistics = Statistics.of(made.images[0])
        except ValueError as error:
            raise UsageError("scenario.benchmark", config.benchmark, str(error)) from None
        return Dataset(
            name=str(config.benchmark),
            train=TensorStore(made.images[0], train.astype(np.int64), statistics),
            test=TensorStore(made.images[1], test.astype(np.int64), statistics),
            class_names=tuple(str(label) for label in originals.tolist()),
            source=f"Avalanche benchmark {config.benchmark}",
        )

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`; ``data`` holds the labels of :meth:`dataset`."""
        from fedcl.data.splits import validation_split

        made = self._materialise(config, seed)
        train_task, test_experience = made.experience
        tasks = int(train_task.max()) + 1
        first = np.full(data.num_classes, tasks, dtype=np.int64)
        np.minimum.at(first, data.train_labels, train_task)
        order = np.argsort(first, kind="stable")
        position = np.argsort(order)
        new = [np.flatnonzero(first[order] == task).tolist() for task in range(tasks)]
        # stratified inside each task, so that no task loses a class to its validation rows
        _, held_out = validation_split(train_task * data.num_classes + data.train_labels, validation, seed)
        is_held_out = np.zeros(len(train_task), dtype=bool)
        is_held_out[held_out] = True
        columns = _test_columns(data, new, first, train_task, test_experience)
        for task, rows in enumerate(columns):
            if len(rows) == 0:
                raise UsageError(
                    "scenario.benchmark",
                    config.benchmark,
                    f"test images for every task; task {task} has none",
                )
        stages = tuple(
            Stage(
                index=task,
                classes=tuple(new[task]),
                train_ids=np.flatnonzero((train_task == task) & ~is_held_out),
                validation_ids=np.flatnonzero((train_task == task) & is_held_out),
                test_ids=columns[task],
            )
            for task in range(tasks)
        )
        return Stream(
            name=self.name,
            class_order=tuple(order.tolist()),
            stages=stages,
            num_classes=data.num_classes,
            train_labels=position[data.train_labels],
            test_labels=position[data.test_labels],
        )

    def _materialise(self, config: settings.Scenario, seed: int) -> _Materialised:
        wanted = (config.benchmark, repr(sorted(config.arguments.items())), seed)
        if self._made is None or self._made[0] != wanted:
            self._made = (wanted, _materialise(config, seed))
        return self._made[1]


def _test_columns(
    data: DatasetLabels, new: list[list[int]], first: Ids, train_task: Ids, test_experience: Ids
) -> list[Ids]:
    tasks = len(new)
    column = first[data.test_labels]
    if int(test_experience.max()) + 1 == tasks:
        exposes = np.array([len(classes) > 0 for classes in new])
        column = np.where(exposes[test_experience], column, test_experience)
        return [np.flatnonzero(column == task) for task in range(tasks)]
    # test experiences do not pair with the tasks: a task without new classes is tested on the classes it
    # shows
    shown = [np.unique(data.train_labels[train_task == task]) for task in range(tasks)]
    return [
        np.flatnonzero(column == task if new[task] else np.isin(data.test_labels, shown[task])) for task in range(tasks)
    ]


def _materialise(config: settings.Scenario, seed: int) -> _Materialised:
    from fedcl.bridges.avalanche_import import quiet_avalanche, sealed

    quiet_avalanche()
    with sealed(counter.key(seed, "benchmark") >> 65):
        function = _find(config.benchmark)
        try:
            benchmark = function(**config.arguments)
            streams = [list(benchmark.train_stream), list(benchmark.test_stream)]
        except Exception as error:
            raise UsageError("scenario.benchmark", config.benchmark, _failed(error, config.arguments)) from error
        parts = [_copy(config.benchmark, stream) for stream in streams]
    train, test = parts
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{train[0].shape[1:]} and {test[0].shape[1:]}"
        raise UsageError("scenario.benchmark", config.benchmark, f"images of one shape, not {shapes}")
    if extra := sorted(set(np.unique(test[1]).tolist()) - set(np.unique(train[1]).tolist())):
        raise UsageError("scenario.benchmark", config.benchmark, f"test classes that are also trained, not {extra[:5]}")
    if len(np.unique(train[2])) != len(streams[0]):
        raise UsageError("scenario.benchmark", config.benchmark, "training images in every experience")
    return _Materialised((train[0], test[0]), (train[1], test[1]), (train[2], test[2]))


def _failed(error: Exception, arguments: dict[str, Any]) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return (
        "a function that returns a benchmark with a train_stream and a test_stream; with "
        f"scenario.arguments={arguments} it raised {type(error).__name__}: {first}"
    )


def _find(name: str | None) -> Callable[..., Any]:
    """The function of ``module:function`` or ``module.function``."""
    allowed = "the dotted name of a function, such as avalanche.benchmarks.classic:SplitMNIST"
    module, _, function = (name or "").rpartition(":" if ":" in (name or "") else ".")
    if not module or not function:
        raise UsageError("scenario.benchmark", name, allowed)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError("scenario.benchmark", name, f"{allowed} ({error})") from None
    if not callable(found):
        raise UsageError("scenario.benchmark", name, allowed)
    return found  # type: ignore[no-any-return]


def _refuse_unread(config: settings.Scenario) -> None:
    """Refuses settings that the benchmark decides by itself."""
    refuse_unread(config, "benchmark", ("benchmark",))
    if config.order != settings.Scenario().order:
        allowed = "is not read with scenario.name=benchmark: give the benchmark's own scenario.arguments"
        raise UsageError("scenario.order", config.order, allowed)


def _copy(name: str | None, stream: list[Any]) -> tuple[Image, Ids, Ids]:
    """Images (N, C, H, W) uint8, labels (N,) and experience numbers (N,) of a stream."""
    images: list[Image] = []
    labels: list[int] = []
    numbers: list[int] = []
    view = 0
    for number, experience in enumerate(stream):
        if not images and len(experience.dataset):
            tried = (_as_uint8(see(experience.dataset)[0][0]) for see in _VIEWS)
            view = next((v for v, image in enumerate(tried) if image is not None), 0)
        dataset = _VIEWS[view](experience.dataset)
        for row in range(len(dataset)):
            sample = dataset[row]
            image = _as_uint8(sample[0])
            if image is None:
                raise UsageError("scenario.benchmark", name, _PIXELS)
            images.append(image)
            labels.append(int(sample[1]))
            numbers.append(number)
    if len({image.shape for image in images}) != 1:
        found = "no images" if not images else "images of different shapes"
        raise UsageError("scenario.benchmark", name, f"images of one shape; there are {found}")
    return np.stack(images), np.array(labels, dtype=np.int64), np.array(numbers, dtype=np.int64)


def _as_uint8(value: Any) -> Image | None:
    """One image as (C, H, W) uint8: a picture, or an array or tensor of uint8 or of floats in [0, 1]; else
    None.
    """
    picture = hasattr(value, "getbands")
    array: npt.NDArray[Any] = np.asarray(value)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and picture:
        array = np.moveaxis(array, -1, 0)
    if array.ndim != 3:
        return None
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    # written so that NaN is refused too
    if np.issubdtype(array.dtype, np.floating) and bool(((array >= 0) & (array <= 1)).all()):
        scaled: Image = np.rint(array * 255).astype(np.uint8)
        return scaled
    return None
