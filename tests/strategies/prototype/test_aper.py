"""APER: prototypes of two encoders side by side, exact over partitions, with the initial encoder kept for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.models.arrays import grow_head
from fedcl.records.checkpoint import load_newest


def both(lab: Any, part: str, initial: dict[str, Tensor]) -> Tensor:
    """(n, 2d): features of the initial and of the present encoder."""
    return torch.cat([lab.features(part, {**lab.arrays, **initial}), lab.features(part)], dim=1)


def another(lab: Any) -> dict[str, Tensor]:
    """An encoder that the adapted one is not."""
    return {n: (50.0 * a).sin() for n, a in lab.arrays.items() if n.startswith("encoder.")}


def literal(lab: Any, initial: dict[str, Tensor], classes: range = range(10)) -> Tensor:
    """Cosines with the class means, image by image."""
    train, test = both(lab, "train", initial), both(lab, "test", initial)
    means = [train[[i for i, y in enumerate(lab.labels) if y == c]].mean(0) for c in classes]
    return torch.stack([torch.stack([f @ m / (f.norm() * m.norm()) for m in means]) for f in test])


def test_any_partition_gives_the_centralised_head(pooled: Any, partition: tuple[int, int, float, int]) -> None:
    lab = pooled("aper")
    initial = another(lab)
    lab.down = {f"initial/{n}": a for n, a in initial.items()}
    clients, nodes, skew, seed = partition
    scores = lab.scores(lab.asked(lab.rows(clients, skew, seed), min(nodes, clients)))
    expected = literal(lab, initial) if seed < 2 else lab.scores(lab.asked([list(range(len(lab.labels)))]))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-8)


def test_where_both_encoders_are_one_it_is_simplecil(pooled: Any) -> None:
    lab, simple = pooled("aper"), pooled("simplecil")
    lab.down = {f"initial/{n}": a for n, a in lab.arrays.items() if n.startswith("encoder.")}
    rows = lab.rows(3, 0.5, 0)
    torch.testing.assert_close(lab.scores(lab.asked(rows)), simple.scores(simple.asked(rows)), rtol=0, atol=1e-12)


def test_a_run_keeps_the_initial_encoder_and_the_one_of_the_first_task(
    tiny: Any, tiny_config: Any, oracle: Any
) -> None:
    settings = {"strategy": ["aper"], "scenario.tasks": 3, "model.norm": "batch", "optimiser.weight_decay": 0.1}
    result, experiment = tiny(settings), build(tiny_config(settings))
    first, arrays = oracle.final(tiny({**settings, "scenario.first": 1})), oracle.final(result)
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    kept = {n.removeprefix("strategy/aper/"): a for n, a in found.arrays.items() if n.startswith("strategy/aper/")}
    encoder = [n for n in arrays if n.startswith("encoder.")]
    assert {n for n in kept if n.startswith("initial/")} == {f"initial/{n}" for n in encoder}
    assert all(torch.equal(kept[f"initial/{n}"], experiment.initial[n]) for n in encoder)
    assert all(torch.equal(first[n], arrays[n]) for n in encoder)
    assert not any(torch.equal(first[n], experiment.initial[n]) for n in encoder if not n.endswith("tracked"))

    node, stages = experiment.node, experiment.stream.stages
    grown = grow_head(experiment.initial, node.model, experiment.stream.class_order, 0)

    def features(store: Any, ids: Any) -> Tensor:
        x = store.batch(torch.as_tensor(ids), torch.float64)
        return torch.cat([node.forward(a, x, "eval").features.detach() for a in (grown, arrays)], dim=1)

    labels = node.store.label_tensor
    means = torch.stack([features(node.store, torch.nonzero(labels == c).flatten()).mean(0) for c in range(10)])
    for j in range(3):
        f = features(experiment.test, stages[j].test_ids)
        cosine = torch.nn.functional.cosine_similarity(f[:, None], means[None], dim=2)
        right = float((cosine.argmax(1).numpy() == experiment.stream.test_labels[stages[j].test_ids]).mean())
        assert result.matrix[2][j] == pytest.approx(right, abs=1e-12)


def test_the_initial_encoder_is_charged_once_a_task_and_client(tiny: Any) -> None:
    ours, simple = tiny({"strategy": ["aper"]}), tiny({"strategy": ["simplecil"], "options.simplecil.adapt": "first"})
    encoder = (64 * 8 + 8) * 8
    assert ours.summary["bytes_down"] - simple.summary["bytes_down"] == 2 * 3 * encoder
    assert ours.summary["bytes_up"] - simple.summary["bytes_up"] == 3 * (5 + 10) * 8 * 8


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    matrix = tiny({"strategy": ["aper"], "optimiser.lr": 0.01, **hard}).matrix
    assert all(v is not None and 0 <= v <= 1 for t, row in enumerate(matrix) for v in row[: t + 1])


def test_wrong_settings(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.aper"):
        build(tiny_config({"strategy": ["aper"], "options.aper.adapt": "none"}))
    with pytest.raises(UsageError, match=r"time\.order"):
        build(tiny_config({"strategy": ["aper"], "time.order": "asynchronous"}))
