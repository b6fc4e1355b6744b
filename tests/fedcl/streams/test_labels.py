"""Which images have a label: shares, seeds, images of several tasks, clients that draw, and what is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.config import load_config
from fedcl.errors import UsageError
from fedcl.partitioning import partition_stream
from fedcl.scenarios.partitions.dirichlet import Dirichlet
from fedcl.scenarios.partitions.iid import IID
from fedcl.stream import Stage, Stream
from fedcl.streams.labels import allotted, from_text, hidden_rows, masked, separated, to_text
from fedcl.streams.population import draw_population
from fedcl.streams.split import split_summary, split_table, split_warnings

NOTHING = np.empty(0, np.int64)
quick = hypothesis_settings(max_examples=60, deadline=None)


def stream_of(each: list[int], tasks: int = 2, without: list[int] | None = None) -> Stream:
    """``each[c]`` training images of class c, which belongs to task ``c % tasks``."""
    labels = np.repeat(np.arange(len(each)), each)
    stages = tuple(
        Stage(t, tuple(range(t, len(each), tasks)), np.flatnonzero(labels % tasks == t), NOTHING, NOTHING)
        for t in range(tasks)
    )
    order = tuple(range(len(each)))
    return Stream("given", order, stages, len(each), labels, NOTHING, unlabelled=np.array(without or [], np.int64))


def split_of(stream: Stream, clients: int, seed: int, rule: type = IID, **labels: object):
    """(the partition's split, the same with labels hidden)."""
    whole = partition_stream(stream, rule(), settings.Partition(name=rule.name), clients, seed)
    config = settings.Labels(**labels)  # type: ignore[arg-type]
    return whole, separated(whole, stream, hidden_rows(whole, stream, config, seed))


def digest(split) -> str:
    rows = [*split.rows, *replace(split, train=split.unlabelled).rows]
    text = "|".join(";".join(",".join(map(str, ids.tolist())) for ids in task) for task in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@quick
@given(
    each=st.lists(st.integers(1, 40), min_size=2, max_size=5), clients=st.integers(1, 5), seed=st.integers(0, 2**40),
    rate=st.sampled_from([0.0, 0.1, 0.25, 0.29, 0.5, 0.9]), per=st.sampled_from(["sample", "client"]),
    rule=st.sampled_from([IID, Dirichlet]),
)  # fmt: skip
def test_labelled_and_unlabelled_are_the_partitions_rows(each, clients, seed, rate, per, rule):
    stream = stream_of(each)
    whole, split = split_of(stream, clients, seed, rule, rate=rate, per=per)
    _, again = split_of(stream, clients, seed, rule, rate=rate, per=per)
    for task in range(2):
        for client in range(clients):
            labelled = split.train[task][client]
            other = NOTHING if split.unlabelled is None else split.unlabelled[task][client]
            assert not set(labelled.tolist()) & set(other.tolist())
            assert sorted([*labelled.tolist(), *other.tolist()]) == whole.train[task][client].tolist()
            assert labelled.tolist() == again.train[task][client].tolist()
            if per == "client":
                assert not len(labelled) or not len(other)
                continue
            count = len(whole.train[task][client])
            assert abs(len(labelled) - Fraction(str(rate)) * count) < 1
            for label in range(len(each)):
                have = int((stream.train_labels[labelled] == label).sum())
                of = int((stream.train_labels[whole.train[task][client]] == label).sum())
                assert abs(have - Fraction(str(rate)) * of) < 1
    rows = [] if split.unlabelled is None else [i for task in split.unlabelled for ids in task for i in ids.tolist()]
    assert split.hidden.tolist() == sorted(rows)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_count_is_of_each_class_client_and_task(count):
    stream = stream_of([30, 20, 7, 11])
    whole, split = split_of(stream, 3, 5, Dirichlet, count=count)
    had, has = whole.counts(), split.counts()
    assert (has == np.minimum(had, count)).all()
    assert (has + split.unlabelled_counts() == had).all()


@quick
@given(sizes=st.lists(st.integers(0, 50), max_size=6), rate=st.fractions(0, 1), start=st.fractions(0, 1))
def test_allotted_shares(sizes, rate, start):
    start = min(start, Fraction(2**64 - 1, 2**64))
    found = allotted(sizes, rate, start)
    assert all(0 <= n <= size for n, size in zip(found, sizes, strict=True))
    assert all(abs(n - rate * size) < 1 for n, size in zip(found, sizes, strict=True))
    assert abs(sum(found) - rate * sum(sizes)) < 1


def test_shares_of_small_groups_are_right_on_average():
    """Rounding each group of two images alone would give a tenth of them no label at all."""
    stream = stream_of([200, 200], tasks=1)
    found = [split_of(stream, 100, seed, rate=0.1)[1].counts().sum() for seed in range(20)]
    assert 0.09 < np.mean(found) / 400 < 0.11


def test_the_same_split_on_every_machine():
    stream = stream_of([20, 30, 25, 5])
    assert digest(split_of(stream, 4, 7, Dirichlet, rate=0.3)[1]) == "9d53c5d80aa8807b"
    assert digest(split_of(stream, 4, 7, Dirichlet, rate=0.5, per="client")[1]) == "d838212624752a42"
    assert digest(split_of(stream, 4, 7, Dirichlet, count=2)[1]) == "c538a2e0d0e3d31e"


@pytest.mark.parametrize(("rate", "labelled"), [(0.0, 0), (0.01, 1), (0.4, 2), (0.5, 3), (0.9, 5)])
def test_per_client_the_same_clients_are_labelled_in_every_task(rate, labelled):
    _, split = split_of(stream_of([40, 40, 40]), 5, 3, rate=rate, per="client")
    with_labels = [{c for c in range(5) if split.size(task, c)} for task in range(2)]
    assert [len(found) for found in with_labels] == [labelled] * 2
    assert with_labels[0] == with_labels[1]


def test_an_image_of_several_tasks_keeps_its_label_or_has_none():
    stream = stream_of([40], tasks=1)
    again = replace(stream.stages[0], index=1, classes=())
    for per in ("sample", "client"):
        _, split = split_of(replace(stream, stages=(stream.stages[0], again)), 4, 0, rate=0.5, per=per)
        first, second = ({i for ids in task for i in ids.tolist()} for task in split.rows)
        assert first == second
        assert len(first) == 20


def test_what_the_scenario_hides_stays_hidden():
    stream = stream_of([10, 10], without=[0, 3, 12])
    _, all_labelled = split_of(stream, 2, 0)
    assert all_labelled.hidden.tolist() == [0, 3, 12]
    _, half = split_of(stream, 2, 0, rate=0.5)
    assert {0, 3, 12} < set(half.hidden.tolist())
    assert split_of(stream_of([10, 10]), 2, 0)[1].unlabelled is None


def test_clients_that_draw_share_the_labels_of_their_images():
    stream = stream_of([60, 60], tasks=1)
    config = settings.Partition(name="iid", size=20)
    drawn = draw_population(stream, IID(), config, 1000, 0)
    split = separated(drawn, stream, hidden_rows(drawn, stream, settings.Labels(rate=0.25), 0))
    assert np.bincount(stream.train_labels[split.hidden]).tolist() == [45, 45]
    for client in (0, 17, 999):
        labelled, other = split.train[0][client], split.unlabelled[0][client]
        assert sorted([*labelled, *other]) == sorted(drawn.train[0][client])
        assert set(other) <= set(split.hidden.tolist())
        assert not set(labelled) & set(split.hidden.tolist())
        assert (split.size(0, client), split.unlabelled_size(0, client)) == (len(labelled), len(other))
    with pytest.raises(UsageError, match=r"labels.per='client': must be sample"):
        hidden_rows(drawn, stream, settings.Labels(rate=0.5, per="client"), 0)


def test_the_table_the_object_and_the_notes_tell_labels_apart():
    stream = stream_of([8, 4, 8], tasks=2)
    rows = (
        (np.array([0, 1, 2, 12, 13]), np.array([14]), NOTHING),
        (np.array([8, 9]), np.array([10]), np.array([11])),
    )
    whole = replace(split_of(stream, 3, 0)[0], train=rows)
    hidden = np.isin(np.arange(20), [1, 2, 13, 14, 8, 9, 10, 11])
    split = replace(separated(whole, stream, hidden), public=(np.array([3, 4]), NOTHING))
    lines = split_table(split, stream, ("ant", "bee", "cat")).splitlines()
    assert lines[:4] == [
        "Task 1: 6 training images (2 labelled), 2 held by the server, 0 for test",
        "class   c0   c1  c2  sum",
        "0 ant  1+2    .   .  1+2",
        "2 cat  1+1  0+1   .  1+2",
    ]
    assert lines[4] == "all    2+3  0+1   .  2+4"
    assert "Cells: images with a label + images without" in lines
    notes = [line for line in split_warnings(split, stream, ("ant", "bee", "cat")) if "label" in line]
    assert notes == [
        "no client has a label of class bee",
        "task 1: 1 client has images but no label, they do not train: 1",
        "task 2: 3 clients have images but no label, they do not train: all",
    ]
    data = split_summary(split, stream)
    assert [(task["sizes"], task["labelled"], task["public"]) for task in data["tasks"]] == [
        ([5, 1, 0], [2, 0, 0], 2), ([2, 1, 1], [0, 0, 0], 0),
    ]  # fmt: skip
    plain = split_table(whole, stream)
    assert "+" not in plain
    assert "label" not in plain


@quick
@given(rows=st.sets(st.integers(0, 5000)))
def test_rows_as_text(rows):
    hidden = np.array(sorted(rows), dtype=np.int64)
    assert from_text(to_text(hidden)).tolist() == hidden.tolist()


def test_masked_labels():
    labels = np.arange(4)
    assert masked(labels, np.array([2])).tolist() == [0, 1, -1, 3]
    assert labels.tolist() == [0, 1, 2, 3]
    assert masked(labels, NOTHING) is labels


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"labels.rate": 1.5}, "labels.rate=1.5: must be in [0, 1]"),
        ({"labels.per": "task"}, "must be one of sample, client"),
        ({"labels.count": 0}, "labels.count=0: must be at least 1"),
        ({"labels.count": 3, "labels.rate": 0.5}, "must be null with labels.rate or labels.per=client"),
        ({"labels.count": 3, "labels.per": "client"}, "must be null with labels.rate or labels.per=client"),
        ({"evaluate.predict": "nearest"}, "must be one of auto, head, knn, linear, nearest_mean"),
        ({"labels.public": False}, "is only read with partition.public"),
        ({"partition.public": 2.5}, "whole number of images of each class or a share below 1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(given_, told):
    with pytest.raises(UsageError) as caught:
        load_config({}, given_)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
