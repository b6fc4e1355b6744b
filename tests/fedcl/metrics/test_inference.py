"""Against scipy on fixed inputs, against literal oracles, and over simulated nulls."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fedcl.metrics import inference
from fedcl.random import Stream

VALUES = [
    [0.61, 0.55, 0.72, 0.66, 0.59],
    [0.1, -0.2, 0.3, 0.4, 0.5, 0.6, 0.05, -0.01],
    [3.0, 1.0],
    [1e-9, 2e-9, 4e-9],
    [1e6, 1e6 + 1, 1e6 - 3, 1e6],
]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_t_interval_is_scipys(values, level):
    expected = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    assert inference.t_interval(values, level) == pytest.approx(expected, rel=1e-12)
    assert inference.deviation(values) == pytest.approx(np.std(values, ddof=1), rel=1e-12)


@pytest.mark.parametrize("values", VALUES)
def test_the_t_test_is_scipys(values):
    other = [0.01 * i for i in range(len(values))]
    gaps = inference.differences(values, other)
    expected = stats.ttest_rel(values, other)
    assert inference.paired_t_p(gaps) == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert inference.t_interval(gaps) == pytest.approx((interval.low, interval.high), rel=1e-9)


@pytest.mark.parametrize("count", [1, 5, 6, 8, 12, 25, 50])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_signed_rank_test_is_scipys(count, shift):
    stream = Stream("wilcoxon", count)
    gaps = [stream.normal() + shift for _ in range(count)]
    expected = stats.wilcoxon(gaps, method="exact")
    assert inference.signed_rank_p(gaps) == pytest.approx(expected.pvalue, rel=1e-9)


def by_all_signs(gaps):
    """The definition: how many of all 2^n signs give a sum as far out as the one that was seen."""
    kept = [gap for gap in gaps if gap != 0]
    ranks = stats.rankdata(np.abs(kept))
    seen = sum(rank for rank, gap in zip(ranks, kept, strict=True) if gap > 0)
    sums = [float(np.dot(ranks, signs)) for signs in itertools.product([0, 1], repeat=len(kept))]
    low = sum(s <= seen for s in sums) / len(sums)
    high = sum(s >= seen for s in sums) / len(sums)
    return min(1.0, 2 * min(low, high))


@pytest.mark.parametrize(
    "gaps",
    [
        [0.1, -0.1, 0.2, 0.2, 0.5, 0.6, 0.5, 0.6, 0.2],
        [0.0, 0.1, 0.1, 0.1, -0.1, 0.3, 0.0],
        [1.0] * 7,
        [-1.0] * 6,
        [2.0, -1.0, -1.0],
    ],
)
def test_ties_and_zeros_of_the_signed_rank_test(gaps):
    assert inference.signed_rank_p(gaps) == pytest.approx(by_all_signs(gaps), rel=1e-12)
    assert inference.signed_rank_p([-gap for gap in gaps]) == pytest.approx(inference.signed_rank_p(gaps), rel=1e-12)


def test_rounding_breaks_no_tie():
    gaps = [0.3 - 0.2, 0.2 - 0.1, 0.4 - 0.3, 0.9 - 0.8, 0.6 - 0.5, -0.2, 1e-17]
    assert inference.signed_rank_p(gaps) == by_all_signs([0.1, 0.1, 0.1, 0.1, 0.1, -0.2])
    assert inference.differences([0.1 + 0.2], [0.3]) == [0.0]
    assert inference.constant([0.3 - 0.2, 0.2 - 0.1])
    assert inference.average_ranks([[0.1 + 0.2, 0.3]]) == [1.5, 1.5]


def test_rounding_breaks_no_tie_of_small_differences_of_large_accuracies():
    """One or two images of 20,000: the last digits of such differences are rounding."""
    images = [-2, 1, 2, 2, -1, 2, 1]
    for base in itertools.product((9123, 14001), (7777, 16543), (12345, 18888)):
        right = [*base, 15001, 11111, 13579, 17531]
        one = [(count + more) / 20_000 for count, more in zip(right, images, strict=True)]
        gaps = inference.differences(one, [count / 20_000 for count in right])
        assert inference.signed_rank_p(gaps) == by_all_signs(images)
        same = inference.differences([(count + 1) / 20_000 for count in right], [count / 20_000 for count in right])
        assert inference.constant(same)


@pytest.mark.parametrize("values", [VALUES[0], VALUES[1], VALUES[3], [0.1 * i**2 for i in range(20)]])
def test_the_bootstrap_is_scipys_percentile_interval(values):
    rng = np.random.RandomState(0)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=40_000, rng=rng).confidence_interval
    # The standard error of a quantile of 10,000 resampled means is about 0.03 of their deviation.
    tolerance = 0.1 * float(np.std(values)) / math.sqrt(len(values))
    assert inference.bootstrap_interval(values) == pytest.approx((expected.low, expected.high), abs=tolerance)


def test_the_bootstrap_draws_the_same_each_time():
    inference._draws.cache_clear()
    first = inference.bootstrap_interval(VALUES[0])
    inference._draws.cache_clear()
    assert inference.bootstrap_interval(list(VALUES[0])) == first
    drawn = np.bincount(inference._draws(5, 10_000).ravel(), minlength=5)
    assert drawn.sum() == 50_000
    assert np.abs(drawn - 10_000).max() < 4 * math.sqrt(50_000 * 0.2 * 0.8)


def holm_literally(ps):
    """Smallest first; p times the number of hypotheses left; never below an earlier one; at most 1."""
    left, adjusted, running = list(enumerate(ps)), {}, 0.0
    while left:
        index, p = min(left, key=lambda pair: pair[1])
        running = max(running, min(1.0, p * len(left)))
        adjusted[index] = running
        left.remove((index, p))
    return [adjusted[i] for i in range(len(ps))]


@pytest.mark.parametrize("ps", [[], [0.2], [0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.9], [1.0, 0.0, 0.02, 0.02]])
def test_holm_literally(ps):
    assert inference.holm(ps) == pytest.approx(holm_literally(ps), abs=1e-15)


def test_ranks_are_scipys():
    stream = Stream("ranks")
    table = [[round(stream.uniform(), 1) for _ in range(6)] for _ in range(9)]
    expected = np.mean([stats.rankdata([-x for x in row]) for row in table], axis=0)
    assert inference.average_ranks(table) == pytest.approx(expected.tolist())


def share_within(rejected, alpha, runs):
    """Whether a rejection rate is within three standard errors of alpha."""
    return abs(rejected / runs - alpha) <= 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_2000_nulls_single_and_family_wise():
    """With no difference anywhere, each test rejects as often as it should, and a family after Holm too.

    A rank test of 10 pairs has only so many p: the largest of at most 0.05 is 0.048828125, the rate to expect.
    """
    runs, tests, alpha, attainable = 2000, 3, 0.05, 0.048828125
    single_t = single_rank = family_t = family_rank = uncorrected = 0
    stream = Stream("nulls")
    for _ in range(runs):
        gaps = [[stream.normal() for _ in range(10)] for _ in range(tests)]
        t, rank = [inference.paired_t_p(g) for g in gaps], [inference.signed_rank_p(g) for g in gaps]
        single_t += t[0] <= alpha
        single_rank += rank[0] <= alpha
        uncorrected += min(t) <= alpha
        family_t += min(inference.holm(t)) <= alpha
        family_rank += min(inference.holm(rank)) <= alpha
    assert share_within(single_t, alpha, runs)
    assert share_within(single_rank, attainable, runs)
    assert share_within(family_t, alpha, runs)
    # A third of 0.05 is no p of the rank test: the largest below is 0.013671875.
    assert share_within(family_rank, 1 - (1 - 0.013671875) ** tests, runs)
    assert not share_within(uncorrected, alpha, runs)


@pytest.mark.parametrize("bad", [[], [math.nan], [0.1, math.inf]])
def test_what_is_no_number_is_refused(bad):
    for function in (inference.t_interval, inference.bootstrap_interval, inference.signed_rank_p, inference.deviation):
        with pytest.raises(ValueError, match="finite"):
            function(bad)


def test_too_little_for_an_answer():
    assert inference.t_interval([0.5]) is None
    assert inference.bootstrap_interval([0.5]) is None
    assert inference.paired_t_p([0.5]) is None
    assert inference.paired_t_p([0.5, 0.5]) is None
    assert inference.signed_rank_p([0.0, 0.0]) is None
    with pytest.raises(ValueError, match="not pairs"):
        inference.differences([0.1], [])
    with pytest.raises(ValueError, match="p must be"):
        inference.holm([1.5])
    with pytest.raises(ValueError, match="rows"):
        inference.average_ranks([])
