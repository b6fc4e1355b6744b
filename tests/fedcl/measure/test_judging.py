"""What accuracies are of, where no head can have learned, and stacks that could not learn at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import UsageError
from fedcl.run import execute
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Settings = Callable[[Mapping[str, Any]], "Config"]


def test_accuracy_without_labels_is_a_probes(tiny: Tiny) -> None:
    common = {"strategy": ["simclr"], "labels.rate": 0.0, "scenario.tasks": 3, "data.validation": 0.25}
    for probe in ("knn", "linear", "nearest_mean"):
        result = tiny({**common, "evaluate.predict": probe, "evaluate.probes": [probe], "partition.test": "same_mix"})
        summary = result.summary
        assert f"a {probe} probe of frozen features" in summary["accuracy_of"]
        seen = [summary["probes"][probe][f"task_{task}"] for task in range(3)]
        assert result.matrix[2] == pytest.approx(seen)
        assert summary["spatial_forgetting"] is None
        assert {"spatial_forgetting", "forward_transfer"} <= set(summary["undefined"])
        assert 0 < summary["personal"]["average_accuracy"]["mean"] <= 1
    auto = tiny(common)
    assert "a knn probe of frozen features, trained on 20 training images of each class" in auto.summary["accuracy_of"]
    assert tiny({}).summary["accuracy_of"] == "the head"
    assert tiny({"strategy": ["nearest_mean"]}).summary["accuracy_of"] == "strategy nearest_mean"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"labels.rate": 0.0}, "finetune learns from labels only, and no client has a labelled image; strategies that "
         "learn from images without labels: barlow_twins"),
        ({"strategy": ["fedprox", "replay"], "labels.rate": 0.0}, "fedprox, replay learn from labels only"),
        ({"strategy": ["simclr"], "labels.rate": 0.0, "evaluate.predict": "head"}, "no image is labelled, so that no "
         "head learns"),
        ({"strategy": ["simclr"], "labels.rate": 0.0, "time.order": "asynchronous"}, "must be common with "
         "evaluate.predict=knn"),
    ],
)  # fmt: skip
def test_what_cannot_learn_is_refused_before_anything_runs(
    given: dict[str, Any], told: str, tiny_config: Settings
) -> None:
    config = tiny_config(given)
    with pytest.raises(UsageError) as caught:
        execute(config, progress=QuietProgress())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(config.output.dir).exists()
