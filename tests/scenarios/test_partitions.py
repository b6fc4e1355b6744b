"""Properties, statistics and limits of the partitions."""

from __future__ import annotations

import hashlib

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

RULES = [IID, Dirichlet, DirichletClient, Shards, ClassesPerClient, QuantitySkew, LabelQuantitySkew]
quick = hypothesis_settings(max_examples=60, deadline=None)


def digest(parts):
    text = ";".join(",".join(map(str, part.tolist())) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def balanced(classes, each):
    return np.tile(np.arange(classes, dtype=np.int64), each)


@st.composite
def cases(draw):
    rule = draw(st.sampled_from(RULES))
    labels = np.array(draw(st.lists(st.integers(0, 6), min_size=0, max_size=80)), dtype=np.int64)
    clients = draw(st.integers(1, 12))
    present = len(set(labels.tolist()))
    least = -(-present // clients)
    concentration = st.sampled_from([1e-300, 1e-9, 1e-3, 0.1, 1.0, 50.0, 1e9, 1e300])
    config = settings.Partition(
        name=rule.name,
        alpha=draw(concentration),
        skew=draw(concentration),
        balance=draw(st.booleans()),
        shards=draw(st.integers(1, 5)),
        classes=max(1, draw(st.integers(least, max(present, 1)))),
    )
    return rule(), labels, clients, config, draw(st.integers(0, 2**63))


@quick
@given(cases())
def test_disjoint_complete_ascending_and_repeatable(case):
    rule, labels, clients, config, seed = case
    parts = rule.split(labels, clients, config, seed, "partition", 0)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(labels)))
    again = rule.split(labels.copy(), clients, config, seed, "partition", 0)
    assert digest(parts) == digest(again)


@pytest.mark.parametrize("rule", RULES)
def test_another_seed_or_task_is_another_split_and_the_global_generator_is_not_used(rule):
    labels, config = balanced(5, 40), settings.Partition()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    splits = {digest(rule().split(labels, 4, config, seed, "partition", task)) for seed in (0, 1) for task in (0, 1)}
    assert len(splits) == 4
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


STORED = {
    "iid": "7e15fe720e7487cb",
    "dirichlet": "08e7ebf8d1424e6c",
    "dirichlet_client": "34724ea263a20329",
    "shards": "4fa5fdd3287472e1",
    "classes_per_client": "4606c234f2e8a31f",
    "quantity_skew": "976f549e8fe800f1",
    "label_quantity_skew": "c20a2f7d5dcd6fac",
}


@pytest.mark.parametrize("rule", RULES)
def test_splits_are_those_of_every_machine_and_numpy(rule):
    parts = rule().split(balanced(10, 50), 7, settings.Partition(min_size=1), 42, "partition", 2)
    assert digest(parts) == STORED[rule.name]


def test_dirichlet_shares_have_the_mean_and_variance_of_theory():
    clients, alpha, each, classes = 4, 0.5, 1000, 400
    labels = np.repeat(np.arange(classes, dtype=np.int64), each)
    parts = Dirichlet().split(labels, clients, settings.Partition(alpha=alpha), 0, "x")
    shares = np.stack([np.bincount(labels[part], minlength=classes) for part in parts]) / each
    theory = stats.dirichlet([alpha] * clients)
    error = np.sqrt(theory.var() / classes)
    assert (np.abs(shares.mean(axis=1) - theory.mean()) < 4 * error).all()
    # a share is Beta(alpha, (K - 1) alpha): the whole distribution, one client after the other
    for mine in shares:
        assert stats.kstest(mine, stats.beta(alpha, alpha * (clients - 1)).cdf).pvalue > 1e-3
    assert shares.var(axis=1) == pytest.approx(theory.var(), rel=0.25)


