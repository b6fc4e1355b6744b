"""What is compared with what, what is said of it, and what is refused."""

import json
import math

import pytest

from fedcl.compare import compare
from fedcl.compare.command import compare_folders
from fedcl.compare.metric import metric_of
from fedcl.compare.pairs import judged_pairs
from fedcl.errors import UsageError
from fedcl.random import Stream

ACCURACY = ["average_accuracy"]


def only(comparison, metric="average_accuracy"):
    (pair,) = comparison.pairs_of(metric)
    return pair


BASE = [0.50, 0.52, 0.47, 0.55, 0.49, 0.51, 0.53, 0.46]
UP = [0.031, 0.029, 0.035, 0.025, 0.04, 0.022, 0.033, 0.03]
BETTER = [a + b for a, b in zip(BASE, UP, strict=True)]


def test_a_seed_counts_once(runs):
    runs("a", [0.5, 0.6])
    runs("b", [0.5], summary={})
    path = runs("c", [0.55], {"engine.dtype": "float64"}, seeds=[1])
    found = compare([path], ACCURACY)
    assert found.methods[0].seeds == (0, 1)
    assert found.estimates["average_accuracy"]["finetune"].mean == pytest.approx(0.55)
    assert [run.folder.parent.name for run in found.left_out] == ["b", "c"]
    assert "is the same run as" in found.left_out[0].why
    assert "it differs in engine.dtype" in found.left_out[1].why


def test_ahead_in_words(runs):
    runs("a", BASE)
    pair = only(compare([runs("b", BETTER, {"strategy": ["replay"]})], ACCURACY))
    assert (pair.first, pair.other, pair.verdict) == ("replay", "finetune", "ahead")
    assert pair.p == pair.holm_p == 2 / 2**8
    assert pair.words == (
        "replay is ahead of finetune by 3.1 points (95 % interval 2.6 to 3.5, 8 seeds, Holm p = 0.0078)"
    )


def test_lower_is_better_for_forgetting(runs):
    runs("a", BASE)
    found = compare([runs("b", BETTER, {"strategy": ["replay"]})], ["forgetting"])
    assert [method.label for method in found.methods] == ["finetune", "replay"]
    assert found.estimates["forgetting"]["finetune"].rank == 1.0
    pair = only(found, "forgetting")
    assert (pair.first, pair.verdict) == ("finetune", "ahead")
    assert pair.words.startswith("finetune is ahead of replay with 1.5 points less (95 % interval 1.3 to 1.8")


def test_a_method_behind_the_baseline(runs):
    runs("a", BETTER)
    path = runs("b", BASE, {"strategy": ["replay"]})
    pair = only(compare([path], ACCURACY, baseline="finetune"))
    assert (pair.first, pair.other, pair.verdict) == ("replay", "finetune", "behind")
    assert pair.mean < 0
    assert pair.words.startswith("finetune is ahead of replay by 3.1 points (95 % interval 2.6 to 3.5")
    assert only(compare([path], ACCURACY, baseline="a")).other == "finetune"  # by the name of its runs
    with pytest.raises(UsageError, match="must be one of these methods: finetune; replay"):
        compare([path], ACCURACY, baseline="nothing")


def test_a_baseline_that_could_be_two(runs):
    runs("a", [0.5], {"strategy": ["fedprox"]})
    path = runs("b", [0.5], {"strategy": ["fedprox"], "options.fedprox.mu": 1})
    with pytest.raises(UsageError, match="are meant"):
        compare([path], ACCURACY, baseline="fedprox")
    assert compare([path], ACCURACY, baseline="fedprox (mu=1)").baseline == "fedprox (mu=1)"


def test_few_seeds_have_an_interval_and_no_rank_test(runs):
    runs("a", BASE[:5])
    found = compare([runs("b", BETTER[:5], {"strategy": ["replay"]})], ACCURACY)
    pair = only(found)
    assert (pair.p, pair.holm_p, pair.t_p, pair.verdict) == (None, None, None, "ahead")
    assert pair.words.endswith("5 seeds; too few seeds for a rank test)")
    assert "p =" not in pair.words


def test_not_shown_to_differ(runs):
    runs("a", BASE)
    pair = only(compare([runs("b", BASE[::-1], {"strategy": ["replay"]})], ACCURACY))
    assert pair.verdict == "not shown"
    assert "are not shown to differ" in pair.words


def test_holm_decides_and_the_interval_too(runs):
    """Six seeds reach p = 0.031 at best: enough for one test, not for three."""
    runs("a", BASE[:6])
    path = runs("b", BETTER[:6], {"strategy": ["replay"]})
    assert only(compare([path], ACCURACY)).verdict == "ahead"
    runs("c", [x + 0.1 + 0.001 * i for i, x in enumerate(BASE[:6])], {"strategy": ["fedprox"]})
    found = compare([path], ACCURACY)
    assert {pair.verdict for pair in found.pairs} == {"not shown"}
    assert {pair.holm_p for pair in found.pairs} == {3 / 32}
    assert any("no rank test can show" in note and "7 seeds could" in note for note in found.notes)


