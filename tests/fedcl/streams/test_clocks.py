"""Who is where: own orders, own classes, presence. Pure functions of small streams."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl.errors import UsageError
from fedcl.partitioning import partition_stream
from fedcl.scenarios.partitions.iid import IID
from fedcl.settings import schema as settings
from fedcl.stream import Split, Stage, Stream
from fedcl.streams.clocks import clocked, counted, own_order, presence, without_absent
from fedcl.streams.split import split_summary, split_table, split_warnings
from fedcl.streams.split_notes import split_notes

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


def dealt(stream: Stream, clients: int, seed: int, **partition: object) -> Split:
    return partition_stream(stream, IID(), settings.Partition(name="iid", **partition), clients, seed)  # type: ignore[arg-type]


def digest(split: Split) -> str:
    text = repr(split.clocks) + repr([[ids.tolist() for ids in stage] for stage in split.rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@quick
@given(st.integers(1, 5), st.integers(1, 5), seeds, st.sampled_from(["shuffled", "lagged"]))
def test_every_client_meets_every_task_once_by_its_own_clock(tasks: int, clients: int, seed: int, how: str) -> None:
    stream = stream_of(tasks)
    given_ = dealt(stream, clients, seed)
    split = clocked(given_, stream, settings.Time(order="asynchronous", sequence=how), seed)
    clocks = split.clocks
    assert clocks is not None
    assert not clocks.in_step
    for client in range(clients):
        assert [stage[client] for stage in clocks.own] == list(range(tasks))
        assert sorted(clocks.tasks[client]) == list(range(tasks))
        for stage, task in enumerate(clocks.tasks[client]):
            assert (split.rows[stage][client] == given_.rows[task][client]).all()
            assert clocks.new(stage, client) == stream.stages[task].classes
        assert clocks.known(tasks - 1, client) == tuple(range(stream.num_classes))
    held = np.concatenate([ids for stage in split.rows for ids in stage])
    assert np.sort(held).tolist() == list(range(len(stream.train_labels)))
    assert clocks.server_known(tasks - 1) == tuple(range(stream.num_classes))
    assert sorted(c for s in range(tasks) for c in clocks.server_new(s)) == list(range(stream.num_classes))


@quick
@given(st.integers(2, 6), st.integers(1, 9), seeds, st.floats(0, 0.5), st.floats(0, 0.5))
def test_who_comes_stays_and_who_goes_is_gone(tasks: int, clients: int, seed: int, come: float, go: float) -> None:
    time = settings.Time(joining=come, leaving=go)
    try:
        there = presence(time, tasks, clients, seed)
    except UsageError as error:
        if "nobody is there" not in str(error):
            raise
        return
    rows = there or [[True] * clients] * tasks
    late = early = 0
    for client in range(clients):
        mine = [row[client] for row in rows]
        assert any(mine)
        first, last = mine.index(True), tasks - 1 - mine[::-1].index(True)
        assert all(mine[first : last + 1])
        late, early = late + (first > 0), early + (last < tasks - 1)
        assert first == 0 or last == tasks - 1
    assert abs(late - come * clients) <= 0.5 + 1e-9
    assert abs(early - go * clients) <= 0.5 + 1e-9


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), seeds)
def test_a_growing_federation(tasks: int, start: int, growth: int, seed: int) -> None:
    clients = start + growth * (tasks - 1)
    there = presence(settings.Time(start=start, growth=growth), tasks, clients, seed)
    rows = there or [[True] * clients] * tasks
    assert [sum(row) for row in rows] == [start + growth * stage for stage in range(tasks)]
    for before, after in pairwise(rows):
        assert all(b <= a for b, a in zip(before, after, strict=True))


@quick
@given(st.integers(1, 5), st.integers(2, 9), seeds, st.floats(0.01, 1))
def test_taking_part_in_a_task(tasks: int, clients: int, seed: int, share: float) -> None:
    there = presence(settings.Time(participation=share), tasks, clients, seed)
    for row in there or [[True] * clients] * tasks:
        assert sum(row) >= 1
        assert abs(sum(row) - max(1.0, share * clients)) <= 0.5 + 1e-9


def test_a_clock_stands_still_while_its_client_is_absent() -> None:
    there = [[True, False], [False, True], [True, True]]
    assert counted(there) == ((0, -1), (-1, 0), (1, 1))


def test_in_step_the_absent_miss_the_task_and_with_an_own_order_they_do_not() -> None:
    stream = stream_of(3)
    given_, time = dealt(stream, 4, 1), settings.Time(start=2, growth=1)
    common = clocked(given_, stream, time, 1)
    assert common.own_clocks is None
    for stage in range(3):
        for client in range(4):
            expected = given_.rows[stage][client] if client in common.present(stage) else []
            assert common.rows[stage][client].tolist() == list(expected)
    own = clocked(given_, stream, replace(time, order="asynchronous"), 1)
    assert own.clocks is not None
    assert [own.present(s) for s in range(3)] == [common.present(s) for s in range(3)]
    for client in range(4):
        order = own_order(replace(time, order="asynchronous"), 3, client, 1)
        held = [own.rows[s][client].tolist() for s in range(3) if client in own.present(s)]
        assert held == [given_.rows[task][client].tolist() for task in order[: len(held)]]
        assert own.clocks.known(0, client) == (() if client not in own.present(0) else stream.stages[order[0]].classes)


def test_everybody_in_step_is_the_split_as_it_was() -> None:
    stream = stream_of(3)
    split = dealt(stream, 4, 0)
    assert clocked(split, stream, settings.Time(), 0) is split


def test_personal_test_sets_follow_the_own_task() -> None:
    stream = stream_of(3)
    given_ = dealt(stream, 3, 5, test="same_mix")
    split = clocked(given_, stream, settings.Time(order="asynchronous", joining=0.34), 5)
    assert split.test is not None
    assert given_.test is not None
    assert split.clocks is not None
    for stage in range(3):
        for client in range(3):
            own = split.clocks.own[stage][client]
            expected = [] if own < 0 else given_.test[split.clocks.tasks[client][own]][client].tolist()
            assert split.test[stage][client].tolist() == expected


def test_a_bound_does_not_bring_back_the_absent() -> None:
    stream = stream_of(3)
    split = clocked(dealt(stream, 4, 1), stream, settings.Time(leaving=0.5), 1)
    rows = without_absent([[np.arange(3)] * 4] * 3, split)
    assert [[k for k in range(4) if len(stage[k])] for stage in rows] == [split.present(s) for s in range(3)]


def test_tasks_that_share_classes_are_tested_on_what_they_are_the_first_to_show() -> None:
    stream, time = blurry(), settings.Time(order="asynchronous")
    seed = next(s for s in range(50) if [own_order(time, 2, k, s) for k in range(2)] == [[0, 1], [1, 0]])
    clocks = clocked(dealt(stream, 2, seed), stream, time, seed).clocks
    assert clocks is not None
    assert clocks.tested == "classes"
    assert clocks.columns(0) == [(0, 1), (2,)]
    assert clocks.columns(1) == [(1, 2), (0,)]  # whoever begins with the second task learns class 1 there
    assert clocks.known(0, 1) == (1, 2)
    assert clocks.new(1, 1) == (0,)


def test_tasks_with_test_sets_of_their_own_keep_them() -> None:
    stream = stream_of(2)
    domains = replace(stream, stages=(stream.stages[0], replace(stream.stages[1], classes=())))
    clocks = clocked(dealt(domains, 2, 3), domains, settings.Time(order="asynchronous"), 3).clocks
    assert clocks is not None
    assert clocks.tested == "tasks"
    assert [clocks.columns(k) for k in range(2)] == [
        [(t,) for t in own_order(settings.Time(), 2, k, 3)] for k in (0, 1)
    ]


STORED = {"shuffled": "97d894ca88edc471", "lagged": "1111ed1d0ab38735", "in step": "33ddf1091ea89662"}


@pytest.mark.parametrize("kind", STORED)
def test_the_same_seed_is_the_same_schedule_on_every_machine(kind: str) -> None:
    stream = stream_of(4)
    time = settings.Time(joining=0.3, leaving=0.2, participation=0.8)
    order, how = ("common", "shuffled") if kind == "in step" else ("asynchronous", kind)
    split = clocked(dealt(stream, 5, 42), stream, replace(time, order=order, sequence=how), 42)
    assert digest(split) == STORED[kind]


REFUSED = {
    "more than there are": (settings.Time(start=3, growth=2), 5, 4, "must not lead to 9 clients in task 4"),
    "one task": (settings.Time(joining=0.5), 5, 1, "time.joining=0.5: must be 0 in a stream of one task"),
    "nobody": (settings.Time(joining=1.0), 2, 2, r"nobody is there in task 1\.?$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_presence_that_cannot_be(case: str) -> None:
    time, clients, tasks, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        presence(time, tasks, clients, 0)


def test_streams_that_cannot_have_own_clocks() -> None:
    stream, time = stream_of(2), settings.Time(order="asynchronous")
    known = replace(stream, task_known=True)
    with pytest.raises(UsageError, match="must be common with scenario given: heads belong to tasks of the stream"):
        clocked(dealt(stream, 2, 0), known, time, 0)
    again = replace(stream, stages=(stream.stages[0], replace(stream.stages[1], train_ids=np.arange(24))))
    with pytest.raises(UsageError, match="a task holds the images of earlier ones"):
        clocked(dealt(again, 2, 0), again, time, 0)


def test_the_table_says_who_is_where() -> None:
    stream = stream_of(3)
    split = clocked(dealt(stream, 3, 2), stream, settings.Time(order="asynchronous", joining=0.34), 2)
    assert split.clocks is not None
    (late,) = [k for k in range(3) if split.clocks.own[0][k] < 0]
    data = split_summary(split, stream)
    assert [task["own"] for task in data["tasks"]] == [
        [None if i < 0 else i for i in own_] for own_ in split.clocks.own
    ]
    assert data["tasks"][0]["empty"] == []
    table = split_table(split, stream)
    assert "Stage 1: " in table
    line = next(line for line in table.splitlines() if line.startswith("own task"))
    assert line.split()[2:] == ["-" if k == late else "1" for k in range(3)]
    assert f"stage 1: 1 client is absent: {late}" in split_warnings(split, stream)


def test_who_holds_nothing_new_and_who_never_sees_a_class() -> None:
    stream = blurry()
    held = ((np.array([0, 1]), np.array([2])), (np.array([3, 4]), np.array([5, 6])))
    split = replace(dealt(stream, 2, 0), train=held)
    lines = split_warnings(split, stream)
    assert "task 2: 1 client holds images, but none of a new class: 0" in lines
    assert "clients that never hold an image of some class (how many classes): 0 (1), 1 (1)" in lines
    assert split_notes(split, stream) == [
        "of 2 clients 1 without a new class in some task, 2 without a training image of some class in any task; "
        "see `fedcl split`"
    ]
    assert split_warnings(dealt(stream_of(2), 2, 0), stream_of(2)) == []
    assert split_notes(dealt(stream_of(2), 2, 0), stream_of(2)) == []
