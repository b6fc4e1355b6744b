"""Spatial and temporal forgetting of a run, against literal evaluations of the models that it passed through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]


@pytest.mark.parametrize("rule", ["same_mix", "holdout(0.3)"])
def test_one_client_loses_nothing_by_aggregation(tiny: Tiny, rule: str) -> None:
    summary = tiny({"federation.clients": 1, "partition.name": "iid", "partition.test": rule}).summary
    assert summary["spatial_forgetting"] == 0.0
    assert "spatial_forgetting" not in summary["undefined"]


def test_without_own_test_sets_it_is_undefined(tiny: Tiny) -> None:
    summary = tiny({}).summary
    assert summary["spatial_forgetting"] is None
    assert "spatial_forgetting" in summary["undefined"]


def test_temporal_forgetting_is_what_the_next_task_takes(tiny: Tiny) -> None:
    result = tiny({"scenario.tasks": 3})
    r = result.matrix
    expected = ((r[0][0] or 0) - (r[1][0] or 0) + (r[1][1] or 0) - (r[2][1] or 0)) / 2
    assert result.summary["temporal_forgetting"] == pytest.approx(expected, abs=1e-15)


def test_spatial_forgetting_is_that_of_the_last_round(tiny: Tiny, tiny_config: Callable[..., Any]) -> None:
    from fedcl.build import build
    from fedcl.federation import chunks
    from fedcl.local import training

    settings = {"partition.test": "same_mix", "scenario.tasks": 1, "federation.rounds": 1, "partition.alpha": 0.3,
                "engine.path": "sequential"}  # fmt: skip
    models: dict[int, Any] = {}
    original = training.train_client

    def caught(client: training.Client) -> training.Trained:
        result = original(client)
        models[client.id] = result.arrays
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "train_client", caught)
        result = tiny(settings)
    experiment = build(tiny_config(settings))
    tests = experiment.split.test
    assert tests is not None
    alone = together = total = 0
    final = {n: a.detach() for n, a in result.model.state_dict().items()}
    for client, arrays in models.items():
        rows = tests[0][client]
        if not len(rows):
            continue
        images, labels = experiment.test.batch(torch.from_numpy(rows), experiment.node.dtype), (
            experiment.stream.test_labels[rows]
        )  # fmt: skip
        for which, holder in ((arrays, "alone"), (final, "together")):
            scores = experiment.node.forward(which, images, "eval").logits
            hits = int((scores.argmax(dim=1).numpy() == labels).sum())
            alone, together = (alone + hits, together) if holder == "alone" else (alone, together + hits)
        total += len(rows)
    assert result.summary["spatial_forgetting"] == pytest.approx((alone - together) / total, abs=1e-15)


def test_right_among_the_best_scores(tiny: Tiny) -> None:
    """Two of two classes are always right; the model is the same whatever is asked of it."""
    first, second, all_ = (tiny({"evaluate.top": top, "scenario.tasks": 2}) for top in (1, 2, 10))
    assert first.summary["model_sha256"] == second.summary["model_sha256"]
    for row, wider in zip(first.matrix, second.matrix, strict=True):
        assert all(a is None or a <= b for a, b in zip(row, wider, strict=True))
    assert first.summary["average_accuracy"] < second.summary["average_accuracy"]
    assert all_.matrix[-1] == [1.0, 1.0]
    assert "2 best" in second.summary["accuracy_of"]