def test_an_interval_beside_rank_tests_is_said_to_be_uncorrected(runs):
    """Holm counts rank tests alone: a pair of too few seeds is shown by its interval, whatever else was compared."""
    runs("a", BASE)
    runs("b", BETTER, {"strategy": ["replay"]})
    path = runs("c", [x + 0.1 + 0.001 * i for i, x in enumerate(BASE[:3])], {"strategy": ["fedprox"]})
    found = compare([path], ["average_accuracy", "forgetting"], baseline="finetune")
    assert [pair.p is None for pair in found.pairs_of("average_accuracy")] == [True, False]
    said = "the interval without a rank test: not corrected for the number of comparisons"
    assert f"average_accuracy, forgetting: {said}" in found.notes


def test_a_rank_test_alone_does_not_decide(runs):
    """One seed that is far off: every difference is positive, and the interval of the mean covers 0."""
    runs("a", BASE)
    far = [x + gap for x, gap in zip(BASE, [0.01, 0.011, 0.012, 0.013, 0.014, 0.015, 0.016, 0.4], strict=True)]
    pair = only(compare([runs("b", far, {"strategy": ["replay"]})], ACCURACY))
    assert pair.holm_p == 2 / 2**8
    assert pair.low < 0 < pair.high
    assert pair.verdict == "not shown"


def test_identical_runs_have_no_p(runs):
    runs("a", BASE, summary={"model_sha256": "x"})
    path = runs("b", BASE, {"strategy": ["fedprox"]}, summary={"model_sha256": "x"})
    pair = only(compare([path], ACCURACY))
    assert (pair.verdict, pair.p, pair.holm_p, pair.t_p, pair.low) == ("identical", None, None, None, None)
    assert pair.words == "fedprox and finetune are identical: the same final model at each of 8 seeds"
    runs("c", BASE, {"strategy": ["replay"]})
    found = compare([path], ACCURACY, baseline="finetune")
    assert {pair.verdict for pair in found.pairs} == {"identical"}
    assert "replay and finetune are identical in this number at each of 8 seeds; their models differ" in [
        pair.words for pair in found.pairs
    ]
    assert {estimate.rank for estimate in found.estimates["average_accuracy"].values()} == {2.0}


def test_the_same_difference_at_every_seed(runs):
    runs("a", [0.5, 0.5, 0.5], summary={"bytes_up": 1000})
    path = runs("b", [0.6, 0.6, 0.6], {"strategy": ["replay"]}, summary={"bytes_up": 3000})
    pair = only(compare([path], ["bytes_up"]), "bytes_up")
    assert (pair.verdict, pair.low, pair.p) == ("constant", None, None)
    assert pair.words == (
        "replay is higher than finetune by 2.0 kB, the same at each of 3 seeds: without any spread there is no "
        "interval; too few seeds for a rank test"
    )
    runs("a2", [0.5] * 3, seeds=[3, 4, 5], summary={"bytes_up": 1000})
    runs("b2", [0.6] * 3, {"strategy": ["replay"]}, seeds=[3, 4, 5], summary={"bytes_up": 3000})
    pair = only(compare([path], ["bytes_up"]), "bytes_up")
    assert (pair.verdict, pair.low, pair.p) == ("ahead", None, 1 / 32)
    assert (
        pair.words
        == "finetune is ahead of replay with 2.0 kB less (no spread, so no interval, 6 seeds, Holm p = 0.031)"
    )


def test_one_seed_and_no_common_seed(runs):
    runs("a", [0.5])
    runs("b", [0.6], {"strategy": ["replay"]})
    path = runs("c", [0.7], {"strategy": ["fedprox"]}, seeds=[9])
    found = compare([path], ACCURACY)
    words = {frozenset((pair.first, pair.other)): pair for pair in found.pairs}
    one = words[frozenset(("finetune", "replay"))]
    assert (one.verdict, one.low) == ("not shown", None)
    assert "no interval of one seed; too few seeds" in one.words
    none = words[frozenset(("finetune", "fedprox"))]
    assert (none.verdict, none.mean) == ("no pairs", None)
    assert "no seed has this number for both" in none.words
    assert any("seeds differ" in note for note in found.notes)
    estimate = found.estimates["average_accuracy"]["finetune"]
    assert (estimate.n, estimate.deviation, estimate.low, estimate.bootstrap_low) == (1, None, None, None)
    assert estimate.rank is None


