"""Classes of the clients' own: how many, whose, and who gets which of their images."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl.errors import UsageError
from fedcl.scenarios.partitions.classes_per_client import ClassesPerClient
from fedcl.scenarios.partitions.dirichlet import Dirichlet
from fedcl.scenarios.partitions.iid import IID
from fedcl.scenarios.partitions.natural import Natural
from fedcl.settings import schema as settings
from fedcl.stream import Split, Stage, Stream
from fedcl.streams.own_classes import client_specific, own_classes

quick = hypothesis_settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**40)


def stream_of(tasks: int, each: int = 6, classes: int = 2) -> Stream:
    """``classes`` new classes a task, ``each`` training and two test images a class."""
    train = np.tile(np.arange(classes * tasks, dtype=np.int64), each)
    test = np.tile(np.arange(classes * tasks, dtype=np.int64), 2)
    stages = tuple(
        Stage(
            task,
            tuple(range(classes * task, classes * (task + 1))),
            np.flatnonzero(train // classes == task),
            np.empty(0, np.int64),
            np.flatnonzero(test // classes == task),
        )
        for task in range(tasks)
    )
    return Stream("given", tuple(range(classes * tasks)), stages, classes * tasks, train, test)


def blurry() -> Stream:
    """Two tasks that both show class 1, which the first exposes."""
    labels = np.array([0, 0, 1, 1, 1, 2, 2], dtype=np.int64)
    no = np.empty(0, np.int64)
    stages = (
        Stage(0, (0, 1), np.array([0, 1, 2]), no, np.array([0, 1, 2, 3, 4])),
        Stage(1, (2,), np.array([3, 4, 5, 6]), no, np.array([5, 6])),
    )
    return Stream("blurry", (0, 1, 2), stages, 3, labels, labels)


def digest(split: Split) -> str:
    text = repr(split.clocks) + repr([[ids.tolist() for ids in stage] for stage in split.rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@quick
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.floats(0, 1), st.integers(0, 8), seeds)
def test_own_classes(tasks: int, clients: int, each: int, shared: float, spare: int, seed: int) -> None:
    wanted = tasks * each
    available = list(range(100, 100 + wanted + spare))
    found = own_classes(settings.Time(classes=each, shared=shared), available, tasks, clients, seed)
    sets = [{label for task in own for label in task} for own in found]
    for own, labels in zip(found, sets, strict=True):
        assert [len(task) for task in own] == [each] * tasks
        assert len(labels) == wanted  # no class twice
        assert labels <= set(available)
    common = int(shared * wanted + 0.5)
    everywhere = set.intersection(*sets)
    assert len(everywhere) >= common
    holders = [sum(label in own for own in sets) for label in available]
    others = [count for label, count in zip(available, holders, strict=True) if label not in everywhere or clients == 1]
    if clients > 1 and others and len(everywhere) == common:
        assert max(others) - min(others) <= 1  # nobody has a class for the second time before all are dealt


def own(stream: Stream, clients: int, seed: int, partition: settings.Partition | None = None, **time: object) -> Split:
    config = settings.Config(seed=seed, partition=partition or settings.Partition(name="iid"))
    config.federation.clients = clients
    config.time = settings.Time(order="client_specific", **time)  # type: ignore[arg-type]
    rule = {"iid": IID, "dirichlet": Dirichlet, "natural": Natural, "classes_per_client": ClassesPerClient}[
        config.partition.name
    ]
    return client_specific(stream, rule(), config)


@quick
@given(st.integers(1, 3), st.integers(1, 5), st.floats(0, 1), seeds, st.sampled_from(["iid", "dirichlet"]))
def test_a_class_is_dealt_to_those_that_have_it(each: int, clients: int, shared: float, seed: int, rule: str) -> None:
    stream = stream_of(4, each=12, classes=3)
    split = own(stream, clients, seed, settings.Partition(name=rule), classes=each, shared=shared)
    clocks = split.clocks
    assert clocks is not None
    for client in range(clients):
        for stage in range(4):
            assert set(stream.train_labels[split.rows[stage][client]]) <= set(clocks.classes[client][stage])
    held = np.concatenate([ids for stage in split.rows for ids in stage])
    owned = {label for mine in clocks.classes for task in mine for label in task}
    assert len(np.unique(held)) == len(held)
    assert np.sort(held).tolist() == np.flatnonzero(np.isin(stream.train_labels, sorted(owned))).tolist()


def test_held_out_clients_have_classes_of_their_own_too() -> None:
    stream = stream_of(4, each=12)
    whole = own(stream, 5, 3, classes=1)
    cut = own(stream, 5, 3, settings.Partition(name="iid", held_out=2), classes=1)
    assert cut.clients == 3
    assert cut.held_out is not None
    assert cut.clocks is not None
    kept = [k for k in range(5) if any(np.array_equal(whole.rows[0][k], ids) for ids in cut.rows[0])]
    assert [whole.clocks.classes[k] for k in kept] == list(cut.clocks.classes)  # type: ignore[union-attr]


def test_the_same_seed_is_the_same_stream_on_every_machine() -> None:
    split = own(stream_of(4), 5, 42, classes=2, shared=0.5, joining=0.3)
    assert digest(split) == "836cec9c4d940627"


def test_what_cannot_be_dealt_is_refused() -> None:
    stream = stream_of(2)
    with pytest.raises(UsageError, match="at most 2: a client meets 2 tasks of different classes, and there are 4"):
        own(stream, 2, 0, classes=3)
    with pytest.raises(UsageError, match="its tasks are no sets of classes"):
        own(blurry(), 2, 0, classes=1)
    with pytest.raises(UsageError, match=r"partition\.name='classes_per_client': must deal each class by itself"):
        own(stream, 5, 0, settings.Partition(name="classes_per_client"), classes=1)
    with pytest.raises(UsageError, match=r"partition\.name='natural': must be a rule that deals each class by itself"):
        own(stream, 2, 0, settings.Partition(name="natural"), classes=1)
