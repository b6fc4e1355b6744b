"""The server's own images: nobody else's, labelled or not, free of bytes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.partitioning import partition_stream
from fedcl.scenarios.partitions.dirichlet import Dirichlet
from fedcl.stream import Stage, Stream
from fedcl.streams.public import set_aside

if TYPE_CHECKING:
    from fedcl.run import RunResult

NOTHING = np.empty(0, np.int64)
Tiny = Callable[[Mapping[str, Any]], "RunResult"]


def stream_of(each: list[int], tasks: int = 2, again: bool = False) -> Stream:
    """Class c in task ``c % tasks``; with ``again`` the last task shows all images."""
    labels = np.repeat(np.arange(len(each)), each)
    rows = [np.flatnonzero(labels % tasks == t) for t in range(tasks)]
    if again:
        rows[-1] = np.arange(len(labels))
    stages = tuple(Stage(t, tuple(range(t, len(each), tasks)), rows[t], NOTHING, NOTHING) for t in range(tasks))
    return Stream("given", tuple(range(len(each))), stages, len(each), labels, NOTHING)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    each=st.lists(st.integers(4, 30), min_size=2, max_size=5), amount=st.sampled_from([1, 3, 0.25, 0.3, 0.9]),
    clients=st.integers(1, 4), seed=st.integers(0, 2**40), again=st.booleans(),
)  # fmt: skip
def test_the_servers_images_and_the_clients_are_the_streams(each, amount, clients, seed, again):
    stream = stream_of(each, again=again)
    try:
        left, public = set_aside(stream, amount, seed)
    except UsageError as error:  # what is left of a class in the task that shows it again
        if not (again and "in task 2" in str(error)):
            raise
        reject()
    split = partition_stream(left, Dirichlet(), settings.Partition(name="dirichlet"), clients, seed)
    servers = set(np.concatenate(public).tolist())
    assert len(servers) == sum(map(len, public))
    for before, rows, own in zip(stream.stages, split.rows, public, strict=True):
        held = np.concatenate(rows).tolist()
        assert not set(held) & servers
        assert sorted({*held, *(set(before.train_ids.tolist()) & servers)}) == before.train_ids.tolist()
        assert set(own.tolist()) <= set(before.train_ids.tolist())
    if not again:
        counts = np.bincount(stream.train_labels[sorted(servers)], minlength=len(each))
        assert counts.tolist() == [amount if amount >= 1 else int(amount * n + 1e-9) for n in each]
    repeated = set_aside(stream, amount, seed)[1]
    assert all((a == b).all() for a, b in zip(public, repeated, strict=True))


def test_nothing_is_taken_where_nothing_is_asked_for():
    stream = stream_of([5, 5])
    assert set_aside(stream, 0.0, 0) == (stream, None)


@pytest.mark.parametrize(("amount", "told"), [(5, "below 5: class 0 has 5 training images in task 1"),
                                              (0.1, "less than one image of every class")])  # fmt: skip
def test_what_cannot_be_taken_is_refused(amount, told):
    with pytest.raises(UsageError) as caught:
        set_aside(stream_of([5, 5]), amount, 0)
    assert told in str(caught.value)


LOOKS = """
def after_aggregate(self, server):
    public = server.public
    if public is None:
        SEEN.append(None)
    else:
        shapes = [tuple(x.shape) for x, _ in public.batches()]
        SEEN.append((server.task, public.ids.tolist(), public.labels.tolist(), public.new.tolist(), shapes))
    return server.arrays, server.state
"""


def test_the_server_sees_the_images_of_the_tasks_so_far(tiny: Tiny, plugin: Any) -> None:
    from fedcl.build import build
    from fedcl.config import load_config

    asked = plugin(LOOKS, **{"partition.public": 2, "federation.rounds": 1, "evaluate.batch_size": 8})
    result = tiny(asked)
    experiment = build(load_config(result.folder / "config.yaml"))
    first, second = (ids.tolist() for ids in experiment.split.public)
    labels = experiment.stream.train_labels
    (task, ids, named, new, shapes), (_, later, others, fresh, _) = plugin.seen(asked)
    assert (task, ids, named) == (0, first, labels[first].tolist())
    assert all(new)
    assert [shape[0] for shape in shapes] == [8, 2]
    assert later == sorted([*first, *second])
    assert others == labels[later].tolist()
    assert [i for i, n in zip(later, fresh, strict=True) if n] == second
    held = {i for task in experiment.split.rows for ids in task for i in ids.tolist()}
    assert not held & set(later)
    plain = tiny({**plugin(LOOKS), "federation.rounds": 1})
    assert (result.summary["bytes_up"], result.summary["bytes_down"]) == (
        plain.summary["bytes_up"], plain.summary["bytes_down"],
    )  # fmt: skip
    assert result.summary["split_sha256"] != plain.summary["split_sha256"]


@pytest.mark.parametrize("labels", [{"labels.public": False}, {"labels.rate": 0.5}])
def test_labels_of_the_servers_images(labels: dict[str, Any], tiny: Tiny, plugin: Any) -> None:
    asked = plugin(LOOKS, **{"partition.public": 2, "federation.rounds": 1, "scenario.tasks": 1, **labels})
    tiny(asked)
    ((_, _, named, _, _),) = plugin.seen(asked)
    assert (set(named) == {-1}) is ("labels.public" in labels)
    nothing = plugin(LOOKS, **{"federation.rounds": 1, "scenario.tasks": 1})
    tiny(nothing)
    assert plugin.seen(nothing) == [None]
