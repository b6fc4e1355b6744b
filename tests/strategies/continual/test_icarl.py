"""iCaRL against literal loops and Avalanche's loss: what is chosen, what is distilled, what predicts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.memory import herding
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.local.client import NamedModels
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.continual.icarl import ICaRL, binary_distillation
from fedcl.strategy import Predictor

IMAGE = 64
"""Bytes of a digit."""


def _chosen(features: list[Tensor], mean: Tensor, count: int) -> list[int]:
    """Herding, candidate by candidate."""
    picked: list[int] = []
    for k in range(1, count + 1):
        best = None
        for i, feature in enumerate(features):
            if i in picked:
                continue
            running = feature.clone()
            for j in picked:
                running = running + features[j]
            distance = float(((mean - running / k) ** 2).sum()) ** 0.5
            if best is None or distance < best[0] - 1e-12:
                best = distance, i
        assert best is not None
        picked.append(best[1])
    return picked


def _features(oracle: Any, w: Any, x: Tensor) -> list[Tensor]:
    hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return [row / row.norm() for row in hidden * (hidden > 0)]


def test_herding_equals_plain_loops() -> None:
    make = torch.Generator().manual_seed(2)
    features = torch.randn(9, 3, generator=make, dtype=torch.float64)
    for mean in (features.mean(dim=0), torch.zeros(3, dtype=torch.float64)):
        assert herding(features, mean, 9).tolist() == _chosen(list(features), mean, 9)
    assert herding(features[:0], features[0], 0).tolist() == []
    assert herding(features[:1].repeat(3, 1), features[0], 3).tolist() == [0, 1, 2]


def test_loss_equals_plain_loops_and_avalanches_plugin(oracle: Any) -> None:
    make = torch.Generator().manual_seed(2)
    logits, teacher = torch.randn(4, 5, generator=make), torch.randn(4, 3, generator=make)
    labels, old = torch.tensor([3, 0, 1, 3]), torch.tensor([True, True, True, False, False])
    known = torch.tensor([True, True, True, True, False])
    total = 0.0
    for i in range(4):
        for c in range(4):
            target = float(teacher[i, c].sigmoid()) if c < 3 else float(labels[i] == c)
            p = float(logits[i, c].sigmoid())
            total -= target * torch.tensor(p).log().item() + (1 - target) * torch.tensor(1 - p).log().item()
    found = binary_distillation(logits, labels, teacher, known, old)
    assert found.item() == pytest.approx(total / 16, rel=1e-5)
    losses = pytest.importorskip("avalanche.training.losses")
    plugin = losses.ICaRLLossPlugin()
    plugin.old_logits, plugin.old_classes = torch.nn.functional.pad(teacher, (0, 2)), [0, 1, 2]
    everything = torch.ones(5, dtype=torch.bool)
    ours = binary_distillation(logits, labels, teacher, everything, old)
    assert ours.item() == pytest.approx(plugin(logits, labels).item(), rel=1e-5)


def _method(oracle: Any, loss: str) -> Any:
    def value(w: Any, x: Any, y: Any, local: Any) -> Any:
        scores, old = oracle.logits(w, x), local.old if local.previous is not None else []
        teacher = oracle.logits(local.previous, x) if old else scores
        if loss == "softmax":
            found = oracle.cross_entropy(scores, y, local.known)
            return found + 0.7 * oracle.soft_cross_entropy(scores, teacher, old, 2.0) if old else found
        total = torch.zeros((), dtype=torch.float64)
        for row, before, label in zip(scores, teacher.detach(), y, strict=True):
            for c in local.known:
                target = 1 / (1 + torch.exp(-before[c])) if c in old else torch.tensor(float(c == label))
                p = 1 / (1 + torch.exp(-row[c]))
                total = total - target * torch.log(p) - (1 - target) * torch.log(1 - p)
        return total / (len(y) * len(local.known))

    return oracle.Method(value)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_training_without_exemplars_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, loss: str
) -> None:
    settings = {
        "strategy": ["icarl"], "options.icarl.budget": 0, "options.icarl.loss": loss, "options.icarl.weight": 0.7,
    }  # fmt: skip
    expected = oracle.federated(tiny_config(settings), _method(oracle, loss))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


@pytest.mark.parametrize("towards", ["global", "local"])
def test_exemplars_and_predictions_equal_the_literal_ones(
    tiny: Any, tiny_config: Any, oracle: Any, towards: str
) -> None:
    settings = {"strategy": ["icarl"], "options.icarl.budget": 9 * IMAGE + 5, "options.icarl.herding": towards}
    result, first = tiny(settings), tiny({**settings, "scenario.first": 1})
    store, before = (ClientStore(r.folder / "clients", 0) for r in (result, first))
    world, w = oracle.World.of(tiny_config(settings)), oracle.final(result)
    features = dict(enumerate(_features(oracle, w, world.x)))
    held: dict[int, list[int]] = {}
    for k in range(3):
        state, old = store.get(k, 10**6), before.get(k, 10**6)["icarl/ids"].tolist()
        rows, ranks = state["icarl/ids"].tolist(), state["icarl/rank"].tolist()
        assert len(rows) == min(9, sum(len(task[k]) for task in world.held))
        mine: dict[int, list[int]] = {}
        for row, rank in sorted(zip(rows, ranks, strict=True), key=lambda pair: pair[1]):
            assert rank == len(mine.setdefault(world.y[row], []))  # the first of each class, without a gap
            mine[world.y[row]].append(row)
        assert max(map(len, mine.values())) - min(map(len, mine.values())) <= 1 or len(rows) < 9
        for label, chosen in mine.items():
            if label in world.new[0]:
                assert set(chosen) <= set(old)
            else:
                own = [r for r in sorted(world.held[1][k]) if world.y[r] == label]
                pool = own if towards == "local" else [r for c in world.held[1] for r in c if world.y[r] == label]
                mean = torch.stack([features[r] for r in pool]).mean(dim=0)
                expected = _chosen([features[r] for r in own], mean, len(chosen))
                assert chosen == [own[i] for i in expected]
            held.setdefault(label, []).extend(chosen)
    checkpoint = load_newest(result.folder / "checkpoints", lambda text: None)
    assert checkpoint is not None
    kept = {n: checkpoint.arrays[f"strategy/icarl/{n}"] for n in ("sums", "counts")}
    means = {c: torch.stack([features[r] for r in rows]).mean(dim=0) for c, rows in held.items()}
    assert {c: int(n) for c, n in enumerate(kept["counts"]) if n} == {c: len(rows) for c, rows in held.items()}
    node = build(tiny_config(settings)).node
    known = torch.ones(10, dtype=torch.bool)
    predictor = Predictor(w, kept, known, NamedModels(node, {}))
    x = node.store.batch(torch.arange(20), torch.float64)
    scores = ICaRL().predict(predictor, x)
    for i in range(20):
        distances = {c: float((features[i] - m / m.norm()).norm()) for c, m in means.items()}
        assert int(scores[i].argmax()) == min(distances, key=lambda c: distances[c])
        for c, distance in distances.items():
            assert float(scores[i, c]) == pytest.approx(-distance, abs=1e-9)


def test_one_client_herds_alike_either_way(tiny: Any, oracle: Any) -> None:
    one = {"strategy": ["icarl"], "federation.clients": 1, "options.icarl.budget": 9 * IMAGE, "federation.rounds": 1}
    results = [tiny({**one, "options.icarl.herding": towards}) for towards in ("global", "local")]
    assert oracle.identical(*(oracle.final(r) for r in results))
    first, second = (ClientStore(r.folder / "clients", 0).get(0, 10**6)["icarl/ids"] for r in results)
    assert torch.equal(first, second)


def test_a_class_without_a_global_mean_is_herded_by_its_own() -> None:
    """An exchange may describe the classes of other clients than those that choose."""
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    labels, method = torch.tensor([0, 0, 0, 1]), ICaRL()
    ctx: Any = SimpleNamespace(
        ids=torch.arange(4), labels=labels, state={}, store=SimpleNamespace(image_bytes=1, label_tensor=labels),
        batches=lambda ids: [(features[ids], labels[ids])],
        forward=lambda x: SimpleNamespace(features=x),
    )  # fmt: skip
    first = {}
    for name, down in (("none", {}), ("zero", {"means": torch.zeros(2, 2)}), ("given", {"means": features[[0, 3]]})):
        ctx.down = down
        _, state = method.choose(ctx)
        first[name] = state["ids"][(state["rank"] == 0) & (labels[state["ids"]] == 0)].tolist()
    assert first == {"none": [1], "zero": [1], "given": [0]}


def test_a_class_that_comes_back_is_ranked_anew(tiny: Any) -> None:
    settings = {"strategy": ["cumulative", "icarl"], "options.icarl.budget": 9 * IMAGE, "federation.rounds": 1}
    store = ClientStore(tiny(settings).folder / "clients", 0)
    for k in range(3):
        kept = store.get(k, 10**6)["icarl/ids"].tolist()
        assert len(set(kept)) == len(kept) == 9


def test_without_any_exemplar_the_head_predicts(tiny: Any) -> None:
    common = {"strategy": ["icarl"], "options.icarl.budget": 0, "federation.rounds": 1}
    found = [tiny({**common, "options.icarl.predict": by}).summary["average_accuracy"] for by in ("exemplars", "head")]
    assert found[0] == found[1]


def test_mirror_images_are_averaged_in(tiny: Any, oracle: Any, tiny_config: Any) -> None:
    settings = {"strategy": ["icarl"], "options.icarl.flip": True, "federation.clients": 1, "federation.rounds": 1,
                "scenario.tasks": 1}  # fmt: skip
    result = tiny(settings)
    checkpoint = load_newest(result.folder / "checkpoints", lambda text: None)
    assert checkpoint is not None
    world, w = oracle.World.of(tiny_config(settings)), oracle.final(result)
    mirrored = world.x.view(-1, 8, 8).flip(-1).flatten(1)
    both = zip(_features(oracle, w, world.x), _features(oracle, w, mirrored), strict=True)
    expected = torch.stack([(a + b) / 2 for a, b in both]).sum(dim=0)
    assert torch.allclose(checkpoint.arrays["strategy/icarl/sums"].sum(dim=0), expected, atol=1e-9)


def test_a_task_without_new_classes_is_refused_for_sigmoids(tiny_config: Any) -> None:
    settings = {"strategy": ["icarl"], "scenario.name": "new_instances"}
    with pytest.raises(UsageError, match=r"scenario\.name.*new classes.*softmax") as caught:
        build(tiny_config(settings))
    assert "\n" not in str(caught.value)
    build(tiny_config({**settings, "options.icarl.loss": "softmax"}))


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["icarl"], "federation.rounds": 1, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("name", "value"), [("loss", "mse"), ("weight", -1), ("temperature", 0.0), ("budget", -1), ("policy", "reservoir")]
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.icarl") as caught:
        build(tiny_config({"strategy": ["icarl"], f"options.icarl.{name}": value}))
    assert "\n" not in str(caught.value)
