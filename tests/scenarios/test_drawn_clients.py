"""Clients that draw what they hold (partition.size): purity, sizes, and the distributions that are promised."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.scenarios.partitions.classes_per_client import ClassesPerClient
from fedcl.scenarios.partitions.dirichlet import Dirichlet
from fedcl.scenarios.partitions.dirichlet_client import DirichletClient
from fedcl.scenarios.partitions.iid import IID
from fedcl.scenarios.partitions.label_quantity_skew import LabelQuantitySkew
from fedcl.scenarios.partitions.quantity_skew import QuantitySkew
from fedcl.scenarios.partitions.shards import Shards
from fedcl.stream import Stage, Stream
from fedcl.streams.population import can_draw, draw_population

RULES = [IID, Dirichlet, DirichletClient, ClassesPerClient, QuantitySkew, LabelQuantitySkew]
MILLION = 10**6
NOTHING = np.empty(0, np.int64)
quick = hypothesis_settings(max_examples=60, deadline=None)


def stream_of(labels, tasks=1):
    """Each class to one task, ``class % tasks``; the rows of a task are not contiguous."""
    labels = np.asarray(labels, dtype=np.int64)
    count = int(labels.max()) + 1
    stages = tuple(
        Stage(t, tuple(range(t, count, tasks)), np.flatnonzero(labels % tasks == t), NOTHING, NOTHING)
        for t in range(tasks)
    )
    return Stream("given", tuple(range(count)), stages, count, labels, NOTHING)


def drawn(rule, labels, tasks=1, clients=MILLION, seed=0, **config):
    return draw_population(stream_of(labels, tasks), rule(), settings.Partition(**config), clients, seed)


def table(split, clients):
    """(clients, classes) counts of the first task."""
    return np.stack([np.bincount(split.train_labels[split.train[0][c]], minlength=split.num_classes) for c in clients])


@st.composite
def cases(draw):
    rule = draw(st.sampled_from(RULES))
    tasks = draw(st.integers(1, 2))
    each = draw(st.lists(st.integers(4, 30), min_size=2 * tasks, max_size=8))
    labels = np.repeat(np.arange(len(each)), each)[::-1]
    concentration = st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 50.0, 1e300])
    config = {
        "size": draw(st.integers(1, 4)),
        "alpha": draw(concentration),
        "skew": draw(st.sampled_from([0.1, 1.0, 1e9])),
        "classes": draw(st.integers(1, 2)),
    }
    clients = draw(st.lists(st.integers(0, MILLION - 1), min_size=1, max_size=6))
    return rule, labels, tasks, config, clients, draw(st.integers(0, 2**63 - 1))


@quick
@given(cases())
def test_a_client_is_a_pure_function_of_seed_task_and_number(case):
    rule, labels, tasks, config, clients, seed = case
    split = drawn(rule, labels, tasks, seed=seed, **config)
    found = {(t, c): split.train[t][c] for t in range(tasks) for c in clients}
    again = drawn(rule, labels, tasks, seed=seed, **config)  # nothing in its memory, asked in another order
    for (task, client), rows in reversed(found.items()):
        assert again.size(task, client) == len(rows)
        assert again.train[task][client].tolist() == rows.tolist()
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()  # ascending, so none twice
        assert (labels[rows] % tasks == task).all()
        if not issubclass(rule, QuantitySkew):
            assert len(rows) == config["size"]


STORED = {
    "iid": "b1e4dcfb0d865b66",
    "dirichlet": "edeab2827f149224",
    "dirichlet_client": "b77bce5318db0627",
    "classes_per_client": "586b007562482b5b",
    "quantity_skew": "f57e644a55e06fd2",
    "label_quantity_skew": "93e9ba6e8a7781c4",
}


def digest(split):
    rows = [split.train[task][client].tolist() for task in range(2) for client in (0, 77, 999_999)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize("rule", RULES)
def test_clients_are_those_of_every_machine_and_numpy(rule):
    split = drawn(rule, np.tile(np.arange(10), 50), 2, seed=42, size=20, classes=3)
    assert digest(split) == STORED[rule.name]


def test_another_process_draws_the_same():
    code = (
        "import numpy as np, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_drawn_clients import *\n"
        "print(digest(drawn(Dirichlet, np.tile(np.arange(10), 50), 2, seed=42, size=20, classes=3)))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == STORED["dirichlet"]


@pytest.mark.parametrize("rule", RULES)
def test_seed_task_client_and_nothing_else_decide(rule):
    labels = np.tile(np.arange(4), 100)
    config = {"size": 30, "classes": 2}
    rows = {
        tuple(drawn(rule, labels, 2, seed=seed, **config).train[task][client] // 2)
        for seed in (0, 1)
        for task in (0, 1)
        for client in (0, 1)
    }
    assert len(rows) == 8
    few = drawn(rule, labels, 2, clients=3, **config)
    assert few.train[1][2].tolist() == drawn(rule, labels, 2, **config).train[1][2].tolist()


def test_iid_takes_every_row_equally_often():
    split = drawn(IID, np.repeat([0, 1], [10, 30]), size=5)
    taken = np.bincount(np.concatenate([split.train[0][c] for c in range(4000)]), minlength=40)
    assert stats.chisquare(taken).pvalue > 1e-3


@pytest.mark.parametrize("rule", [Dirichlet, DirichletClient])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_label_mixes_follow_the_dirichlet_distribution(rule, alpha):
    classes, size, clients = 5, 400, 600
    split = drawn(rule, np.tile(np.arange(classes), 4000), size=size, alpha=alpha)
    shares = table(split, range(clients)) / size
    theory = stats.dirichlet_multinomial([alpha] * classes, size)
    error = np.sqrt(np.diag(theory.cov()) / clients) / size
    assert (np.abs(shares.mean(axis=0) - 1 / classes) < 4 * error).all()
    assert shares.var(axis=0) == pytest.approx(np.diag(theory.cov()) / size**2, rel=0.25)
    for column in range(classes):
        exact = stats.betabinom(size, alpha, alpha * (classes - 1))
        uniform = exact.cdf(np.round(shares[:, column] * size)) - exact.pmf(np.round(shares[:, column] * size)) / 2
        assert abs(uniform.mean() - 0.5) < 4 / np.sqrt(12 * clients)


def test_only_dirichlet_weighs_the_mix_by_the_sizes_of_the_classes():
    labels = np.repeat([0, 1], [3000, 1000])
    by_size = table(drawn(Dirichlet, labels, size=200, alpha=1e9), range(50)).sum(axis=0) / 10_000
    alike = table(drawn(DirichletClient, labels, size=200, alpha=1e9), range(50)).sum(axis=0) / 10_000
    assert by_size == pytest.approx([0.75, 0.25], abs=0.02)
    assert alike == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_class_that_runs_out_is_followed_by_the_others():
    counts = table(drawn(DirichletClient, np.repeat([0, 1], [5, 95]), size=90, alpha=1.0), range(30))
    assert (counts[:, 0] <= 5).all()
    assert (counts.sum(axis=1) == 90).all()


def test_classes_per_client_deals_even_hands_of_equally_likely_classes():
    counts = table(drawn(ClassesPerClient, np.tile(np.arange(6), 40), size=11, classes=2), range(1500))
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert {tuple(sorted(row[row > 0].tolist())) for row in counts} == {(5, 6)}
    assert stats.chisquare((counts > 0).sum(axis=0)).pvalue > 1e-3
    assert stats.chisquare((counts == 6).sum(axis=0)).pvalue > 1e-3


def test_quantity_skew_draws_gamma_sizes():
    split = drawn(QuantitySkew, np.tile(np.arange(2), 20_000), size=1000, skew=2.0)
    sizes = [split.size(0, c) for c in range(800)]
    assert stats.kstest(sizes, stats.gamma(2.0, scale=500.0).cdf).pvalue > 1e-3
    assert [len(split.train[0][c]) for c in range(5)] == sizes[:5]
    bounded = drawn(QuantitySkew, np.tile(np.arange(2), 600), size=1000, skew=2.0, min_size=300)
    assert all(300 <= bounded.size(0, c) <= 1200 for c in range(200))


def test_a_population_cannot_be_enumerated():
    split = drawn(IID, np.tile(np.arange(2), 20), 1, size=3)
    clients = split.train[0]
    assert len(clients) == split.clients == MILLION
    for enumerate_it in (list, iter, reversed, enumerate, sorted, lambda them: 3 in them):
        with pytest.raises(TypeError):
            enumerate_it(clients)
    for whole in ("rows", "empty"):
        with pytest.raises(TypeError, match="not enumerated"):
            getattr(split, whole)
    with pytest.raises(TypeError, match="not enumerated"):
        split.counts()
    for outside in (-1, MILLION):
        with pytest.raises(IndexError):
            clients[outside]
        with pytest.raises(IndexError):
            split.size(0, outside)
    some = split.only([5, 3])
    assert [rows.tolist() for rows in some.rows[0]] == [clients[5].tolist(), clients[3].tolist()]
    assert some.counts().sum() == 6


def test_what_cannot_be_drawn_is_refused():
    labels = np.repeat([0, 1], [30, 7])
    with pytest.raises(
        UsageError,
        match=r"partition.size=5.*shards.*dirichlet, dirichlet_client, iid, label_quantity_skew, quantity_skew",
    ):
        drawn(Shards, labels, size=5)
    assert not can_draw(Shards)
    with pytest.raises(UsageError, match="at most 37: task 1 has 37"):
        drawn(IID, labels, size=38)
    drawn(IID, labels, size=37)
    with pytest.raises(UsageError, match="at most 14: the smallest class of a task has 7"):
        drawn(ClassesPerClient, labels, size=15, classes=2)
    drawn(ClassesPerClient, labels, size=14, classes=2)
    with pytest.raises(UsageError, match=r"partition.classes=3"):
        drawn(ClassesPerClient, labels, size=3, classes=3)
    with pytest.raises(UsageError, match=r"raise partition.skew"):
        drawn(QuantitySkew, labels, size=10, min_size=1, skew=1e-9)
    with pytest.raises(UsageError, match=r"partition.alpha"):
        drawn(Dirichlet, labels, size=3, alpha=float("nan"))


def test_the_rule_says_all_that_decides():
    labels = np.tile(np.arange(2), 20)
    base = drawn(IID, labels, size=3)
    others = [
        drawn(IID, labels, size=4), drawn(IID, labels, size=3, seed=1), drawn(IID, labels, size=3, clients=9),
        drawn(Dirichlet, labels, size=3), drawn(IID, labels, size=3, alpha=0.1),
    ]  # fmt: skip
    assert base.rule == drawn(IID, labels, size=3).rule
    assert len({base.rule, *(other.rule for other in others)}) == 6
    assert replace(base, rule="").rule == base.only([1]).rule == ""
