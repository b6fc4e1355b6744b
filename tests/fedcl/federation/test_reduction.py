"""Reductions against their formulas, however the clients are spread over nodes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcl.errors import RunFailed
from fedcl.federation.reduction import RULES, SUMS, Reducer
from fedcl.strategy import Reduction

WEIGHTS = [3.0, 1.0, 7.0, 2.0]


def arrays(dtype: torch.dtype, clients: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(clients, 2, 3, generator=generator, dtype=torch.float64) * 10
    return list(drawn.to(dtype))


def literal(rule: Reduction, parts: list[Tensor], weights: list[float]) -> np.ndarray:
    """The rule by its formula in float64; integers by Python's own floor division."""
    rows = np.stack([p.double().numpy() for p in parts])
    w = np.array(weights)[:, None, None]
    value = {
        "sum": lambda: rows.sum(axis=0),
        "mean": lambda: rows.mean(axis=0),
        "masked_mean": lambda: rows.mean(axis=0),
        "weighted_mean": lambda: (w * rows).sum(axis=0) / w.sum(),
        "max": lambda: rows.max(axis=0),
        "min": lambda: rows.min(axis=0),
        "stack": lambda: rows,
    }[rule]()
    return value if parts[0].dtype.is_floating_point else np.floor(value)


def reduce(rule: Reduction, parts: list[Tensor], weights: list[float], nodes: list[list[int]]) -> Tensor:
    """Through nodes: each reduces its own clients, the server merges the partials."""
    server = Reducer({"a": rule})
    for clients in nodes:
        node = Reducer({"a": rule})
        for client in clients:
            node.add({"a": parts[client]}, weights[client])
        server.merge(*node.partial())
    return server.result()["a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("rule", RULES)
def test_rule_is_its_formula(rule: Reduction, dtype: torch.dtype) -> None:
    parts = arrays(dtype)
    got = reduce(rule, parts, WEIGHTS, [[0, 1, 2, 3]])
    assert got.dtype == dtype
    assert np.allclose(
        got.double().numpy(), literal(rule, parts, WEIGHTS), rtol=1e-6 if dtype == torch.float32 else 1e-13
    )


def test_a_masked_mean_is_over_those_who_send_an_entry() -> None:
    nan = float("nan")
    parts = [torch.tensor([1.0, nan, nan]), torch.tensor([3.0, 5.0, nan]), torch.tensor([nan, 8.0, nan])]
    for nodes in ([[0, 1, 2]], [[0], [1, 2]], [[2], [0], [1]]):
        found = reduce("masked_mean", parts, [1.0, 10.0, 100.0], nodes)
        assert found[:2].tolist() == [2.0, 6.5]
        assert bool(found[2].isnan())
    assert torch.equal(reduce("masked_mean", [torch.arange(3.0)] * 2, [1.0, 1.0], [[0], [1]]), torch.arange(3.0))


def test_means_of_integers_are_floored_below_zero_too() -> None:
    parts = [torch.tensor([-1, 3]), torch.tensor([0, 4])]
    assert reduce("mean", parts, [1.0, 1.0], [[0, 1]]).tolist() == [-1, 3]
    assert reduce("weighted_mean", parts, [1.0, 3.0], [[0, 1]]).tolist() == [-1, 3]


def test_large_integer_sums_are_exact() -> None:
    parts = [torch.tensor([2**60]), torch.tensor([1])]
    assert reduce("sum", parts, [1.0, 1.0], [[0], [1]]).tolist() == [2**60 + 1]


def test_weights_count_for_weighted_means_only() -> None:
    parts = arrays(torch.float64)
    for rule in ("sum", "mean", "max", "min"):
        assert torch.equal(reduce(rule, parts, WEIGHTS, [[0, 1, 2, 3]]), reduce(rule, parts, [1.0] * 4, [[0, 1, 2, 3]]))


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    seed=st.integers(0, 50),
)
def test_any_spread_over_nodes_equals_one_node(rule: Reduction, dtype: torch.dtype, cuts: list[int], seed: int) -> None:
    clients = 6
    parts = list(
        (torch.randn(clients, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9).to(dtype)
    )
    weights = [float(1 + (seed * 7 + k * 13) % 40) for k in range(clients)]
    edges = [0, *sorted(cuts), clients]
    nodes = [list(range(a, b)) for a, b in itertools.pairwise(edges)]  # some may be empty
    whole = reduce(rule, parts, weights, [list(range(clients))])
    spread = reduce(rule, parts, weights, nodes)
    if rule in ("max", "min", "stack") or (rule == "sum" and dtype == torch.int64):
        assert torch.equal(whole, spread)
    else:
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.int64: 0.0}[dtype]
        assert torch.allclose(whole.double(), spread.double(), rtol=tolerance, atol=tolerance)


