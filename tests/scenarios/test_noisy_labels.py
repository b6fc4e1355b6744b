"""Noisy labels: how many, which, where not, and that a run trains on them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl.build import build
from fedcl.data.sources import load_dataset
from fedcl.errors import UsageError
from fedcl.scenarios.class_incremental import ClassIncremental
from fedcl.scenarios.noisy_labels import CLEAN, NoisyLabels, noisy_labels
from fedcl.stream import DatasetLabels


def labels_of(classes=9, each=20):
    return DatasetLabels(np.arange(classes * each) % classes, np.arange(classes * 2) % classes, classes)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    noise=st.sampled_from(["symmetric", "asymmetric"]), percent=st.integers(0, 100), tasks=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_exactly_the_share_of_every_class_is_wrong_and_stays_in_its_task(noise, percent, tasks, seed):
    data = labels_of()
    stream = ClassIncremental().build(data, settings.Scenario(tasks=tasks), 0.25, seed)
    noisy = noisy_labels(data.train_labels, stream, noise, Fraction(percent, 100), seed)
    wrong = noisy != data.train_labels
    for stage in stream.stages:
        assert not wrong[stage.validation_ids].any()
        classes = sorted(stream.class_order[label] for label in stage.classes)
        assert set(noisy[stage.train_ids].tolist()) <= set(classes)
        for place, label in enumerate(classes):
            mine = stage.train_ids[data.train_labels[stage.train_ids] == label]
            assert wrong[mine].sum() == (percent * len(mine) * 2 + 100) // 200
            if noise == "asymmetric":
                assert set(noisy[mine][wrong[mine]].tolist()) <= {classes[(place + 1) % len(classes)]}


def test_symmetric_noise_is_uniform_over_the_other_classes():
    data = labels_of(5, 2000)
    stream = ClassIncremental().build(data, settings.Scenario(tasks=1), 0.0, 0)
    noisy = noisy_labels(data.train_labels, stream, "symmetric", Fraction(1, 2), 0)
    table = np.zeros((5, 5), dtype=int)
    np.add.at(table, (data.train_labels, noisy), 1)
    assert np.diag(table).tolist() == [1000] * 5
    others = table[~np.eye(5, dtype=bool)]
    # 1,000 draws over four classes: a standard deviation of 13.7
    assert abs(others - 250).max() < 60


def test_stored_labels():
    data = labels_of()
    stream = ClassIncremental().build(data, settings.Scenario(tasks=3), 0.1, 5)
    noisy = [noisy_labels(data.train_labels, stream, kind, Fraction(3, 10), 5) for kind in ("symmetric", "asymmetric")]
    found = [hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()[:16] for labels in noisy]
    assert found == STORED


STORED = ["699f076ec91f8ab3", "77bdfe6d9d4de528"]


def test_a_run_trains_on_them_and_is_tested_on_the_originals(tiny_config):
    noise = {"scenario.name": "noisy_labels", "scenario.noise_rate": 0.4, "data.validation": 0.25}
    config = tiny_config(noise)
    experiment = build(config)
    plain = build(tiny_config({"data.validation": 0.25}))
    seen, true = experiment.node.store.labels, plain.node.store.labels
    for mine, theirs in zip(experiment.stream.stages, plain.stream.stages, strict=True):
        assert (mine.train_ids == theirs.train_ids).all()
        assert (seen[mine.validation_ids] == true[mine.validation_ids]).all()
        assert (seen[mine.train_ids] != true[mine.train_ids]).mean() == pytest.approx(0.4, abs=0.05)
    assert (experiment.stream.train_labels == seen).all()
    assert (experiment.test.labels == plain.test.labels).all()
    dataset = load_dataset(config.data)
    shown = NoisyLabels().images(dataset, config.data, config.scenario, config.seed)
    assert (shown.columns[CLEAN][0] == dataset.train.labels).all()
    assert (shown.train.labels != dataset.train.labels).any()


def test_rate_zero_changes_nothing(tiny):
    plain = tiny({})
    noisy = tiny({"scenario.name": "noisy_labels", "scenario.noise_rate": 0.0})
    assert noisy.summary["model_sha256"] == plain.summary["model_sha256"]


def test_noise_over_a_long_tail_over_a_blurry_stream(tiny_config):
    config = tiny_config({
        "scenario.name": "noisy_labels", "scenario.of": ["long_tailed", "i_blurry"], "scenario.imbalance": 4.0,
        "scenario.noise_rate": 0.5,
    })  # fmt: skip
    stream = build(config).stream
    unchanged = build(replace(config, scenario=replace(config.scenario, noise_rate=0.0))).stream
    for mine, theirs in zip(stream.stages, unchanged.stages, strict=True):
        assert (mine.train_ids == theirs.train_ids).all()
        assert (stream.train_labels[mine.train_ids] != unchanged.train_labels[mine.train_ids]).any()


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({"scenario.noise_rate": 1.2}, "scenario.noise_rate", "[0, 1]"),
        ({"scenario.noise_rate": -0.2}, "scenario.noise_rate", "[0, 1]"),
        ({"scenario.noise": "symetric"}, "scenario.noise", "Did you mean 'symmetric'"),
        ({"scenario.tasks": 10}, "scenario.noise_rate", "task 1 has no other label to give"),
        ({"scenario.of": ["noisy_labels"]}, "scenario.of", "other scenarios than noisy_labels"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, key, text, tiny_config):
    with pytest.raises(UsageError) as caught:
        build(tiny_config({"scenario.name": "noisy_labels", **options}))
    assert caught.value.key == key
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
