"""Counter-based randomness: the numbers themselves, their distribution, and that the way of drawing changes none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedcl import random as counter

P_MIN = 1e-4
"""Tests are of fixed numbers, so they never flicker; a good generator is far above this."""


def seeds(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (("a",), 55958018675192713519841424498102371480),
        ((0, "partition", 3), 42506692302817035272440209538718699589),
    ],
)
def test_key_values(name: tuple[object, ...], value: int) -> None:
    assert counter.key(*name) == value


def test_word_values() -> None:
    assert counter.words(3, 0, "words").tolist() == [
        7992620061130889373,
        8933367711555040437,
        17651510863731302616,
    ]


def test_uniform_values() -> None:
    assert counter.uniform(2, 0, "words").tolist() == [0.43328080170646677, 0.48427883402399163]


def test_permutation_values() -> None:
    assert counter.permutation(8, 0, "permutation").tolist() == [4, 1, 0, 2, 5, 7, 6, 3]


def test_sample_values() -> None:
    assert counter.sample(1000, 5, 0, "sample") == [78, 259, 372, 389, 616]


def test_stream_values() -> None:
    stream = counter.Stream(0, "stream")
    assert [stream.word(), stream.below(10), stream.below(10)] == [12395468350941637550, 5, 1]
    assert stream.normal() == pytest.approx(-0.9197240655075951, rel=1e-12)
    assert stream.shuffle([0, 1, 2, 3, 4]) == [4, 1, 2, 0, 3]
    assert stream.dirichlet([0.5, 1.0, 3.0]).tolist() == pytest.approx(
        [0.02688721538002235, 0.4631638778666111, 0.5099489067533666], rel=1e-12
    )


def test_counter_values() -> None:
    seed, tag = torch.tensor(7), counter.fold("x")
    assert tag == 541244644
    assert counter.hash32(torch.tensor([0, 1, 2**32 - 1])).tolist() == [0, 1753845952, 1734902346]
    assert counter.counter_bits(seed, tag, (3,)).tolist() == [1608685340, 1164741885, 3500887591]
    assert counter.counter_integers(seed, tag, 10, (6,)).tolist() == [3, 2, 8, 8, 5, 1]
    assert counter.counter_uniform(seed, tag, (2,), torch.float64).tolist() == [
        0.37455126643180847,
        0.27118757367134094,
    ]
    assert counter.counter_normal(seed, tag, (2,), torch.float64).tolist() == pytest.approx(
        [-0.34034433139609044, 1.545379021814172], rel=1e-12
    )
    assert counter.step_seed(torch.tensor(5), torch.tensor(9)).item() == 1057416617


def test_hash32_is_lowbias32() -> None:
    def literal(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    values = [0, 1, 12345, 2**31, 2**32 - 1]
    assert counter.hash32(torch.tensor(values)).tolist() == [literal(v) for v in values]


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_name_the_same_stream(integer: type[np.integer]) -> None:  # type: ignore[type-arg]
    assert counter.key(integer(3), "a") == counter.key(3, "a")


def test_names_of_another_type_or_cut_differ() -> None:
    names = [(1, 2), (12,), ("1", 2), (1, "2"), (1, 2, ""), ("1", "2"), (True, 2), (1.0, 2)]
    assert len({counter.key(*name) for name in names}) == len(names)


def test_permutations_are_uniform() -> None:
    first = np.bincount([counter.permutation(6, "u", i)[0] for i in range(3000)], minlength=6)
    last = np.bincount([counter.permutation(6, "u", i)[5] for i in range(3000)], minlength=6)
    assert min(stats.chisquare(first).pvalue, stats.chisquare(last).pvalue) > P_MIN


def test_samples_are_uniform_over_sets() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for i in range(4000):
        drawn = tuple(counter.sample(6, 3, "floyd", i))
        assert list(drawn) == sorted(set(drawn))
        seen[drawn] = seen.get(drawn, 0) + 1
    assert len(seen) == 20  # every set of 3 of 6
    assert stats.chisquare(list(seen.values())).pvalue > P_MIN


def test_sample_of_everything_and_nothing() -> None:
    assert counter.sample(5, 5, 0) == [0, 1, 2, 3, 4]
    assert counter.sample(5, 0, 0) == []
    with pytest.raises(ValueError, match="cannot draw 6 of 5"):
        counter.sample(5, 6, 0)


def test_shuffles_are_uniform() -> None:
    seen: dict[tuple[int, ...], int] = {}
    stream = counter.Stream("shuffle")
    for _ in range(3000):
        order = tuple(stream.shuffle([0, 1, 2, 3]))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert stats.chisquare(list(seen.values())).pvalue > P_MIN


def test_stream_is_words_in_order() -> None:
    stream = counter.Stream(1, "s")
    assert [stream.word() for _ in range(600)] == counter.words(600, 1, "s").tolist()


@pytest.mark.parametrize("shape", [0.05, 0.5, 1.0, 4.0])
def test_gamma_draws(shape: float) -> None:
    stream = counter.Stream("gamma", shape)
    logs = np.array([stream.log_gamma_draw(shape) for _ in range(4000)])
    assert stats.kstest(np.exp(logs), stats.gamma(shape).cdf).pvalue > P_MIN


def test_tiny_gamma_shapes_do_not_underflow() -> None:
    stream = counter.Stream("tiny")
    logs = [stream.log_gamma_draw(1e-4) for _ in range(200)]
    assert np.isfinite(logs).all()
    assert min(logs) < -745  # exp of it is 0 as a double


def test_normal_draws() -> None:
    stream = counter.Stream("normal")
    assert stats.kstest([stream.normal() for _ in range(4000)], "norm").pvalue > P_MIN


def test_dirichlet_moments() -> None:
    alphas = [0.3, 1.0, 2.5]
    stream = counter.Stream("dirichlet")
    draws = np.stack([stream.dirichlet(alphas) for _ in range(6000)])
    expected = stats.dirichlet(alphas)
    assert np.allclose(draws.sum(axis=1), 1.0, atol=1e-12)
    assert np.allclose(draws.mean(axis=0), expected.mean(), atol=0.01)
    assert np.allclose(draws.var(axis=0), expected.var(), atol=0.004)
    assert stats.kstest(draws[:, 0], stats.beta(0.3, 3.5).cdf).pvalue > P_MIN


# inside a step


def test_bits_are_uniform_in_position_step_client_and_tag() -> None:
    tag = counter.fold("tag")
    steps = counter.step_seed(torch.tensor(3), seeds(4000))
    clients = counter.step_seed(seeds(4000), torch.tensor(3))
    columns = {
        "position": counter.counter_bits(torch.tensor(1), tag, (4000,)),
        "step": torch.stack([counter.counter_bits(s, tag, (1,)) for s in steps]).flatten(),
        "client": torch.stack([counter.counter_bits(s, tag, (1,)) for s in clients]).flatten(),
        "tag": torch.stack([counter.counter_bits(torch.tensor(1), t, (1,)) for t in range(4000)]).flatten(),
    }
    for name, bits in columns.items():
        assert stats.kstest(bits.numpy() / 2**32, "uniform").pvalue > P_MIN, name
        low = np.bincount(bits.numpy() & 15, minlength=16)
        assert stats.chisquare(low).pvalue > P_MIN, name


@pytest.mark.parametrize("what", ["tag", "step", "client", "forward pass", "position"])
def test_neighbouring_streams_are_independent(what: str) -> None:
    n = 20_000
    tag, other_tag = counter.fold("a"), counter.fold("b")
    one = counter.step_seed(torch.tensor(11), torch.tensor(5))
    first = counter.counter_uniform(one, tag, (n,), torch.float64)
    second = {
        "tag": lambda: counter.counter_uniform(one, other_tag, (n,), torch.float64),
        "step": lambda: counter.counter_uniform(
            counter.step_seed(torch.tensor(11), torch.tensor(6)), tag, (n,), torch.float64
        ),
        "client": lambda: counter.counter_uniform(
            counter.step_seed(torch.tensor(12), torch.tensor(5)), tag, (n,), torch.float64
        ),
        "forward pass": lambda: counter.counter_uniform(one + 1, tag, (n,), torch.float64),
        "position": lambda: first.roll(1),
    }[what]()
    table, _, _ = np.histogram2d(first.numpy(), second.numpy(), bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(table.ravel()).pvalue > P_MIN


def test_normal_numbers_in_a_step() -> None:
    drawn = counter.counter_normal(torch.tensor(4), counter.fold("n"), (8000,), torch.float64)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > P_MIN


@pytest.mark.parametrize(("seed", "bits"), [(40_329_744, 2**24 - 1), (10_058_041, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_never_zero_or_one(seed: int, bits: int, dtype: torch.dtype) -> None:
    """The two seeds were searched for: their first draw has the extreme bit patterns."""
    tag = counter.fold("edge")
    assert counter.counter_bits(torch.tensor(seed), tag, (1,)).item() >> 8 == bits
    drawn = counter.counter_uniform(torch.tensor(seed), tag, (1,), dtype)
    assert 0.0 < drawn.item() < 1.0


def test_integers_cover_their_range_evenly() -> None:
    drawn = counter.counter_integers(torch.tensor(2), counter.fold("i"), 7, (7000,))
    assert stats.chisquare(np.bincount(drawn.numpy(), minlength=7)).pvalue > P_MIN


def test_stacked_clients_draw_what_each_draws_alone() -> None:
    tag = counter.fold("v")
    keys, step = seeds(5), torch.tensor(3)

    def draw(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seed = counter.step_seed(key, step)
        return (
            counter.counter_uniform(seed, tag, (4, 3)),
            counter.counter_normal(seed, tag, (4,)),
            counter.counter_integers(seed, tag, 9, (2,)),
        )

    stacked = torch.vmap(draw, randomness="error")(keys)
    for k in range(5):
        for alone, together in zip(draw(keys[k]), stacked, strict=True):
            assert torch.equal(alone, together[k])
