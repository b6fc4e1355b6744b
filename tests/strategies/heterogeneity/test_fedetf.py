"""FedETF: the frame's angles, whole runs against a literal loop, and the personal tuning by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.call import below
from fedcl.federation.store import ClientStore
from fedcl.strategies.heterogeneity.fedetf import EquiangularClassifier

PREFIX = "extra.fedetf.classifier."
FRAME = PREFIX + "prototypes.weight"
ETF = {"strategy": ["fedetf"], "model.head_allocate": "all", "options.fedetf.dim": 12}


def literal_logits(w: Any, frame: Tensor, z: Tensor) -> Tensor:
    """Scale times cosine, image by image and class by class."""
    rows = []
    for feature in z:
        mu = w[PREFIX + "projection.weight"] @ feature + w[PREFIX + "projection.bias"]
        length = torch.sqrt((mu * mu).sum())
        rows.append(torch.stack([w[PREFIX + "scale"] * (mu * m).sum() / length for m in frame]))
    return torch.stack(rows)


def hidden(w: Any, x: Tensor) -> Any:
    out = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return out * (out > 0)


def balanced(scores: Tensor, labels: list[int], counts: list[int], classes: list[int]) -> Tensor:
    """-log of n_y e^o_y / sum_c n_c e^o_c, an absent class counting once."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(scores, labels, strict=True):
        below = torch.stack([max(counts[c], 1) * torch.exp(row[c]) for c in classes]).sum()
        total = total - torch.log(max(counts[label], 1) * torch.exp(row[label]) / below)
    return total / len(labels)


def frame_of(arrays: Any) -> Any:
    return arrays[FRAME].detach().to(torch.float64)


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (3, 2), (10, 9), (10, 64), (7, 20)])
def test_prototypes_are_an_equiangular_tight_frame(classes: int, dim: int) -> None:
    frame = EquiangularClassifier(5, dim, 10.0).prototypes.initial_rows("weight", list(range(classes)), 3).double()
    cosines = [[float(a @ b) for b in frame] for a in frame]
    for i, row in enumerate(cosines):
        for j, cosine in enumerate(row):
            assert cosine == pytest.approx(1.0 if i == j else -1 / (classes - 1), abs=1e-6)
    # The published form sqrt(C / (C - 1)) U (I - 1 1^T / C) has this very Gram matrix, whatever the orthonormal U.
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    gram = classes / (classes - 1) * centred @ centred
    torch.testing.assert_close(frame @ frame.T, gram, rtol=0, atol=1e-6)


def test_logits_are_scaled_cosines() -> None:
    module = EquiangularClassifier(3, 4, 10.0).double()
    frame = module.prototypes.initial_rows("weight", [0, 1, 2], 0).double()
    module.prototypes.weight = frame
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = {PREFIX + n: a for n, a in module.named_parameters()}
    torch.testing.assert_close(module(z), literal_logits(w, frame, z))
    assert float(module(z).detach().abs().max()) <= 10.0
    assert bool(module(torch.zeros(1, 3, dtype=torch.float64)).isfinite().all())


def _method(oracle: Any, frame: Tensor) -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        held = local.world.held[local.task][local.client]
        counts = [sum(local.world.y[i] == c for i in held) for c in range(len(local.world.order))]
        return balanced(literal_logits(w, frame, hidden(w, x)), y, counts, local.known)

    return oracle.Method(loss)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"federation.clients": 5, "federation.participation": 0.6, "scenario.tasks": 3, "options.fedetf.scale": 2.0},
        {"federation.clients": 1, "scenario.tasks": 1},
    ],
    ids=["default", "sampled", "one client"],
)
def test_whole_run_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any]) -> None:
    settings = {**ETF, "seed": 4, "optimiser.lr": 0.05, **settings}
    found = oracle.final(tiny(settings))
    frame = frame_of(found)
    assert float((frame @ frame.T + 1 / 9).fill_diagonal_(0).abs().max()) < 1e-6
    world = oracle.World.of(tiny_config(settings))
    world = replace(world, start={n: a for n, a in world.start.items() if n != FRAME})
    expected = oracle.federated(tiny_config(settings), _method(oracle, frame), world)
    assert oracle.distance({n: a for n, a in found.items() if n != FRAME}, expected) < 1e-9
    assert float(expected[PREFIX + "scale"]) != settings.get("options.fedetf.scale", 10.0)


def test_the_head_is_left_and_the_frame_stays(tiny: Any, tiny_config: Any, moved: Any, oracle: Any) -> None:
    settings = {**ETF, "optimiser.weight_decay": 0.01}  # would shrink a head that nobody trains
    result = tiny(settings)
    changed = {n for n in moved(result) if not n.startswith("encoder.")}
    assert changed == {PREFIX + n for n in ("projection.weight", "projection.bias", "scale")}
    world = oracle.World.of(tiny_config(settings))
    start = EquiangularClassifier(8, 12, 10.0).prototypes.initial_rows("weight", world.order, world.config.seed)
    assert torch.equal(frame_of(oracle.final(result)), start.double())


