"""PRD against a literal loop with both axes of the relation; prototypes' means, prediction, and the edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.records.checkpoint import unpack_tensors

NAME = "extra.prd.prototypes.weight"
SMALL = {"strategy": ["prd"], "data.limit": 6, "model.projector_dim": 4, "model.head_allocate": "all"}


def features(w: Any, x: Any) -> Any:
    hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return hidden * (hidden > 0)


def embedded(w: Any, z: Any) -> Any:
    hidden = z @ w["projector.0.weight"].T + w["projector.0.bias"]
    return (hidden * (hidden > 0)) @ w["projector.2.weight"].T + w["projector.2.bias"]


def similar(w: Any, z: Any, classes: list[int]) -> Any:
    """(B, len(classes)): p_c f / ||p_c||."""
    return torch.stack([z @ w[NAME][c] / (w[NAME][c] @ w[NAME][c]).sqrt() for c in classes], dim=1)


def divergence(old: Any, new: Any) -> Any:
    """KL of two softmaxes of vectors."""
    top = [math.exp(float(v)) for v in old]
    below = torch.exp(new).sum()
    return sum(
        p / sum(top) * (math.log(p / sum(top)) - torch.log(torch.exp(v) / below)) for p, v in zip(top, new, strict=True)
    )


def contrastive(z: Any, y: list[int], tau: float) -> Any:
    z = z / (z * z).sum(1, keepdim=True).sqrt()
    total = 0.0
    for i in range(len(y)):
        below = sum(torch.exp(z[i] @ z[a] / tau) for a in range(len(y)) if a != i)
        mates = [p for p in range(len(y)) if p != i and y[p] == y[i]]
        total = total - sum(torch.log(torch.exp(z[i] @ z[p] / tau) / below) for p in mates) / len(mates) / len(y)
    return total


def method(oracle: Any, alpha: float = 2.0, beta: float = 4.0, axis: str = "sample", tau: float = 0.1) -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        x, y = torch.cat([x, x]), [*y, *y]
        z = features(w, x)
        value = contrastive(embedded(w, z), y, tau)
        for f, c in zip(z.detach(), y, strict=True):
            p = w[NAME][c]
            value = value + alpha * (1 - (p @ f) / (p @ p).sqrt() / (f @ f).sqrt()) / len(y)
        if local.task == 0:
            return value
        before = features(local.previous, x).detach()
        tasks = [local.world.new[t] for t in range(local.task)]
        if axis == "sample":
            for classes in tasks:
                new, old = similar(w, z, classes), similar(local.previous, before, classes)
                value = value + beta * sum(divergence(old[:, i], new[:, i]) for i in range(len(classes)))
        else:
            for classes in tasks:
                new, old = similar(w, z, classes), similar(local.previous, before, classes)
                value = value + beta * sum(divergence(old[j], new[j]) for j in range(len(y))) / len(y)
        return value

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        new = oracle.mean(w, outcomes, local)
        held = local.world.held[local.task]
        for c in local.new:
            counts = [sum(local.world.y[i] == c for i in held[o.client]) for o in outcomes]
            rows = [n * o.trained[NAME][c] for n, o in zip(counts, outcomes, strict=True)]
            new[NAME][c] = sum(rows) / sum(counts) if sum(counts) else w[NAME][c]
        return new

    return oracle.Method(loss, join=join)


def world(oracle: Any, config: Any, width: int = 8) -> Any:
    made = oracle.World.of(config)
    drawn = [counter.uniform(width, config.seed, "init", "prototypes", c) for c in made.order]
    rows = (2.0 * torch.from_numpy(np.stack(drawn)) - 1.0) / math.sqrt(width)
    made.start[NAME] = rows.to(torch.float32).to(torch.float64)
    return made


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"federation.rounds": 1, "scenario.tasks": 3}, {}),
        (
            {"federation.rounds": 1, "scenario.tasks": 3, "federation.participation": 0.67},
            {"axis": "class", "beta": 9.0},
        ),
        ({}, {"alpha": 0.5, "beta": 0.0, "tau": 0.5}),
    ],
    ids=["samples", "classes", "no relation"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    named = {"alpha": "attraction", "beta": "relation", "axis": "axis", "tau": "temperature"}
    given = {f"options.prd.{named[n]}": v for n, v in options.items()}
    settings = {**SMALL, "optimiser.lr": 0.02, "seed": 3, "data.limit": 4, **settings, **given}
    config = tiny_config(settings)
    expected = oracle.federated(config, method(oracle, **options), world(oracle, config))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-9


def test_the_attraction_never_reaches_the_encoder_and_the_relation_does(tiny: Any, oracle: Any) -> None:
    one, other, more = (
        oracle.final(tiny({**SMALL, "options.prd.attraction": a, "options.prd.relation": b}))
        for a, b in ((0.0, 0.0), (2.0, 0.0), (2.0, 4.0))
    )
    assert {n for n in one if not torch.equal(one[n], other[n])} == {NAME}
    assert not torch.equal(more["encoder.1.weight"], other["encoder.1.weight"])


def test_neither_weight_decay_nor_the_loss_touches_prototypes_of_later_classes(tiny: Any, oracle: Any) -> None:
    result = tiny({**SMALL, "optimiser.weight_decay": 0.1, "options.prd.relation": 0.0})
    final, early = oracle.final(result), unpack_tensors((result.folder / "base.safetensors").read_bytes())
    torch.testing.assert_close(final[NAME][:5], early[NAME][:5], rtol=0, atol=1e-12)
    assert (final[NAME][5:] - early[NAME][5:]).abs().max() > 1e-3
    slow = oracle.final(tiny({**SMALL, "options.prd.relation": 0.0, "options.prd.lr_scale": 1e-9}))
    assert torch.equal(
        slow["encoder.1.weight"], oracle.final(tiny({**SMALL, "options.prd.relation": 0.0}))["encoder.1.weight"]
    )
    assert (slow[NAME] - final[NAME]).abs().max() > 1e-3


def test_the_nearest_prototype_by_cosine_predicts(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**SMALL, "scenario.tasks": 1}
    result, experiment = tiny(settings), build(tiny_config(settings))
    w = oracle.final(result)
    x = experiment.test.batch(torch.arange(len(experiment.test)), torch.float64).flatten(1)
    z = features(w, x)
    cosines = [[float(f @ p / p.norm() / f.norm()) for p in w[NAME]] for f in z]
    right = [int(np.argmax(row)) == y for row, y in zip(cosines, experiment.test.label_tensor.tolist(), strict=True)]
    assert result.summary["average_accuracy"] == pytest.approx(np.mean(right), abs=1e-12)


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    result = tiny({"strategy": ["prd"], "model.projector_dim": 4, **hard})
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attraction", -1),
        ("relation", float("inf")),
        ("temperature", 0),
        ("relation_temperature", -1.0),
        ("lr_scale", 0),
        ("axis", "both"),
        ("alpha", 1),
    ],
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.prd") as caught:
        build(tiny_config({"strategy": ["prd"], f"options.prd.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
