"""Noisy labels: a share of each class's training labels is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from fedcl import config as settings
from fedcl import random as counter
from fedcl.cards import Card
from fedcl.errors import UsageError
from fedcl.stream import DatasetLabels, Ids, Stream

from ._rows import share
from ._wrapping import OF, Wrapping

if TYPE_CHECKING:
    from fedcl.data.store import Dataset

CLEAN = "clean_label"
"""The column of the dataset that keeps the original labels."""


class NoisyLabels(Wrapping):
    """Another stream with wrong training labels."""

    name = "noisy_labels"
    aliases = ("label_noise",)
    summary = "wrong training labels (scenario.noise, noise_rate) in any other stream (scenario.of)"
    card = Card(
        title="Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach",
        authors="Patrini et al.",
        venue="CVPR",
        year=2017,
        certainty="Certain for the two kinds of noise. Papers differ on whether symmetric noise may hit the true class "
        "(here never), and on the pairs of asymmetric noise (here: the next class). That noise stays inside a task is "
        "needed in a stream, where a label of a later class would give it away.",
        notes="In each task, of the n training images of a class that it shows, noise_rate * n (rounded half up) get "
        "another label of the same task: symmetric a uniformly drawn one, asymmetric the next class by original id, "
        "the last one's next being the first. Test images and held-out images keep their labels; the original labels "
        f"stay in the dataset's column {CLEAN}. Images are dealt to clients by the labels that are seen. {OF}",
    )
    own = ("noise", "noise_rate")

    def images(self, dataset: Dataset, data: settings.Data, config: settings.Scenario, seed: int) -> Dataset:
        """The dataset of the changed scenario with noisy training labels; the originals are a column."""
        shown = super().images(dataset, data, config, seed)
        scenario, inner = self.inner(config)
        rate = share("scenario.noise_rate", config.noise_rate)
        labels = DatasetLabels.of(shown)
        stream = scenario.build(labels, inner, data.validation, seed)
        if stream.repeats:
            allowed = f"streams that show an image once; put the noise inside: name={inner.name}, of=[{self.name}]"
            raise UsageError("scenario.of", [inner.name], allowed)
        noisy = noisy_labels(labels.train_labels, stream, config.noise, rate, seed)
        columns = {**shown.columns, CLEAN: (shown.train.labels, shown.test.labels)}
        return replace(shown, train=shown.train.relabelled(noisy), columns=columns)

    def build(self, data: DatasetLabels, config: settings.Scenario, validation: float, seed: int) -> Stream:
        """See :meth:`fedcl.stream.Scenario.build`; ``data`` holds the labels of :meth:`images`."""
        scenario, inner = self.inner(config)
        clean = replace(data, train_labels=data.columns[CLEAN][0])
        stream = scenario.build(clean, inner, validation, seed)
        position = np.argsort(stream.class_order)
        return replace(stream, name=self.name, train_labels=position[data.train_labels])


def noisy_labels(labels: Ids, stream: Stream, noise: str, rate: Fraction, seed: int) -> Ids:
    """Training labels (N,) with the noise of each task's training rows.

    Args:
        labels: (N,) original class ids.
        stream: whose tasks the noise stays in.
        noise: ``symmetric`` or ``asymmetric``.
        rate: share of the rows of each class, in [0, 1].
        seed: of the run.

    Raises:
        UsageError: a task shows one class only.
    """
    noisy = labels.copy()
    for stage in stream.stages:
        classes = np.unique(labels[stage.train_ids]).tolist()
        if rate and len(classes) == 1:
            allowed = f"0 where a task has one class: task {stage.index + 1} has no other label to give"
            raise UsageError("scenario.noise_rate", float(rate), allowed)
        for place, label in enumerate(classes):
            name = (seed, NoisyLabels.name, stage.index, label)
            rows = stage.train_ids[labels[stage.train_ids] == label]
            wrong = rows[counter.permutation(len(rows), *name)[: math.floor(rate * len(rows) + Fraction(1, 2))]]
            if noise == "asymmetric":
                noisy[wrong] = classes[(place + 1) % len(classes)]
            else:
                others = np.array(classes[:place] + classes[place + 1 :], dtype=np.int64)
                draws = counter.Stream(*name, "label")
                noisy[wrong] = others[[draws.below(len(others)) for _ in wrong]] if len(wrong) else 0
    return noisy
