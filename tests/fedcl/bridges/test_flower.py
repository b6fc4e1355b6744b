"""Flower's server strategies through the adapter, against the papers' formulas in float64 NumPy."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.bridges.flower import CLASSES, FlowerAggregator
from fedcl.errors import RunFailed, UsageError
from fedcl.federation import flower_internals as flower

Arrays = dict[str, Tensor]
Oracle = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
SHAPES = {"encoder.weight": (3, 4), "encoder.bias": (3,), "scale": (), "none": (0, 2), "head.weight": (2, 3)}


def arrays(*key: object, scale: float = 1.0, dtype: torch.dtype = torch.float64, head: int = 2) -> Arrays:
    """Normal numbers of the shapes above; ``head`` rows in the head."""
    out = {}
    for name, shape in SHAPES.items():
        shape = (head, 3) if name == "head.weight" else shape
        draws = counter.counter_normal(torch.tensor(counter.fold(*key, name)), 1, shape, torch.float64)
        out[name] = (scale * draws).to(dtype)
    return out


def cohort(current: Arrays, clients: int, *key: object, scale: float = 0.1) -> list[Arrays]:
    return [
        {
            n: v + noise.to(v.dtype)
            for (n, v), noise in zip(
                current.items(),
                arrays(*key, c, scale=scale, head=len(current["head.weight"])).values(),
                strict=True,
            )
        }
        for c in range(clients)
    ]


def flat(values: Arrays) -> np.ndarray:
    return np.concatenate([v.double().numpy().ravel() for v in values.values()])


NEEDS: dict[str, dict[str, object]] = {
    "qfedavg": {"client_learning_rate": 0.1},
    "dp_fedavg": {"noise_multiplier": 0.5, "clipping_norm": 0.3},
}
"""Options without a default."""


def make(name: str, options: dict[str, object] | None = None) -> FlowerAggregator:
    return FlowerAggregator(name, {**NEEDS.get(name, {}), **(options or {})})


def told(name: str, clients: int) -> dict[str, Any]:
    """What a strategy is told beside models and weights."""
    losses = {"losses": [0.3 + c for c in range(clients)]} if name == "qfedavg" else {}
    return losses | ({"seed": 7} if name == "dp_fedavg" else {})


def weights(clients: int) -> list[float]:
    return [float(3 * c % 7 + 1) for c in range(clients)]


def fedavg(x: np.ndarray, ws: np.ndarray, n: np.ndarray) -> np.ndarray:
    """McMahan et al. 2017, Algorithm 1: sum_k n_k / n w_k."""
    return sum(nk / n.sum() * w for nk, w in zip(n, ws, strict=True))


def median(x: np.ndarray, ws: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Yin et al. 2018, Option I: coordinate-wise median."""
    ordered, half = np.sort(ws, axis=0), len(ws) // 2
    return ordered[half] if len(ws) % 2 else (ordered[half - 1] + ordered[half]) / 2


def trimmed(x: np.ndarray, ws: np.ndarray, n: np.ndarray, beta: float = 0.2) -> np.ndarray:
    """Yin et al. 2018, Option II: mean without the smallest and largest fraction beta."""
    cut = int(np.floor(beta * len(ws)))
    return np.sort(ws, axis=0)[cut : len(ws) - cut].mean(axis=0)


def krum_order(ws: np.ndarray, f: int) -> list[int]:
    """Blanchard et al. 2017: clients by the sum of squared distances to their n - f - 2 nearest others."""
    m = len(ws)
    scores = []
    for i in range(m):
        others = sorted(float(((ws[i] - ws[j]) ** 2).sum()) for j in range(m) if j != i)
        scores.append(sum(others[: max(1, m - f - 2)]))
    return sorted(range(m), key=lambda i: (scores[i], i))


def krum(x: np.ndarray, ws: np.ndarray, n: np.ndarray, f: int = 0) -> np.ndarray:
    return ws[krum_order(ws, f)[0]]


def multikrum(x: np.ndarray, ws: np.ndarray, n: np.ndarray, f: int = 0, m: int = 1) -> np.ndarray:
    """Flower weighs the chosen clients by their examples; the paper takes their mean."""
    best = krum_order(ws, f)[:m]
    return fedavg(x, ws[best], n[best])