SCALES = {torch.float32: 12, torch.float64: 7}
"""Powers of ten, up and down, between the numbers of one sum: together they are wider than one float64."""


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[torch.dtype, list[Tensor], list[float]]:
    """Clients' arrays whose numbers differ wildly in magnitude, some of which cancel, and whole weights."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    count = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    powers = torch.randint(-SCALES[dtype], SCALES[dtype] + 1, (count, 7), generator=generator)
    drawn = torch.randn(count, 7, generator=generator, dtype=torch.float64) * 10.0**powers
    drawn[-1, :3] = -drawn[0, :3] * draw(st.sampled_from([1.0, 1.0 + 2.0**-20]))
    weights = draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    return dtype, list(drawn.to(dtype)), [float(w) for w in weights]


def exact(rule: Reduction, parts: list[Tensor], weights: list[float]) -> Tensor:
    """The rule with sums rounded once, from the terms in float64."""
    factors = weights if rule == "weighted_mean" else [1.0] * len(parts)
    rows = [(p.double() * f).tolist() for p, f in zip(parts, factors, strict=True)]
    sums = torch.tensor([math.fsum(column) for column in zip(*rows, strict=True)], dtype=torch.float64)
    return (sums if rule == "sum" else sums / math.fsum(factors)).to(parts[0].dtype)


@settings(max_examples=150, deadline=None)
@given(cohort=cohorts(), rule=st.sampled_from(SUMS), data=st.data())
def test_a_sum_is_the_same_to_the_bit_however_clients_are_grouped(
    cohort: tuple[torch.dtype, list[Tensor], list[float]], rule: Reduction, data: st.DataObject
) -> None:
    _, parts, weights = cohort
    clients = data.draw(st.permutations(range(len(parts))), label="order")
    cuts = data.draw(st.lists(st.integers(0, len(parts)), max_size=4), label="cuts")
    nodes = [list(clients[a:b]) for a, b in itertools.pairwise([0, *sorted(cuts), len(parts)])]
    before = [p.clone() for p in parts]
    got = reduce(rule, parts, weights, nodes)
    assert torch.equal(got, exact(rule, parts, weights))
    assert all(torch.equal(p, b) for p, b in zip(parts, before, strict=True))


@settings(max_examples=100, deadline=None)
@given(cohort=cohorts(), rule=st.sampled_from(SUMS), cut=st.integers(0, 9))
def test_a_stack_is_reduced_as_its_clients_are(
    cohort: tuple[torch.dtype, list[Tensor], list[float]], rule: Reduction, cut: int
) -> None:
    """Within a unit in the last place of the largest number that is added: float64 sums, rounded once to float32."""
    dtype, parts, weights = cohort
    alone = reduce(rule, parts, weights, [list(range(len(parts)))])
    reducer, stack = Reducer({"a": rule}), torch.stack(parts)
    before = stack.clone()
    for rows in (slice(0, cut), slice(cut, None)):
        if weights[rows]:
            reducer.add_stack({"a": stack[rows]}, weights[rows])
    together = reducer.result()["a"]
    assert torch.equal(stack, before)
    assert (together.dtype, together.shape) == (dtype, alone.shape)
    factors = torch.tensor(weights if rule == "weighted_mean" else [1.0] * len(weights), dtype=torch.float64)
    size = (stack.double().abs() * factors[:, None]).sum(0) / (1.0 if rule == "sum" else factors.sum())
    unit = torch.finfo(dtype).eps * alone.double().abs() + torch.finfo(torch.float64).eps * len(parts) * size
    assert ((together.double() - alone.double()).abs() <= unit).all()


def test_a_stack_of_integers_is_exact() -> None:
    stack = torch.tensor([[2**60, -3], [1, 1]])
    for rule, expected in (("sum", [2**60 + 1, -2]), ("mean", [2**59, -1])):
        reducer = Reducer({"a": rule})
        reducer.add_stack({"a": stack}, [1.0, 5.0])
        assert reducer.result()["a"].tolist() == expected
        assert reducer.result()["a"].dtype == torch.int64


@pytest.mark.parametrize("rule", ["max", "min", "stack"])
def test_a_stack_needs_a_sum(rule: Reduction) -> None:
    with pytest.raises(RunFailed, match=rf"'a' has the reduction '{rule}', which is no sum"):
        Reducer({"a": rule}).add_stack({"a": torch.ones(2, 3)}, [1.0, 1.0])


def test_partials_are_not_written_to() -> None:
    for rule in RULES:
        server = Reducer({"a": rule})
        partials = []
        for clients in ([0, 1], [2, 3]):
            node = Reducer({"a": rule})
            for client in clients:
                node.add({"a": arrays(torch.float64)[client]}, WEIGHTS[client])
            partials.append(node.partial())
        before = [{n: a.clone() for n, a in found.items()} for found, _ in partials]
        for _ in range(2):
            for found, facts in partials:
                server.merge(found, facts)
        for (found, _), kept in zip(partials, before, strict=True):
            assert all(torch.equal(a, kept[n]) for n, a in found.items()), rule


def test_an_array_that_some_clients_do_not_send_is_a_mean_over_the_others() -> None:
    reducer = Reducer({"a": "weighted_mean", "b": "sum"})
    reducer.add({"a": torch.tensor([2.0])}, 1.0)
    reducer.add({"a": torch.tensor([4.0]), "b": torch.tensor([5.0])}, 3.0)
    reducer.add({"b": torch.tensor([6.0])}, 100.0)
    assert {n: a.tolist() for n, a in reducer.result().items()} == {"a": [3.5], "b": [11.0]}


def test_stack_keeps_single_clients_in_order() -> None:
    server = Reducer({"m/": "stack"})
    for clients in ([0, 2], [1, 3]):
        node = Reducer({"m/": "stack"})
        for k in clients:
            node.add({"m/w": torch.full((2,), float(k))}, float(k + 1))
        server.merge(*node.partial())
    assert [int(p[0]) for p in server.stacked("m/w")] == [0, 2, 1, 3]
    assert server.weights == [1.0, 3.0, 2.0, 4.0]  # the same order


def test_inputs_are_not_written_to() -> None:
    for rule in RULES:
        parts = arrays(torch.float64)
        before = [p.clone() for p in parts]
        reduce(rule, parts, WEIGHTS, [[0, 1], [2, 3]])
        assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_longer_rule_beats_prefix() -> None:
    reducer = Reducer({"model/": "stack", "model/bn": "mean"})
    reducer.add({"model/bn": torch.tensor([1.0]), "model/w": torch.tensor([1.0])}, 1.0)
    assert {n: tuple(a.shape) for n, a in reducer.result().items()} == {"model/bn": (1,), "model/w": (1, 1)}


def test_undeclared_array_is_named() -> None:
    with pytest.raises(RunFailed, match=r"'secret' leaves a client without a declared reduction"):
        Reducer({"a": "sum"}).add({"secret": torch.ones(1)}, 1.0)


def test_unknown_rule_is_named() -> None:
    with pytest.raises(RunFailed, match=r"'a' has the reduction 'median'; allowed are sum, mean"):
        Reducer({"a": "median"}).add({"a": torch.ones(1)}, 1.0)  # type: ignore[dict-item]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [[[0, 1]], [[0], [1]]])
def test_shapes_that_differ_are_an_error_not_a_broadcast(rule: Reduction, spread: list[list[int]]) -> None:
    with pytest.raises(RunFailed, match=r"'a' has shape \(1,\) at one client, \(3,\) at another"):
        reduce(rule, [torch.ones(3), torch.ones(1)], [1.0, 1.0], spread)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [[[0, 1]], [[0], [1]]])
def test_types_that_differ_are_an_error(rule: Reduction, spread: list[list[int]]) -> None:
    with pytest.raises(RunFailed, match=r"'a' is (torch\.)?float32 at one client, torch.int64 at another"):
        reduce(rule, [torch.ones(3, dtype=torch.int64), torch.ones(3)], [1.0, 1.0], spread)


def test_nothing_added_is_nothing() -> None:
    server = Reducer({"a": "mean"})
    server.merge(*Reducer({"a": "mean"}).partial())
    assert server.result() == {}
    assert server.weights == []