def test_predictions_are_those_of_the_classifier(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {**ETF, "scenario.tasks": 1, "data.limit": 60, "federation.rounds": 4}
    result = tiny(settings)
    w, experiment = oracle.final(result), build(tiny_config(settings))
    test, train = experiment.test, experiment.node.store
    every = train.gather(torch.arange(len(train))).to(torch.float64) / 255.0
    mean, std = every.mean(dim=(0, 2, 3), keepdim=True), every.std(dim=(0, 2, 3), keepdim=True, correction=0)
    x = ((test.gather(torch.arange(len(test))).to(torch.float64) / 255.0 - mean) / std).flatten(1)
    guess = literal_logits(w, frame_of(w), hidden(w, x)).argmax(dim=1)
    right = int((guess == torch.as_tensor(experiment.stream.test_labels)).sum())
    assert result.summary["average_accuracy"] == pytest.approx(right / len(x))
    assert right / len(x) > 0.2


def personal_models(result: Any) -> dict[int, Any]:
    """The personal model that each client has stored."""
    store = ClientStore(result.folder / "clients", 0)
    found = {client: below(store.get(client, 10**9), "fedetf/personal/") for client in store.clients()}
    return {client: arrays for client, arrays in found.items() if arrays}


def test_personal_tuning_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {
        **ETF, "scenario.tasks": 1, "federation.rounds": 1, "options.fedetf.alternations": 2,
        "options.fedetf.epochs": 2, "optimiser.lr": 0.02,
    }  # fmt: skip
    result = tiny(settings)
    whole, found = oracle.final(result), personal_models(result)
    world = oracle.World.of(tiny_config(settings))
    plain = oracle.final(tiny({**settings, "options.fedetf.alternations": 0}))
    assert oracle.identical(whole, plain)
    classes = list(range(10))
    tuned = 0
    for client, rows in enumerate(world.held[0]):
        if not rows:
            assert client not in found
            continue
        frame, last = frame_of(whole), world.config.federation.rounds
        key = (world.config.seed, "client", client, 0, last)
        received = {n: a for n, a in whole.items() if n != FRAME}
        local = oracle.Local(world, 0, received, None, {})
        w = oracle.train(client, last, local, _method(oracle, frame))
        z, labels = hidden(w, world.x[rows]).detach(), [world.y[i] for i in rows]
        size = world.config.federation.batch_size
        names = PREFIX + "projection.weight", PREFIX + "projection.bias"
        for turn in range(2):
            for part, lr, momentum, decay in (((FRAME,), 0.1, 0.0, 0.0), (names, 0.05, 0.9, 5e-4)):
                velocity: dict[str, Any] = {}
                for epoch in range(2):
                    order = counter.permutation(len(rows), *key, "fedetf", turn, part[0], epoch).tolist()
                    for at in range(0, len(rows), size):
                        places = order[at : at + size]
                        leaf = oracle.leaves({**w, FRAME: frame})
                        scores = literal_logits(leaf, leaf[FRAME], z[places])
                        value = oracle.cross_entropy(scores, [labels[i] for i in places], classes)
                        grads = oracle.gradient(value, leaf)
                        for n in part:
                            g = grads[n] + decay * leaf[n].detach()
                            velocity[n] = momentum * velocity.get(n, 0.0) + g
                            new = leaf[n].detach() - lr * velocity[n]
                            frame, w = (new, w) if n == FRAME else (frame, {**w, n: new})
        assert oracle.distance(found[client], {**w, FRAME: frame}) < 1e-9
        tuned += 1
    assert tuned >= 2


def test_clients_are_tested_with_their_tuned_models(tiny: Any) -> None:
    settings = {**ETF, "partition.test": "same_mix", "data.limit": 60, "partition.alpha": 0.1, "scenario.tasks": 1}
    plain = tiny(settings).summary
    tuned = tiny({**settings, "options.fedetf.alternations": 3}).summary
    assert tuned["average_accuracy"] == plain["average_accuracy"]
    assert plain["personal"]["average_accuracy"] != tuned["personal"]["average_accuracy"]


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({**ETF, "options.fedetf.alternations": 1, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model.head_allocate": "grow"}, r"model\.head_allocate"),
        ({"options.fedetf.dim": 8}, r"options\.fedetf\.dim"),
        ({"options.fedetf.dim": 0}, r"options\.fedetf"),
        ({"options.fedetf.scale": 0.0}, r"options\.fedetf"),
        ({"options.fedetf.scale": math.inf}, r"options\.fedetf"),
        ({"options.fedetf.alternations": -1}, r"options\.fedetf"),
        ({"options.fedetf.epochs": -1}, r"options\.fedetf"),
        ({"options.fedetf.lr_projection": 0.0}, r"options\.fedetf"),
        (
            {"options.fedetf.alternations": 2, "federation.passes": "once", "federation.epochs": None},
            r"federation\.passes",
        ),
    ],
)
def test_wrong_settings(tiny_config: Any, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key) as caught:
        build(tiny_config({**ETF, **changes}))
    assert "\n" not in str(caught.value)