def test_quantity_skew_sizes_follow_the_beta_marginals_and_labels_stay_iid():
    sizes = np.array(
        [
            [len(p) for p in QuantitySkew().split(balanced(2, 500), 3, settings.Partition(skew=2.0), s, "x")]
            for s in range(300)
        ]
    )
    for client in range(3):
        assert stats.kstest(sizes[:, client] / 1000, stats.beta(2.0, 4.0).cdf).pvalue > 1e-3
    labels = balanced(4, 2000)
    parts = QuantitySkew().split(labels, 3, settings.Partition(skew=2.0), 0, "x")
    table = np.stack([np.bincount(labels[part], minlength=4) for part in parts])
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_label_and_quantity_skew_are_two_knobs():
    labels = balanced(5, 400)
    parts = LabelQuantitySkew().split(labels, 4, settings.Partition(skew=1e9, alpha=1e-3), 0, "x")
    assert all(abs(len(part) - 500) <= 1 for part in parts)
    first = np.bincount(labels[parts[0]], minlength=5)
    assert np.sort(first)[-2:].sum() == len(parts[0])
    parts = LabelQuantitySkew().split(labels, 4, settings.Partition(skew=0.3, alpha=1e9), 1, "x")
    sizes = [len(part) for part in parts]
    assert max(sizes) > 3 * min(sizes)
    largest = np.bincount(labels[parts[int(np.argmax(sizes))]], minlength=5) / max(sizes)
    assert np.abs(largest - 0.2).max() < 0.05


def test_dirichlet_client_first_client_follows_its_prior():
    labels, first = balanced(3, 300), []
    for seed in range(300):
        part = DirichletClient().split(labels, 9, settings.Partition(alpha=1.0), seed, "x")[0]
        first.append(np.bincount(labels[part], minlength=3) / len(part))
    observed = np.stack(first)
    theory = stats.dirichlet([1.0] * 3)
    # drawing 100 rows adds the multinomial's variance E[q (1 - q)] / 100 to that of q
    variance = theory.var() + (theory.mean() - theory.mean() ** 2 - theory.var()) / 100
    assert (np.abs(observed.mean(axis=0) - theory.mean()) < 4 * np.sqrt(variance / 300)).all()
    assert observed.var(axis=0) == pytest.approx(variance, rel=0.25)


@pytest.mark.parametrize("rule", [IID, DirichletClient])
def test_equal_quotas(rule):
    parts = rule().split(balanced(7, 15), 10, settings.Partition(alpha=0.05), 0, "x")
    assert [len(part) for part in parts] == [11] * 5 + [10] * 5


def test_large_alpha_is_even_and_small_alpha_gives_each_class_to_one_client():
    labels = balanced(6, 100)
    even = Dirichlet().split(labels, 4, settings.Partition(alpha=1e9), 0, "x")
    table = np.stack([np.bincount(labels[part], minlength=6) for part in even])
    assert (np.abs(table - 25) <= 1).all()
    lone = Dirichlet().split(labels, 4, settings.Partition(alpha=1e-9), 0, "x")
    table = np.stack([np.bincount(labels[part], minlength=6) for part in lone])
    assert sorted(table.max(axis=0).tolist()) == [100] * 6


@pytest.mark.parametrize("alpha", [1e-300, 0.01, 0.5])
def test_balancing_stops_clients_that_hold_their_mean_share(alpha):
    labels = np.sort(balanced(20, 30))
    for seed in range(5):
        plain = Dirichlet().split(labels, 5, settings.Partition(alpha=alpha), seed, "x")
        fair = Dirichlet().split(labels, 5, settings.Partition(alpha=alpha, balance=True), seed, "x")
        # below N / K = 120 before its last class of 30
        assert max(map(len, fair)) < 120 + 30
        assert max(map(len, fair)) <= max(map(len, plain))


def test_balancing_counts_a_client_at_exactly_the_mean_as_full():
    # each class goes to one client whole, so after the first class its holder has exactly N / K rows
    config = settings.Partition(alpha=1e-300, balance=True)
    for seed in range(8):
        parts = Dirichlet().split(balanced(2, 10), 2, config, seed, "x")
        assert [len(part) for part in parts] == [10, 10]