@pytest.mark.parametrize("gone", [None, math.nan, math.inf, "text"])
def test_an_undefined_number_is_left_out_and_never_0(runs, gone):
    runs("a", BASE)
    runs("b", BETTER[1:], {"strategy": ["replay"]}, seeds=range(1, 8))
    path = runs("b", BETTER[:1], {"strategy": ["replay"]}, summary={"average_accuracy": gone})
    found = compare([path], ACCURACY)
    estimate = found.estimates["average_accuracy"]["replay"]
    assert (estimate.n, estimate.undefined) == (7, (0,))
    assert estimate.mean == pytest.approx(math.fsum(BETTER[1:]) / 7)
    assert only(found).seeds == (1, 2, 3, 4, 5, 6, 7)
    assert any("undefined, and left out: average_accuracy (replay: seeds 0)" in note for note in found.notes)
    json.dumps(found.as_object(), allow_nan=False)


def test_a_number_that_is_undefined_everywhere(runs):
    runs("a", [None, None])
    found = compare([runs("b", [None, None], {"strategy": ["replay"]})], ACCURACY)
    assert {estimate.mean for estimate in found.estimates["average_accuracy"].values()} == {None}
    assert only(found).verdict == "no pairs"


def test_a_strange_name_of_a_protocol_stops_nothing(runs):
    runs("a", [0.5], summary={"protocol": ["x"]})
    found = compare([runs("b", [0.5], {"strategy": ["replay"]})], ACCURACY)
    assert any("declared protocols: finetune: ['x']; replay: none" in note for note in found.notes)


def test_a_number_that_there_is_not(runs):
    path = runs("a", [0.5])
    with pytest.raises(UsageError, match="must name at least one number"):
        compare_folders([path], ",", None, None, None, None, False)
    for key in ("average_acuracy", "strategy", "test_counts", "name"):
        with pytest.raises(UsageError, match="must be a number in summary"):
            compare([path], [key])


def test_runs_of_different_protocols_are_refused_and_the_keys_named(runs):
    runs("a", BASE)
    path = runs("b", BETTER, {"strategy": ["replay"], "scenario.tasks": 2, "partition.alpha": 0.1})
    with pytest.raises(UsageError, match="different protocols") as refused:
        compare([path], ACCURACY)
    text = str(refused.value)
    assert "partition.alpha (0.5 in" in text
    assert "scenario.tasks (5 in" in text
    assert "optimiser" not in text
    assert "\n" not in text
    found = compare([path], ACCURACY, across_protocols=True)
    assert {method.label for method in found.methods} == {
        "finetune (scenario.tasks=5, partition.alpha=0.5)", "replay (scenario.tasks=2, partition.alpha=0.1)",
    }  # fmt: skip
    assert found.protocols_differ == {"scenario.tasks": [5, 2], "partition.alpha": [0.5, 0.1]}
    assert any("different protocols" in note for note in found.notes)


def test_other_images_under_the_same_name_are_another_protocol(runs):
    runs("a", [0.5, 0.5])
    path = runs("b", [0.6, 0.6], {"strategy": ["replay"]}, summary={"test_counts": [10, 11]})
    with pytest.raises(UsageError, match=r"test_counts of seed 0 \(\[10, 10\]"):
        compare([path], ACCURACY)


def test_settings_beyond_the_stack_are_told(runs):
    runs("a", [0.5])
    found = compare([runs("b", [0.6], {"strategy": ["replay"], "optimiser.lr": 0.5})], ACCURACY)
    assert "the methods differ in more than their stacks: optimiser.lr (0.5 | 0.05)" in found.notes


def test_only_broken_runs(tmp_path, made_runs):
    folder = made_runs.make_run(tmp_path, "a", 0, 0.5, {}, {"status": "failed", "cause": "no memory"})
    with pytest.raises(UsageError, match=r"no finished run.*failed: no memory"):
        compare([folder])


def test_one_method_alone(runs):
    found = compare([runs("a", BASE)])
    assert found.pairs == ()
    assert found.estimates["average_accuracy"]["finetune"].rank is None


def test_the_rate_of_false_verdicts():
    """400 nulls of three methods at 10 seeds: any "ahead" is false, and rarer than 1 in 20 but for chance."""
    stream, false, runs = Stream("verdicts"), 0, 400
    metric, names = metric_of("average_accuracy"), ["a", "b", "c"]

    class Untold:
        runs = {seed: type("Run", (), {"metric": lambda self, key: None})() for seed in range(10)}

    for _ in range(runs):
        values = {name: {seed: stream.normal() for seed in range(10)} for name in names}
        sides = [("a", "b"), ("a", "c"), ("b", "c")]
        found = judged_pairs(metric, sides, values, dict.fromkeys(names, Untold()))
        false += any(pair.verdict in ("ahead", "behind") for pair in found)
    assert 0 < false / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
