"""Splits of a stream: personal test sets, counts, table, warnings, picture."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.partitioning import Partition, parse_test_rule, partition_stream
from fedcl.scenarios.partitions.dirichlet import Dirichlet
from fedcl.scenarios.partitions.iid import IID
from fedcl.stream import Split, Stage, Stream
from fedcl.streams.split import draw_split, split_summary, split_table, split_warnings


def stream_of(tasks=2, each=30, test_each=9):
    """Two classes a task; class ids are the reverse of the positions."""
    train = np.tile(np.arange(2 * tasks, dtype=np.int64), each)
    test = np.tile(np.arange(2 * tasks, dtype=np.int64), test_each)
    stages = tuple(
        Stage(
            task,
            (2 * task, 2 * task + 1),
            np.flatnonzero(train // 2 == task),
            np.empty(0, np.int64),
            np.flatnonzero(test // 2 == task),
        )
        for task in range(tasks)
    )
    return Stream("given", tuple(range(2 * tasks))[::-1], stages, 2 * tasks, train, test)


class FirstTakesAll(Partition):
    """Client 0 gets every row but those of odd classes, which client 1 gets; the others get nothing."""

    name = "first"

    def draw(self, labels, clients, config, attempt, *stream):
        """Fixed."""
        empty = [np.empty(0, np.int64)] * (clients - 2)
        return [np.flatnonzero(labels % 2 == 0), np.flatnonzero(labels % 2 == 1), *empty]


def test_global_split_covers_each_task_anew():
    stream = stream_of()
    split = partition_stream(stream, Dirichlet(), settings.Partition(alpha=0.5), 4, 0)
    assert split.test is None
    assert split.test_store is None
    for stage in stream.stages:
        held = np.sort(np.concatenate(split.train[stage.index]))
        assert (held == stage.train_ids).all()
    counts = split.counts()
    assert counts.shape == (2, 4, 4)
    assert counts.sum() == len(stream.train_labels)
    by_hand = [[[0] * 4 for _ in range(4)] for _ in range(2)]
    for task, clients in enumerate(split.train):
        for client, ids in enumerate(clients):
            for row in ids:
                by_hand[task][client][stream.train_labels[row]] += 1
    assert counts.tolist() == by_hand
    # redrawn: the two tasks have the same number of rows, but another split
    assert counts[0, :, :2].tolist() != counts[1, :, 2:].tolist()


def test_holdout_takes_its_share_out_of_the_training_rows():
    stream = stream_of()
    plain = partition_stream(stream, Dirichlet(), settings.Partition(alpha=0.3), 5, 1)
    split = partition_stream(stream, Dirichlet(), settings.Partition(alpha=0.3, test="holdout(0.29)"), 5, 1)
    assert split.test_store == "train"
    assert split.test is not None
    for task in range(2):
        for client in range(5):
            everything = plain.train[task][client]
            kept, out = split.train[task][client], split.test[task][client]
            assert len(out) == len(everything) * 29 // 100
            assert np.sort(np.concatenate([kept, out])).tolist() == everything.tolist()
            assert (np.diff(out) > 0).all()
            assert len(kept) > 0 or len(everything) == 0
    other = partition_stream(stream, IID(), settings.Partition(test="holdout(0.5)"), 3, 1)
    again = partition_stream(stream, IID(), settings.Partition(test="holdout(0.5)"), 3, 2)
    assert other.test[0][0].tolist() != again.test[0][0].tolist()


def test_same_mix_follows_each_client_s_classes():
    stream = stream_of(each=30, test_each=9)
    split = partition_stream(stream, Dirichlet(), settings.Partition(alpha=0.5, test="same_mix"), 4, 3)
    assert split.test_store == "test"
    assert split.test is not None
    counts = split.counts()
    for task, clients in enumerate(split.test):
        for client, ids in enumerate(clients):
            assert len(set(ids.tolist())) == len(ids)
            assert set(ids.tolist()) <= set(stream.stages[task].test_ids.tolist())
            seen = np.bincount(stream.test_labels[ids], minlength=4).tolist()
            assert seen == [-(-int(n) * 9 // 30) for n in counts[task, client]]


def test_same_mix_of_a_lone_holder_is_the_whole_test_set_of_its_classes():
    stream = stream_of()
    split = partition_stream(stream, FirstTakesAll(), settings.Partition(test="same_mix"), 3, 0)
    assert split.test is not None
    assert split.test[0][0].tolist() == np.flatnonzero(stream.test_labels == 0).tolist()
    assert split.test[1][1].tolist() == np.flatnonzero(stream.test_labels == 3).tolist()
    assert len(split.test[0][2]) == 0


@pytest.mark.parametrize(
    "rule", ["", "globl", "holdout", "holdout(0)", "holdout(1)", "holdout(x)", "holdout(nan)", "holdout(1/0)"]
)
def test_wrong_test_rule(rule):
    with pytest.raises(UsageError, match=r"^partition\.test="):
        partition_stream(stream_of(), IID(), settings.Partition(test=rule), 2, 0)


def test_share_is_read_exactly():
    assert parse_test_rule("holdout(0.1)") == ("holdout", Fraction(1, 10))


def test_empty_clients_are_reported_and_warned_of():
    stream = stream_of()
    split = partition_stream(stream, FirstTakesAll(), settings.Partition(), 4, 0)
    assert split.empty == ((2, 3), (2, 3))
    assert split_warnings(split, stream) == [
        "task 1: 2 clients hold no training image: 2, 3",
        "task 2: 2 clients hold no training image: 2, 3",
        "clients without a training image in any task: 2, 3",
        "clients that never hold an image of some class (how many classes): 0 (2), 1 (2)",
    ]


def test_classes_without_a_holder_are_warned_of():
    stream = stream_of(tasks=1)
    rows = np.flatnonzero(stream.train_labels == 0)
    split = Split(1, ((rows,),), None, None, 2, stream.train_labels)
    assert split_warnings(split, stream, ("cat", "dog")) == ["task 1: no client holds class cat"]


def test_table_and_summary_of_a_known_split():
    stream = stream_of(tasks=2, each=30)
    split = partition_stream(stream, FirstTakesAll(), settings.Partition(test="same_mix"), 3, 0)
    table = split_table(split, stream, ("ant", "bee", "cat", "dog"))
    assert table.splitlines()[:6] == [
        "Task 1: 60 training images, 18 for test",
        "class     c0  c1  c2  sum",
        "3 dog     30   .   .   30",
        "2 cat      .  30   .   30",
        "all       30  30   .   60",
        "own test   9   9   .   18",
    ]
    assert "task 2: 1 client holds no training image: 2" in split_warnings(split, stream)
    data = json.loads(json.dumps(split_summary(split, stream)))
    assert data["tasks"][1]["classes"][0] == {
        "position": 2, "class": 1, "name": "1", "clients": [30, 0, 0], "labelled": [30, 0, 0],
    }  # fmt: skip
    assert data["tasks"][1]["sizes"] == [30, 30, 0]
    assert data["tasks"][1]["empty"] == [2]


def test_wide_tables_sum_the_clients_that_are_not_shown():
    stream = stream_of(tasks=1, each=100)
    split = partition_stream(stream, IID(), settings.Partition(), 50, 0)
    lines = split_table(split, stream).splitlines()
    assert lines[1].split()[-4:] == ["c19", "30", "more", "sum"]
    assert lines[4].split() == ["all", *["4"] * 20, "120", "200"]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(("clients", "tasks"), [(1, 1), (3, 2), (20, 7), (60, 3)])
def test_picture_is_a_png_with_colours(tmp_path, clients, tasks):
    stream = stream_of(tasks=tasks)
    split = partition_stream(stream, Dirichlet(), settings.Partition(alpha=0.1), clients, 0)
    path = tmp_path / "split.png"
    draw_split(split, stream, (), path)
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert 300 < width < 4000
    assert 200 < height < 4000
    from matplotlib.image import imread

    assert len(np.unique(imread(path).reshape(-1, 4), axis=0)) > 20


def test_picture_of_a_split_without_images(tmp_path):
    stream = stream_of(tasks=1)
    nothing = np.empty(0, np.int64)
    draw_split(Split(2, ((nothing, nothing),), None, None, 2, stream.train_labels), stream, (), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_module_loads_no_torch():
    heavy = ("torch", "matplotlib", "avalanche")
    code = f"import sys, fedcl.stream, fedcl.streams.split; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
