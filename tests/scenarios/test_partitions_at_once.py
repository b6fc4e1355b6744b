"""Rules that split all tasks at once: domains, writers, a long tail."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.partitioning import partition_stream
from fedcl.scenarios.partitions.dirichlet import Dirichlet
from fedcl.scenarios.partitions.feature_shift import FeatureShift
from fedcl.scenarios.partitions.iid import IID
from fedcl.scenarios.partitions.long_tail_dirichlet import LongTailDirichlet
from fedcl.scenarios.partitions.natural import Natural
from fedcl.stream import Stage, Stream

NOTHING = np.empty(0, np.int64)
quick = hypothesis_settings(max_examples=60, deadline=None)


class Words:
    """The raw words of a named stream, one by one."""

    def __init__(self, *parts):
        text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        self.source = np.random.Philox(key=number)

    def order(self, count):
        drawn = [int(self.source.random_raw()) for _ in range(count)]
        return sorted(range(count), key=lambda i: (drawn[i], i))


def stream_of(labels, tasks, out=()):
    """Each class to one task, ``class % tasks``; rows in ``out`` are in no task, as validation rows are."""
    labels = np.asarray(labels, dtype=np.int64)
    count = int(labels.max()) + 1
    kept = ~np.isin(np.arange(len(labels)), np.asarray(out, dtype=np.int64))
    stages = tuple(
        Stage(t, tuple(range(t, count, tasks)), np.flatnonzero((labels % tasks == t) & kept), NOTHING, NOTHING)
        for t in range(tasks)
    )
    return Stream("given", tuple(range(count)), stages, count, labels, NOTHING)


def split(rule, stream, clients, seed=0, columns=None, **config):
    return partition_stream(stream, rule(), settings.Partition(name=rule.name, **config), clients, seed, columns)


def digest(parts):
    text = ";".join(",".join(map(str, rows.tolist())) for task in parts.rows for rows in task)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@st.composite
def cases(draw):
    rule = draw(st.sampled_from([FeatureShift, Natural]))
    tasks = draw(st.integers(1, 3))
    rows = draw(st.integers(tasks, 90))
    labels = np.arange(rows) % (tasks * draw(st.integers(1, max(1, rows // tasks))))
    values = np.array(draw(st.lists(st.integers(-3, 5), min_size=rows, max_size=rows)), dtype=np.int64)
    out = draw(st.sets(st.integers(0, rows - 1), max_size=rows // 4))
    used = len(np.unique(np.delete(values, sorted(out))))
    clients = draw(st.integers(used, used + 6) if rule is FeatureShift else st.integers(1, used))
    return rule, stream_of(labels, tasks, sorted(out)), values, clients, draw(st.integers(0, 2**63 - 1))


@quick
@given(cases())
def test_disjoint_complete_and_what_belongs_together_stays_together(case):
    rule, stream, values, clients, seed = case
    options = {"column": "mine"}
    found = split(rule, stream, clients, seed, {"other": values[::-1].copy(), "mine": values}, **options)
    seen = [set() for _ in range(clients)]
    for task, stage in zip(found.rows, stream.stages, strict=True):
        assert all((np.diff(rows) > 0).all() for rows in task)
        assert np.sort(np.concatenate(task)).tolist() == stage.train_ids.tolist()
        for mine, rows in zip(seen, task, strict=True):
            mine.update(values[rows].tolist())
    used = {v for stage in stream.stages for v in values[stage.train_ids].tolist()}
    if rule is FeatureShift:
        assert all(len(mine) <= 1 for mine in seen)
    else:
        # every value has one holder, and all holders about equally many values
        assert sorted(v for mine in seen for v in mine) == sorted(used)
        assert max(map(len, seen)) - min(map(len, seen)) <= 1
    again = split(rule, stream, clients, seed, {"mine": values.copy()}, **options)
    assert digest(found) == digest(again)


def brute_feature_shift(values, clients, *parts):
    domains = sorted(set(values))
    order = Words(*parts, "feature_shift", "clients").order(clients)
    held = [[] for _ in range(clients)]
    for j, domain in enumerate(domains):
        mine = [client for i, client in enumerate(order) if i % len(domains) == j]
        rows = [i for i, value in enumerate(values) if value == domain]
        rows = [rows[i] for i in Words(*parts, "feature_shift", "rows", domain).order(len(rows))]
        more = set(mine[: len(rows) % len(mine)])
        each = len(rows) // len(mine)
        for client in sorted(mine):
            held[client] += [rows.pop(0) for _ in range(each + (client in more))]
    return held


def brute_natural(values, clients, *parts):
    kinds = sorted(set(values))
    order = Words(*parts, "natural", "values", 0).order(len(kinds))
    held = [[] for _ in range(clients)]
    client, room = 0, len(kinds) // clients + (len(kinds) % clients > 0)
    for place in order:
        if not room:
            client += 1
            room = len(kinds) // clients + (client < len(kinds) % clients)
        room -= 1
        held[client] += [i for i, value in enumerate(values) if value == kinds[place]]
    return held


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("rule", "brute", "kinds", "clients"),
    [
        (FeatureShift, brute_feature_shift, 3, 7),
        (FeatureShift, brute_feature_shift, 4, 4),
        (Natural, brute_natural, 9, 4),
        (Natural, brute_natural, 5, 5),
        (Natural, brute_natural, 6, 1),
    ],
)
def test_equals_the_brute_force_partitioner(rule, brute, kinds, clients, seed):
    values = [i * 7 % kinds * 10 for i in Words(seed, "mix").order(80)]
    config = settings.Partition(column="c")
    ours = rule().split(np.array(values, dtype=np.int64), clients, config, seed, "partition")
    assert [part.tolist() for part in ours] == [sorted(part) for part in brute(values, clients, seed, "partition")]


@pytest.mark.parametrize("tail", ["shuffled", "ordered"])
@pytest.mark.parametrize("seed", range(4))
def test_the_long_tail_equals_brute_force(tail, seed):
    labels = [i % 5 for i in Words(seed, "mix").order(200)] + [4] * 9
    imbalance, clients = 8.0, 3
    parts = (seed, "partition")
    ranks = Words(*parts, "long_tail", "ranks").order(5) if tail == "shuffled" else range(5)
    kept = []
    for rank, label in enumerate(ranks):
        rows = [i for i, y in enumerate(labels) if y == label]
        size = int(40 / imbalance ** (rank / 4) + 1e-6)
        kept += [rows[i] for i in Words(*parts, "long_tail", "rows", label).order(len(rows))[:size]]
    kept.sort()
    config = settings.Partition(alpha=0.4, imbalance=imbalance, tail=tail)
    inner = Dirichlet().split(np.array(labels)[kept], clients, config, *parts)
    ours = LongTailDirichlet().split(np.array(labels, dtype=np.int64), clients, config, *parts)
    assert [part.tolist() for part in ours] == [[kept[i] for i in part] for part in inner]


@quick
@given(
    st.integers(1, 8), st.integers(1, 40), st.floats(1, 40), st.sampled_from(["shuffled", "ordered"]), st.integers(0)
)
def test_the_profile_of_the_tail(classes, each, imbalance, tail, seed):
    imbalance = min(imbalance, float(each))
    stream = stream_of(np.tile(np.arange(classes), each), min(classes, 2))
    config = {"alpha": 0.5, "imbalance": imbalance, "tail": tail}
    found = split(LongTailDirichlet, stream, 3, seed % 2**63, **config)
    rows = np.concatenate([ids for task in found.rows for ids in task])
    assert len(np.unique(rows)) == len(rows)
    sizes = found.counts().sum(axis=(0, 1)).tolist()
    expected = [math.floor(each / imbalance ** (r / max(1, classes - 1)) + 1e-6) for r in range(classes)]
    assert (sizes if tail == "ordered" else sorted(sizes, reverse=True)) == expected


STORED = {
    "feature_shift": "ccd951e2c3b7a4be",
    "natural": "b710bd052adcf072",
    "long_tail_dirichlet": "8323465595495d3b",
}


@pytest.mark.parametrize("rule", [FeatureShift, Natural, LongTailDirichlet])
def test_splits_are_those_of_every_machine_and_numpy(rule):
    stream = stream_of(np.tile(np.arange(10), 50), 2)
    column = np.arange(500) // 7 % 6
    assert digest(split(rule, stream, 6, 42, {"domain": column}, column="domain", imbalance=20)) == STORED[rule.name]


def test_the_same_client_holds_a_writer_in_every_task():
    writers = np.arange(120) % 4
    found = split(Natural, stream_of(np.arange(120) // 4 % 6, 3), 4, columns={"writer": writers}, column="writer")
    for client in range(4):
        assert {int(writers[i]) for task in found.rows for i in task[client]} == {
            int(writers[found.rows[0][client][0]])
        }


@pytest.mark.parametrize(
    ("rule", "clients", "options", "words"),
    [
        (FeatureShift, 2, {}, ["federation.clients=2", "at least 3", "domain"]),
        (FeatureShift, 5, {"column": "sites"}, ["partition.column='sites'", "domain, writer"]),
        (Natural, 3, {}, ["partition.column=''", "natural"]),
        (Natural, 6, {"column": "writer"}, ["federation.clients=6", "at most 5", "writer"]),
        (Natural, 5, {"column": "writer", "min_size": 13}, ["partition.min_size=13", "at most 12"]),
        (Natural, 5, {"column": "uneven", "min_size": 12}, ["partition.min_size=12", "partition.column=uneven"]),
        (LongTailDirichlet, 3, {"imbalance": 11.0}, ["partition.imbalance=11.0", "10 training images"]),
        (LongTailDirichlet, 3, {"imbalance": 0.5}, ["partition.imbalance=0.5"]),
        (LongTailDirichlet, 3, {"alpha": 0.0, "imbalance": 2}, ["partition.alpha"]),
        (IID, 3, {"held_out": 3}, ["partition.held_out=3", "federation.clients=3"]),
        (IID, 3, {"held_out": 0.9}, ["partition.held_out=0.9"]),
    ],
)
def test_settings_that_cannot_be_met_are_one_line(rule, clients, options, words):
    stream = stream_of(np.tile(np.arange(6), 10), 2)
    columns = {"domain": np.arange(60) % 3, "writer": np.arange(60) % 5, "uneven": np.minimum(np.arange(60), 4)}
    with pytest.raises(UsageError) as caught:
        split(rule, stream, clients, columns=columns, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


def test_a_dataset_without_columns_says_so():
    with pytest.raises(UsageError, match="it has none"):
        split(FeatureShift, stream_of(np.tile(np.arange(4), 5), 2), 4)


def test_feature_shift_and_natural_run_on_columns_of_a_file(tiny, tmp_path):
    images = (np.arange(40)[:, None, None] * 5 + np.arange(16).reshape(1, 4, 4)).astype(np.uint8)
    labels = np.arange(40) % 4
    np.savez(
        tmp_path / "sites.npz",
        train_x=images, train_y=labels, test_x=images, test_y=labels, train_site=labels // 2 + np.arange(40) % 2,
        test_site=labels // 2,
    )  # fmt: skip
    base = {"data.name": str(tmp_path / "sites.npz"), "partition.column": "site", "partition.min_size": 0}
    for name in ("natural", "feature_shift"):
        summary = tiny({**base, "partition.name": name, "federation.clients": 3}).summary
        assert (summary["status"], summary["num_clients"]) == ("done", 3)


@pytest.mark.parametrize(("given", "words"), [("held_out=1.5", "whole number"), ("tail=head", "shuffled, ordered")])
def test_wrong_values_are_refused_before_anything_is_read(given, words):
    from fedcl.config import load_config

    with pytest.raises(UsageError, match=words) as caught:
        load_config({}, [f"partition.{given}"])
    assert caught.value.key == f"partition.{given.partition('=')[0]}"
