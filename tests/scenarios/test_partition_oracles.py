"""Every rule against a brute-force partitioner: pure-Python loops over the same raw words."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from fedcl import config as settings
from fedcl.scenarios.partitions.classes_per_client import ClassesPerClient
from fedcl.scenarios.partitions.dirichlet import Dirichlet
from fedcl.scenarios.partitions.dirichlet_client import DirichletClient
from fedcl.scenarios.partitions.iid import IID
from fedcl.scenarios.partitions.label_quantity_skew import LabelQuantitySkew
from fedcl.scenarios.partitions.quantity_skew import QuantitySkew
from fedcl.scenarios.partitions.shards import Shards


class Words:
    """The raw words of a named stream, one by one."""

    def __init__(self, *parts):
        text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        self.source = np.random.Philox(key=number)

    def word(self):
        return int(self.source.random_raw())

    def unit(self):
        return (self.word() // 2**11 + 1) / 2**53

    def below(self, bound):
        return self.word() * bound // 2**64

    def order(self, count):
        drawn = [self.word() for _ in range(count)]
        return sorted(range(count), key=lambda i: (drawn[i], i))

    def shuffled(self, items):
        items = list(items)
        for i in reversed(range(1, len(items))):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def log_gamma(self, shape):
        boosted = shape if shape >= 1 else shape + 1
        d = boosted - 1 / 3
        c = 1 / math.sqrt(9 * d)
        while True:
            length = math.sqrt(-2 * math.log(self.unit()))
            x = length * math.cos(2 * math.pi * self.unit())
            v = (1 + c * x) ** 3
            if v > 0 and math.log(self.unit()) < 0.5 * x * x + d - d * v + d * math.log(v):
                break
        result = math.log(d) + math.log(v)
        return result if shape >= 1 else result + math.log(self.unit()) / shape


def grid(logs, allowed):
    top = max(log for log, ok in zip(logs, allowed, strict=True) if ok)
    return [
        Fraction(round(math.exp(log - top) * 2**40)) if ok else Fraction(0)
        for log, ok in zip(logs, allowed, strict=True)
    ]


def cut(rows, shares):
    ends = [math.floor(len(rows) * sum(shares[: k + 1]) / sum(shares)) for k in range(len(shares))]
    return [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def even(rows, parts):
    out, start = [], 0
    for k in range(parts):
        size = len(rows) // parts + (1 if k < len(rows) % parts else 0)
        out.append(rows[start : start + size])
        start += size
    return out


def mixed_class(labels, label, *parts):
    rows = [i for i, y in enumerate(labels) if y == label]
    return [rows[i] for i in Words(*parts, "rows", label).order(len(rows))]


def brute_iid(labels, clients, config, *parts):
    return even(Words(*parts, "iid", "rows").order(len(labels)), clients)


def brute_dirichlet(labels, clients, config, *parts):
    for attempt in range(1000):
        words = Words(*parts, "dirichlet", "shares", attempt)
        held = [[] for _ in range(clients)]
        for label in sorted(set(labels)):
            logs = [words.log_gamma(config.alpha) for _ in range(clients)]
            fair = Fraction(len(labels), clients)
            allowed = [len(mine) < fair if config.balance else True for mine in held]
            rows = mixed_class(labels, label, *parts, "dirichlet")
            for mine, part in zip(held, cut(rows, grid(logs, allowed)), strict=True):
                mine.extend(part)
        if min(map(len, held)) >= config.min_size:
            return held
    raise AssertionError("not reached")


def brute_dirichlet_client(labels, clients, config, *parts):
    classes = sorted(set(labels))
    pools = {label: mixed_class(labels, label, *parts, "dirichlet_client") for label in classes}
    words = Words(*parts, "dirichlet_client", "shares")
    held = []
    for quota in (len(part) for part in even(range(len(labels)), clients)):
        logs = [words.log_gamma(config.alpha) for _ in classes]
        mine = []
        while len(mine) < quota:
            shares = grid(logs, [len(pools[label]) > 0 for label in classes])
            point = words.below(int(sum(shares)))
            pick = next(j for j in range(len(classes)) if sum(shares[: j + 1]) > point)
            mine.append(pools[classes[pick]].pop(0))
        held.append(mine)
    return held


def brute_shards(labels, clients, config, *parts):
    mixed = Words(*parts, "shards", "rows").order(len(labels))
    ordered = [i for label in sorted(set(labels)) for i in mixed if labels[i] == label]
    shards = even(ordered, clients * config.shards)
    for attempt in range(1000):
        order = Words(*parts, "shards", "order", attempt).order(len(shards))
        held = [[] for _ in range(clients)]
        for place, shard in enumerate(order):
            held[place // config.shards].extend(shards[shard])
        if min(map(len, held)) >= config.min_size:
            return held
    raise AssertionError("not reached")


def brute_classes_per_client(labels, clients, config, *parts):
    classes = sorted(set(labels))
    for attempt in range(1000):
        words = Words(*parts, "classes_per_client", "classes", attempt)
        cards, hands = [], []
        for _ in range(clients):
            hand = []
            while len(hand) < config.classes:
                fresh = [card for card in cards if card not in hand]
                if not fresh:
                    cards = cards + words.shuffled(range(len(classes)))
                    continue
                hand.append(fresh[0])
                cards.remove(fresh[0])
            hands.append(hand)
        held = [[] for _ in range(clients)]
        for j, label in enumerate(classes):
            order = words.shuffled([k for k in range(clients) if j in hands[k]])
            sizes = dict(zip(order, map(len, even(range(labels.count(label)), len(order))), strict=True))
            rows = mixed_class(labels, label, *parts, "classes_per_client")
            for k in sorted(order):
                held[k].extend(rows.pop(0) for _ in range(sizes[k]))
        if min(map(len, held)) >= config.min_size:
            return held
    raise AssertionError("not reached")


def brute_quantity_skew(labels, clients, config, *parts):
    for attempt in range(1000):
        words = Words(*parts, "quantity_skew", "shares", attempt)
        shares = grid([words.log_gamma(config.skew) for _ in range(clients)], [True] * clients)
        held = cut(Words(*parts, "quantity_skew", "rows").order(len(labels)), shares)
        if min(map(len, held)) >= config.min_size:
            return held
    raise AssertionError("not reached")


def brute_label_quantity_skew(labels, clients, config, *parts):
    classes = sorted(set(labels))
    for attempt in range(1000):
        words = Words(*parts, "label_quantity_skew", "sizes", attempt)
        shares = grid([words.log_gamma(config.skew) for _ in range(clients)], [True] * clients)
        sizes = [len(part) for part in cut(range(len(labels)), shares)]
        if min(sizes) >= config.min_size:
            break
    pools = {label: mixed_class(labels, label, *parts, "label_quantity_skew") for label in classes}
    words = Words(*parts, "label_quantity_skew", "mixes")
    counts = []
    left = {label: len(pools[label]) for label in classes}
    for size in sizes:
        logs = [words.log_gamma(config.alpha) for _ in classes]
        mine = dict.fromkeys(classes, 0)
        for _ in range(size):
            mix = grid(logs, [left[label] > 0 for label in classes])
            point = words.below(int(sum(mix)))
            pick = classes[next(j for j in range(len(classes)) if sum(mix[: j + 1]) > point)]
            mine[pick] += 1
            left[pick] -= 1
        counts.append(mine)
    return [[pools[label].pop(0) for label in classes for _ in range(mine[label])] for mine in counts]


RULES = [
    (IID, brute_iid, {}),
    (Dirichlet, brute_dirichlet, {"alpha": 0.3}),
    (Dirichlet, brute_dirichlet, {"alpha": 0.01}),
    (Dirichlet, brute_dirichlet, {"alpha": 3.0, "min_size": 10}),
    (Dirichlet, brute_dirichlet, {"alpha": 0.2, "balance": True, "min_size": 2}),
    (Dirichlet, brute_dirichlet, {"alpha": 1e-4, "balance": True}),
    (DirichletClient, brute_dirichlet_client, {"alpha": 0.4}),
    (DirichletClient, brute_dirichlet_client, {"alpha": 1e-3}),
    (Shards, brute_shards, {"shards": 2}),
    (Shards, brute_shards, {"shards": 40, "min_size": 15}),
    (ClassesPerClient, brute_classes_per_client, {"classes": 2}),
    (ClassesPerClient, brute_classes_per_client, {"classes": 3, "min_size": 4}),
    (LabelQuantitySkew, brute_label_quantity_skew, {"skew": 0.7, "alpha": 0.3}),
    (LabelQuantitySkew, brute_label_quantity_skew, {"skew": 1.5, "alpha": 1e-3, "min_size": 6}),
    (QuantitySkew, brute_quantity_skew, {"skew": 0.7}),
    (QuantitySkew, brute_quantity_skew, {"skew": 2.0, "min_size": 8}),
]


@pytest.mark.parametrize(("rule", "brute", "options"), RULES)
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_brute_force_partitioner(rule, brute, options, seed):
    sizes = [(17, 30, 5, 41), (50, 1, 60), (33, 33, 33, 33, 34)][seed % 3]
    labels = [int(y) for y in np.repeat(np.arange(len(sizes)) * 3 + 1, sizes)]
    labels = [labels[i] for i in Words(seed, "mix").order(len(labels))]
    clients = 5
    config = settings.Partition(name=rule.name, **options)
    ours = rule().split(np.array(labels, dtype=np.int64), clients, config, seed, "partition", 3)
    theirs = brute(labels, clients, config, seed, "partition", 3)
    assert [part.tolist() for part in ours] == [sorted(part) for part in theirs]
