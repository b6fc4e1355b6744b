"""FedProto against a literal loop of private models, its prediction by hand, and what leaves a client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.models.model import Output
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.prototype.fedproto import FedProto, prototype_distance
from fedcl.strategy import Predictor

Run = Callable[[Mapping[str, Any]], Any]


def features(w: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return hidden * (hidden > 0)


def literal(oracle: Any, config: Any, weight: float, average: str) -> tuple[list[Any], dict[int, torch.Tensor]]:
    """Every client's own model and the prototypes at the end, image by image."""
    world = oracle.World.of(config)
    prototypes: dict[int, torch.Tensor] = {}

    def loss(w: Any, x: torch.Tensor, y: list[int], local: Any) -> torch.Tensor:
        apart = torch.zeros((), dtype=torch.float64)
        for row, label in zip(features(w, x), y, strict=True):
            if label in local.memory:
                apart = apart + ((row - local.memory[label]) ** 2).sum()
        entropy: torch.Tensor = oracle.cross_entropy(oracle.logits(w, x), y, local.known)
        return entropy + weight * apart / (len(y) * len(w["encoder.1.bias"]))

    models = [world.start for _ in range(config.federation.clients)]
    for task, known in enumerate(world.known):
        models = [oracle.grown(w, world, len(known)) for w in models]
        for round_ in range(config.federation.rounds):
            told: dict[int, list[tuple[torch.Tensor, int]]] = {}
            for client in range(len(models)):
                local = oracle.Local(world, task, models[client], None, dict(prototypes), client)
                models[client] = oracle.train(client, round_, local, oracle.Method(loss)) or models[client]
                rows = world.held[task][client]
                for label in {world.y[i] for i in rows}:
                    own = [i for i in rows if world.y[i] == label]
                    total = sum(features(models[client], world.x[[i]])[0] for i in own)
                    told.setdefault(label, []).append((torch.as_tensor(total), len(own)))
            for label, sums in told.items():
                if average == "samples":
                    prototypes[label] = sum(s for s, _ in sums) / sum(n for _, n in sums)
                else:
                    prototypes[label] = sum(s / n for s, n in sums) / len(sums)
    return models, prototypes


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}),
        ({"average": "clients", "weight": 0.3}, {"engine.path": "stacked", "federation.epochs": 2}),
        ({"weight": 0.0}, {"scenario.tasks": 3}),
        ({}, {"federation.clients": 6, "partition.alpha": 0.1, "partition.min_size": 0}),
    ],
    ids=["default", "mean of means, stacked", "weight 0", "clients without images"],
)
def test_private_models_and_prototypes_are_those_of_the_literal_loop(
    tiny: Run, tiny_config: Any, oracle: Any, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    settings = {"strategy": ["fedproto"], **settings, **{f"options.fedproto.{n}": v for n, v in options.items()}}
    result, config = tiny(settings), tiny_config(settings)
    models, prototypes = literal(oracle, config, **{"weight": 1.0, "average": "samples", **options})
    store = ClientStore(result.folder / "clients", 0)
    trained = [k for k in range(config.federation.clients) if store.get(k, 10**6)]
    assert trained, "clients keep their models"
    width = len(models[0]["head.weight"])
    for client in trained:
        own = store.get(client, 10**6)
        for name, array in models[client].items():
            mine = own[f"private/{name}"]
            # Rows of classes that a client has not met in training yet are drawn when it is next called.
            assert torch.allclose(mine, array[: len(mine)], atol=1e-10)
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    means = found.arrays["strategy/fedproto/prototypes"]
    counts = found.arrays["strategy/fedproto/counts"]
    assert set(torch.nonzero(counts).flatten().tolist()) == set(prototypes)
    assert len(means) <= width
    for label, mean in prototypes.items():
        assert torch.allclose(means[label], mean, atol=1e-10)


def test_distance_and_its_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    f = torch.randn(5, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    p = torch.randn(4, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    labels, held = [0, 3, 1, 3, 2], [True, False, True, True]
    found = prototype_distance(f, torch.tensor(labels), p, torch.tensor(held))
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(f, labels, strict=True):
        if held[label]:
            for one, other in zip(row, p[label].detach(), strict=True):
                total = total + (one - other) ** 2
    expected = total / (5 * 3)
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
    slopes = [torch.autograd.grad(v, f, retain_graph=True)[0] for v in (found, expected)]
    assert torch.allclose(slopes[0], slopes[1])
    assert not slopes[0][2].any(), "a class without a prototype pulls nowhere"
    assert torch.autograd.grad(found, p, allow_unused=True)[0] is None


def test_no_term_before_the_first_prototypes(oracle: Any) -> None:
    w = oracle.model(3, 2, 2, seed=0)
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [0], known=[0, 1], new=[0, 1], task=0)
    assert FedProto().loss(step) == {}


def test_nothing_of_the_model_travels(tiny: Run) -> None:
    summary = tiny({"strategy": ["fedproto"]}).summary
    five, ten = 5 * 8 * 8 + 5 * 8, 10 * 8 * 8 + 10 * 8
    assert summary["bytes_up"] == 3 * 2 * (five + ten)
    down = [0, 5 * 8 * 8 + 5, 10 * 8 * 8 + 10, 10 * 8 * 8 + 10]
    assert summary["bytes_down"] == 3 * sum(down), "none before the first round"


def predictor(known: list[bool], counts: list[int]) -> Predictor:
    def models(x: torch.Tensor, which: Any, mode: str, taps: Any = (), seed: Any = None) -> Output:
        return Output(x, None, torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(len(x), 4), {})

    state = {"prototypes": torch.tensor([[0.0, 0.0], [3.0, 0.0], [9.0, 9.0]]), "counts": torch.tensor(counts)}
    return Predictor({}, state, torch.tensor(known), models)  # type: ignore[arg-type]


def test_the_nearest_prototype_predicts() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [8.0, 9.0]])
    scores = FedProto().predict(predictor([True] * 4, [2, 1, 0]), x)
    assert scores[:, :2].tolist() == [
        [-1.0, -2.0],
        [-2.0, -1.0],
        [pytest.approx(-(145**0.5)), pytest.approx(-(106**0.5))],
    ]
    assert bool((scores[:, 2:] == -torch.inf).all()), "a class without a prototype, and one of a wider head"
    by_head = FedProto(FedProto.Options(predict="head")).predict(predictor([True] * 4, [2, 1, 0]), x)
    assert by_head.argmax(dim=1).tolist() == [3, 3, 3]


def test_where_no_class_has_a_prototype_the_head_predicts() -> None:
    x = torch.zeros(1, 2)
    for known, counts in (([True] * 4, [0, 0, 0]), ([False, False, True, True], [1, 1, 0])):
        assert FedProto().predict(predictor(known, counts), x).tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_clients_are_judged_by_their_own_models(tiny: Run) -> None:
    settings = {
        "strategy": ["fedproto"], "partition.test": "same_mix", "scenario.tasks": 1, "federation.rounds": 4,
        "federation.epochs": 4, "data.limit": 30, "model.width": 32, "optimiser.lr": 0.02,
    }  # fmt: skip
    summary = tiny(settings).summary
    assert summary["personal"]["average_accuracy"]["weighted_mean"] > 0.6
    assert summary["average_accuracy"] < 0.5, "the global model is never trained"


@pytest.mark.parametrize(("name", "value"), [("weight", -1), ("average", "mean"), ("predict", "both"), ("mu", 1)])
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fedproto") as caught:
        build(tiny_config({"strategy": ["fedproto"], f"options.fedproto.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