def test_shards_hold_few_labels():
    labels = balanced(10, 100)
    for part in Shards().split(labels, 10, settings.Partition(shards=2), 0, "x"):
        assert len(part) == 100
        assert len(np.unique(labels[part])) <= 2


@pytest.mark.parametrize(("clients", "each"), [(5, 6), (7, 3), (10, 1), (3, 10), (1, 10)])
def test_classes_per_client_covers_every_class_evenly(clients, each):
    labels = balanced(10, 60)
    for seed in range(10):
        parts = ClassesPerClient().split(labels, clients, settings.Partition(classes=each), seed, "x")
        table = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
        assert ((table > 0).sum(axis=1) == each).all()
        holders = (table > 0).sum(axis=0)
        assert holders.min() >= 1
        assert holders.max() - holders.min() <= 1
        held = [table[table[:, c] > 0, c] for c in range(10)]
        assert all(h.max() - h.min() <= 1 for h in held)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("labels", [[], [3], [3, 3], [2] * 9])
def test_fewer_rows_than_clients_and_one_class(rule, labels):
    config = settings.Partition(classes=1, shards=2)
    parts = rule().split(np.array(labels, dtype=np.int64), 6, config, 0, "x")
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(labels)))


@pytest.mark.parametrize("rule", [Dirichlet, QuantitySkew])
def test_min_size_is_reached(rule):
    config = settings.Partition(alpha=0.3, skew=0.3, min_size=12)
    parts = rule().split(balanced(10, 40), 8, config, 0, "x")
    assert min(map(len, parts)) >= 12


@pytest.mark.parametrize(
    ("rule", "options", "clients", "words"),
    [
        (Dirichlet, {"alpha": 0.0}, 3, ["partition.alpha", "0.0"]),
        (Dirichlet, {"alpha": -1.0}, 3, ["partition.alpha"]),
        (Dirichlet, {"alpha": float("nan")}, 3, ["partition.alpha", "nan"]),
        (Dirichlet, {"alpha": float("inf")}, 3, ["partition.alpha", "inf"]),
        (Dirichlet, {"alpha": 1e-310}, 3, ["partition.alpha", "1e-300"]),
        (DirichletClient, {"alpha": float("nan")}, 3, ["partition.alpha"]),
        (QuantitySkew, {"skew": float("nan")}, 3, ["partition.skew"]),
        (LabelQuantitySkew, {"skew": float("nan")}, 3, ["partition.skew"]),
        (LabelQuantitySkew, {"alpha": 0.0}, 3, ["partition.alpha"]),
        (Shards, {"shards": 0}, 3, ["partition.shards"]),
        (ClassesPerClient, {"classes": 0}, 3, ["partition.classes"]),
        (ClassesPerClient, {"classes": 6}, 3, ["partition.classes", "at most 5"]),
        (ClassesPerClient, {"classes": 1}, 3, ["partition.classes", "at least 2", "federation.clients=3"]),
        (IID, {}, 0, ["federation.clients"]),
        (IID, {"min_size": -1}, 3, ["partition.min_size"]),
        (IID, {"min_size": 34}, 3, ["partition.min_size", "at most 33", "federation.clients=3"]),
        (
            Dirichlet,
            {"alpha": 1e-6, "min_size": 15},
            6,
            ["partition.min_size=15", "partition.alpha=1e-06", "clients=6", "1000 draw", "balance"],
        ),
        (QuantitySkew, {"skew": 1e-3, "min_size": 15}, 6, ["partition.min_size", "partition.skew=0.001"]),
    ],
)
def test_settings_that_cannot_be_met_are_one_line(rule, options, clients, words):
    with pytest.raises(UsageError) as caught:
        rule().split(balanced(5, 20), clients, settings.Partition(**options), 0, "x")
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