def bulyan(x: np.ndarray, ws: np.ndarray, n: np.ndarray, f: int = 0) -> np.ndarray:
    """El Mhamdi et al. 2018, second phase: mean of the theta - 2 f values nearest to the median.

    The first phase is Flower's: the theta = n - 2 f best by one Krum pass, where the paper repeats Krum.
    """
    theta = len(ws) - 2 * f
    chosen = ws[krum_order(ws, f)[:theta]]
    middle = median(x, chosen, n)
    out = np.empty_like(x)
    for i in range(len(x)):
        nearest = sorted(chosen[:, i], key=lambda v, m=middle[i]: abs(v - m))
        out[i] = np.mean(nearest[: theta - 2 * f])
    return out


STATELESS: list[tuple[str, dict[str, object], Oracle, tuple[int, ...]]] = [
    ("fedavg", {}, fedavg, (1, 2, 20)),
    ("fedmedian", {}, median, (1, 2, 3, 20)),
    ("fedtrimmedavg", {}, trimmed, (1, 2, 20)),
    ("fedtrimmedavg", {"beta": 0.34}, lambda x, w, n: trimmed(x, w, n, 0.34), (3, 20)),
    ("krum", {}, krum, (1, 2, 20)),
    ("krum", {"num_malicious_nodes": 3}, lambda x, w, n: krum(x, w, n, 3), (9, 20)),
    (
        "multikrum",
        {"num_malicious_nodes": 2, "num_nodes_to_select": 5},
        lambda x, w, n: multikrum(x, w, n, 2, 5),
        (7, 20),
    ),
    ("multikrum", {"num_nodes_to_select": 4}, fedavg, (4,)),
    ("fedprox", {"proximal_mu": 0.5}, fedavg, (1, 20)),
    ("bulyan", {}, bulyan, (3, 20)),
    ("bulyan", {"num_malicious_nodes": 4}, lambda x, w, n: bulyan(x, w, n, 4), (19, 20)),
]


@pytest.mark.parametrize(("name", "options", "oracle", "sizes"), STATELESS)
def test_rules_without_state(name: str, options: dict[str, object], oracle: Oracle, sizes: tuple[int, ...]) -> None:
    rule = FlowerAggregator(name, options)
    for clients in sizes:
        current = arrays("start")
        updates = cohort(current, clients, name)
        got, state = rule.aggregate(current, updates, weights(clients), {}, 1)
        assert list(got) == list(current)
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in current.items()}
        ws = np.stack([flat(u) for u in updates])
        want = oracle(flat(current), ws, np.array(weights(clients)))
        np.testing.assert_allclose(flat(got), want, rtol=0, atol=1e-13)
        assert state == {}


