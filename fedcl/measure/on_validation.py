"""``evaluate.on=validation``: a run that measures on held-out training images and cannot read a test image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.store import Dataset
    from ..stream import Split, Stream


def on_validation(dataset: Dataset, stream: Stream, split: Split) -> tuple[Dataset, Stream, Split]:
    """Data, stream and split with the held-out training images in the place of the test images.

    The test store is gone from what is returned: whatever a run measures, its matrix and its probes included, is of the
    validation images. Clients' own test sets stay where they are of training images, else they go too.
    """
    stages = tuple(replace(stage, test_ids=stage.validation_ids) for stage in stream.stages)
    unnamed = stream.unnamed[1], stream.unnamed[1]
    stream = replace(stream, stages=stages, test_labels=stream.train_labels, unnamed=unnamed)
    columns = {name: (train, train) for name, (train, _) in dataset.columns.items()}
    dataset = replace(dataset, test=dataset.train, test_domains=dataset.train_domains, columns=columns)
    held_out = None if split.held_out is None else _without_test_images(split.held_out)
    return dataset, stream, replace(_without_test_images(split), held_out=held_out)


def _without_test_images(split: Split) -> Split:
    return split if split.test_store == "train" else replace(split, test=None, test_store=None)