class AdaptiveOracle:
    """Reddi et al. 2021, Algorithm 2, with x <- x + eta m / (sqrt(v) + tau) and m, v from zero."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.b1, self.b2, self.eta, self.tau = 0.8, 0.95, 0.3, 0.01
        if kind == "fedadagrad":
            self.b1 = 0.0
        self.m: np.ndarray | float = 0.0
        self.v: np.ndarray | float = 0.0

    def options(self) -> dict[str, float]:
        betas = {} if self.kind == "fedadagrad" else {"beta_1": self.b1, "beta_2": self.b2}
        return {"eta": self.eta, "tau": self.tau, **betas}

    def __call__(self, x: np.ndarray, average: np.ndarray, round_: int) -> np.ndarray:
        delta = average - x
        square = delta**2
        self.m = self.b1 * self.m + (1 - self.b1) * delta
        rate = self.eta
        if self.kind == "fedadagrad":
            self.v = self.v + square
        elif self.kind == "fedyogi":
            self.v = self.v - (1 - self.b2) * square * np.sign(self.v - square)
        else:
            self.v = self.b2 * self.v + (1 - self.b2) * square
            # Not in Reddi et al.: Flower adds Kingma and Ba's correction, one step ahead (t = round + 1).
            rate *= np.sqrt(1 - self.b2 ** (round_ + 1)) / (1 - self.b1 ** (round_ + 1))
        return x + rate * self.m / (np.sqrt(self.v) + self.tau)


@pytest.mark.parametrize("clients", [1, 2, 20])
@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_rules_follow_the_paper_over_rounds(name: str, clients: int) -> None:
    oracle = AdaptiveOracle(name)
    rule = FlowerAggregator(name, oracle.options())
    current, state = arrays("start"), {}
    want = flat(current)
    for round_ in range(1, 5):
        updates = cohort(current, clients, name, round_)
        average = fedavg(want, np.stack([flat(u) for u in updates]), np.array(weights(clients)))
        want = oracle(want, average, round_)
        current, state = rule.aggregate(current, updates, weights(clients), state, round_)
        np.testing.assert_allclose(flat(current), want, rtol=0, atol=1e-12)
    for held, moment in (("m_t", oracle.m), ("v_t", oracle.v)):
        got = np.concatenate([state[f"{held}/{name}"].numpy().ravel() for name in current])
        np.testing.assert_allclose(got, moment, rtol=0, atol=1e-13)
    assert len(state) == 2 * len(current)


@pytest.mark.parametrize("clients", [1, 2, 20])
def test_fedavgm_follows_the_paper_over_rounds(clients: int) -> None:
    """Hsu et al. 2019: v <- beta v + delta, w <- w - lr v with delta = w - average."""
    rule = FlowerAggregator("fedavgm", {"server_momentum": 0.7, "server_learning_rate": 0.5})
    current, state = arrays("start"), {}
    want, v = flat(current), np.zeros(flat(current).size)
    for round_ in range(1, 4):
        updates = cohort(current, clients, "m", round_)
        average = fedavg(want, np.stack([flat(u) for u in updates]), np.array(weights(clients)))
        v = 0.7 * v + want - average
        want = want - 0.5 * v
        current, state = rule.aggregate(current, updates, weights(clients), state, round_)
        np.testing.assert_allclose(flat(current), want, rtol=0, atol=1e-13)
    assert set(state) == {f"momentum_vector/{name}" for name in current}
    plain = FlowerAggregator("fedavgm")
    assert plain.aggregate(current, cohort(current, 2, "p"), [1, 1], {}, 1)[1] == {}


STATEFUL = {"fedadam": {}, "fedyogi": {}, "fedadagrad": {}, "fedavgm": {"server_momentum": 0.9}}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_all_that_a_strategy_remembers(name: str) -> None:
    """A new object that gets the saved state goes on bit for bit; without the state it does not."""
    straight = FlowerAggregator(name, STATEFUL[name])
    current, state = arrays("start", dtype=torch.float32), {}
    for round_ in range(1, 4):
        before = current, {k: v.clone() for k, v in state.items()}
        updates = cohort(current, 3, "s", round_)
        current, state = straight.aggregate(current, updates, weights(3), state, round_)
    resumed, resumed_state = FlowerAggregator(name, STATEFUL[name]).aggregate(
        before[0], updates, weights(3), before[1], 3
    )
    assert all(torch.equal(resumed[k], current[k]) for k in current)
    assert state.keys() == resumed_state.keys()
    assert all(torch.equal(resumed_state[k], state[k]) for k in state)
    again, _ = straight.aggregate(before[0], updates, weights(3), before[1], 3)
    assert all(torch.equal(again[k], current[k]) for k in current)
    forgot, _ = FlowerAggregator(name, STATEFUL[name]).aggregate(before[0], updates, weights(3), {}, 3)
    assert not torch.equal(forgot["encoder.weight"], current["encoder.weight"])


@pytest.mark.parametrize("grow", [1, 2, 7])
@pytest.mark.parametrize("name", STATEFUL)
def test_heads_grow_between_rounds_and_new_rows_start_at_zero(name: str, grow: int) -> None:
    rule = FlowerAggregator(name, STATEFUL[name])
    current = arrays("start")
    current, state = rule.aggregate(current, cohort(current, 2, "g"), [1, 2], {}, 1)
    grown = dict(current)
    grown["head.weight"] = torch.cat([current["head.weight"], torch.ones(grow, 3, dtype=torch.float64)])
    padded = {
        k: torch.cat([v, torch.zeros(grow, 3, dtype=torch.float64)]) if k.endswith("/head.weight") else v
        for k, v in state.items()
    }
    updates = cohort(grown, 2, "h")
    got, after = rule.aggregate(grown, updates, [1, 2], state, 2)
    want, after_padded = rule.aggregate(grown, updates, [1, 2], padded, 2)
    assert got["head.weight"].shape == (2 + grow, 3)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert all(torch.equal(after[k], after_padded[k]) for k in after)
    fresh, _ = rule.aggregate(grown, updates, [1, 2], {}, 2)
    assert torch.equal(fresh["head.weight"][2:], got["head.weight"][2:])
    assert not torch.equal(fresh["head.weight"][:2], got["head.weight"][:2])


def test_state_of_parameters_that_rest_is_kept_and_new_parameters_join() -> None:
    rule = FlowerAggregator("fedadam")
    current = arrays("start")
    part = {k: current[k] for k in ("encoder.weight", "scale")}
    _, state = rule.aggregate(part, [{k: v + 1 for k, v in part.items()}], [1], {"other": torch.ones(2)}, 1)
    rest = {k: current[k] for k in ("scale", "head.weight")}
    _, after = rule.aggregate(rest, [{k: v + 1 for k, v in rest.items()}], [1], state, 2)
    assert torch.equal(after["m_t/encoder.weight"], state["m_t/encoder.weight"])
    assert after["other"].tolist() == [1, 1]
    assert after["m_t/head.weight"].shape == (2, 3)
    with pytest.raises(RunFailed, match="m_t/scale has the shape"):
        rule.aggregate(rest, [rest], [1], {"m_t/scale": torch.ones(4)}, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in CLASSES if n != "bulyan"])
def test_types_are_restored_and_results_rounded_once(name: str, dtype: torch.dtype) -> None:
    rule = make(name)
    current = arrays("start", dtype=dtype)
    updates = cohort(current, 3, "d")
    got, _ = rule.aggregate(current, updates, weights(3), {}, 1, **told(name, 3))
    wide = [{k: v.double() for k, v in u.items()} for u in (current, *updates)]
    exact, _ = rule.aggregate(wide[0], wide[1:], weights(3), {}, 1, **told(name, 3))
    assert {v.dtype for v in got.values()} == {dtype}
    assert all(torch.equal(got[k], exact[k].to(dtype)) for k in got)


@pytest.mark.parametrize("name", CLASSES)
def test_inputs_stay_and_nothing_is_sampled_or_printed(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    rule = make(name)
    current = arrays("start")
    updates = cohort(current, 4, "i")
    copies = [{k: v.clone() for k, v in u.items()} for u in (current, *updates)]
    drawn, noise = random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    rule.aggregate(current, updates, weights(4), {}, 1, **told(name, 4))
    assert random.getstate() == drawn
    assert (np.random.get_state()[1] == noise).all()  # noqa: NPY002
    for kept, now in zip(copies, (current, *updates), strict=True):
        assert all(torch.equal(kept[k], now[k]) for k in kept)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", CLASSES)
def test_empty_clients_are_left_out(name: str) -> None:
    rule = make(name)
    current = arrays("start")
    updates = cohort(current, 4, "e")
    wrong = {"nothing": torch.zeros(1)}
    more = {k: [9.0, *v, 9.0] if k == "losses" else v for k, v in told(name, 4).items()}
    got, _ = rule.aggregate(current, [wrong, *updates, current], [0, *weights(4), 0.0], {}, 1, **more)
    want, _ = rule.aggregate(current, updates, weights(4), {}, 1, **told(name, 4))
    assert all(torch.equal(got[k], want[k]) for k in want)
    state = {"m_t/scale": torch.tensor(2.0)}
    for none in ([], [0.0, 0.0]):
        kept, kept_state = rule.aggregate(current, updates[: len(none)], none, state, 1, **told(name, len(none)))
        assert kept == current
        assert kept_state == state
    assert rule.aggregate({}, [{}], [1.0], state, 1, **told(name, 1)) == ({}, state)


def test_flowers_own_traps_that_the_adapter_keeps_away() -> None:
    """FedAdam on buffers, all-empty cohorts and second records, on the bare strategies."""
    from flwr.serverapp.exception import InconsistentMessageReplies
    from flwr.serverapp.strategy import FedAdam, FedAvg

    def answer(extra: bool, weight: float) -> flower.Message:
        content = flower.RecordDict({"arrays": flower.pack({"w": torch.ones(1)})})
        content["metrics"] = flower.MetricRecord({"num-examples": weight})
        if extra:
            content["more"] = flower.pack({"p": torch.ones(1)})
        return flower.make_reply(content, 2)

    with pytest.raises(InconsistentMessageReplies, match="exactly one ArrayRecord"):
        FedAvg().aggregate_train(1, [answer(True, 1.0)])
    with pytest.raises(ZeroDivisionError):
        FedAvg().aggregate_train(1, [answer(False, 0.0)])
    # A running variance that falls from 0.05 to 0.01 is overshot by Adam's step of about eta.
    bare = FedAdam()
    bare.current_arrays = {"w": np.array([0.05], np.float32)}
    content = flower.RecordDict({"arrays": flower.pack({"w": torch.tensor([0.01])})})
    content["metrics"] = flower.MetricRecord({"num-examples": 1.0})
    record, _ = bare.aggregate_train(1, [flower.make_reply(content, 2)])
    assert record is not None
    assert record["w"].numpy().item() < 0


@pytest.mark.parametrize("sizes", [(1, 20), (20, 1)])
def test_cohorts_may_change_size_between_rounds(sizes: tuple[int, int]) -> None:
    rule = FlowerAggregator("fedadam")
    current, state = arrays("start"), {}
    for round_, clients in enumerate(sizes, start=1):
        updates = cohort(current, clients, "c", round_)
        current, state = rule.aggregate(current, updates, weights(clients), state, round_)
    assert bool(np.isfinite(flat(current)).all())


def test_krum_is_not_lost_in_cancellation() -> None:
    """Large float32 parameters, small differences: in float32 the distances would be noise."""
    base = torch.full((1000,), 50.0)
    step = torch.linspace(0, 1, 1000) * 1e-3
    updates = [{"w": base + k * step} for k in (0, 1, 1.1, 1.2, 9)]
    got, _ = FlowerAggregator("krum", {"num_malicious_nodes": 1}).aggregate({"w": base}, updates, [1] * 5, {}, 1)
    assert torch.equal(got["w"], updates[2]["w"])


@pytest.mark.parametrize(
    ("name", "options", "clients", "says"),
    [
        ("krum", {"num_malicious_nodes": 2}, 6, "options.krum.num_malicious_nodes=2: .*= 7 clients .*not 6"),
        ("multikrum", {"num_nodes_to_select": 4}, 3, "num_nodes_to_select=4: at most the 3 clients"),
        ("bulyan", {}, 2, "num_malicious_nodes=0: Bulyan .*= 3 clients .*not 2"),
        ("bulyan", {"num_malicious_nodes": 4}, 18, "num_malicious_nodes=4: .*= 19 clients .*not 18"),
    ],
)
def test_cohorts_too_small_for_a_rule(name: str, options: dict[str, object], clients: int, says: str) -> None:
    rule = FlowerAggregator(name, options, prefix=f"options.{name}")
    with pytest.raises(UsageError, match=says):
        rule.check_cohort(clients)
    current = arrays("start")
    with pytest.raises(UsageError, match=says):
        rule.aggregate(current, [*cohort(current, clients, "f"), current], [1.0] * clients + [0.0], {}, 1)
    rule.check_cohort(clients + 1)


def test_a_trimmed_mean_that_trims_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    rule = FlowerAggregator("fedtrimmedavg")
    with caplog.at_level(logging.WARNING):
        rule.check_cohort(5)
        assert caplog.text == ""
        rule.check_cohort(4)
    assert "floor(beta * 4) = 0" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fedadm", {}, "strategy='fedadm': .*Did you mean 'fedadam'"),
        ("fedadam", {"beta1": 0.5}, "o.x='beta1': FedAdam has the options eta, .*Did you mean 'beta_1'"),
        ("fedavg", {"eta": 1.0}, "o.x='eta': it has no options"),
        ("fedadam", {"min_train_nodes": 3}, "o.x='min_train_nodes'"),
        ("fedadam", {"eta": -1.0}, "o.x.eta=-1.0: a number above 0"),
        ("fedadam", {"eta": float("nan")}, "o.x.eta=nan"),
        ("fedadam", {"tau": "small"}, "o.x.tau='small'"),
        ("fedadam", {"beta_2": 1}, "o.x.beta_2=1: a number from 0 to below 1"),
        ("fedtrimmedavg", {"beta": 0.5}, "o.x.beta=0.5: a number from 0 to below 0.5"),
        ("qfedavg", {}, "o.x.client_learning_rate=None: QFedAvg needs a value"),
        ("qfedavg", {"client_learning_rate": 0.0}, "o.x.client_learning_rate=0.0: a number above 0"),
        ("qfedavg", {"client_learning_rate": "x"}, "o.x.client_learning_rate='x'"),
        ("qfedavg", {"client_learning_rate": 0.1, "q": -0.1}, "o.x.q=-0.1: a number from 0 to 30"),
        ("qfedavg", {"client_learning_rate": 0.1, "train_loss_key": "l"}, "o.x='train_loss_key'"),
        ("fedprox", {"proximal_mu": -1.0}, "o.x.proximal_mu=-1.0"),
        ("dp_fedavg", {"noise_multiplier": 1.0}, "o.x.clipping_norm=None"),
        ("dp_fedavg", {"noise_multiplier": -1.0, "clipping_norm": 1.0}, "o.x.noise_multiplier=-1.0"),
        ("dp_fedavg", {"noise_multiplier": 1.0, "clipping_norm": 0.0}, "o.x.clipping_norm=0.0"),
        ("dp_fedavg", {"num_sampled_clients": 3}, "o.x='num_sampled_clients'"),
        ("krum", {"num_malicious_nodes": -1}, "o.x.num_malicious_nodes=-1: a whole number"),
        ("krum", {"num_malicious_nodes": 1.5}, "o.x.num_malicious_nodes=1.5: a whole number"),
        ("krum", {"num_malicious_nodes": True}, "o.x.num_malicious_nodes=True"),
    ],
)
def test_wrong_settings_name_key_value_and_what_is_allowed(name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FlowerAggregator(name, options, prefix="o.x")


def test_arrays_that_do_not_match_are_named() -> None:
    rule = FlowerAggregator("fedavg")
    current = {"w": torch.ones(2)}
    with pytest.raises(RunFailed, match=r"'n' is torch\.int64"):
        rule.aggregate({"n": torch.ones(1, dtype=torch.int64)}, [], [], {}, 1)
    with pytest.raises(RunFailed, match="differ in extra"):
        rule.aggregate(current, [{"w": torch.ones(2), "extra": torch.ones(1)}], [1], {}, 1)
    with pytest.raises(RunFailed, match=r"\(1,\), not \(2,\)"):
        rule.aggregate(current, [{"w": torch.ones(1)}], [1], {}, 1)
    with pytest.raises(RunFailed, match="weight -1"):
        rule.aggregate(current, [current], [-1], {}, 1)
    with pytest.raises(RunFailed, match="2 weights"):
        rule.aggregate(current, [current], [1, 1], {}, 1)


def test_own_strategies_run_and_those_that_cannot_be_saved_or_give_nothing_fail() -> None:
    from flwr.serverapp.strategy import FedAvg

    class Doubled(FedAvg):
        def __init__(self, min_train_nodes: int = 2, factor: float = 2.0) -> None:
            super().__init__(min_train_nodes=min_train_nodes)
            self.factor = factor

        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            record, metrics = super().aggregate_train(server_round, replies)
            values = {k: flower.Array(self.factor * v.numpy()) for k, v in record.items()}
            return flower.ArrayRecord(values), metrics

    class Counting(FedAvg):
        calls = 0

        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            self.calls = self.calls + 1
            return super().aggregate_train(server_round, replies)

    class Silent(FedAvg):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            return None, None

    current = {"w": torch.ones(2)}
    got, _ = FlowerAggregator(Doubled, {"factor": 3.0}).aggregate(current, [current], [1], {}, 1)
    assert got["w"].tolist() == [3, 3]
    with pytest.raises(RunFailed, match="Counting keeps state in 'calls'"):
        FlowerAggregator(Counting).aggregate(current, [current], [1], {}, 1)
    with pytest.raises(RunFailed, match="Silent gave no parameters in round 7"):
        FlowerAggregator(Silent).aggregate(current, [current], [1], {}, 7)
    with pytest.raises(UsageError, match=r"derived from flwr\.serverapp\.strategy\.FedAvg"):
        FlowerAggregator(dict)  # type: ignore[arg-type]
