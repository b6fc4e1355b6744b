"""TEEN: calibration against loops, exactness over partitions, and the cosine classifier of the base session."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.prototype.teen import calibrate

ALPHA, TAU = 0.3, 5.0
BASE = list(range(6))


def unit(v: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def literal(means: list[list[float]], base: list[int], alpha: float, tau: float) -> list[list[float]]:
    """Calibrated prototypes, number by number."""
    c = [unit(m) for m in means]
    found = []
    for n, new in enumerate(c):
        if n in base:
            found.append(new)
            continue
        weights = [math.exp(tau * sum(x * y for x, y in zip(new, c[b], strict=True))) for b in base]
        mixed = [sum(w * c[b][j] for w, b in zip(weights, base, strict=True)) / sum(weights) for j in range(len(new))]
        found.append([(1 - alpha) * x + alpha * y for x, y in zip(new, unit(mixed), strict=True)])
    return found


def test_calibration_is_the_literal_one() -> None:
    means = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    base = torch.tensor([True, False, True, True, False, False])
    found = calibrate(means, base, ~base, ALPHA, TAU)
    expected = torch.tensor(literal(means.tolist(), [0, 2, 3], ALPHA, TAU), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_calibration_at_the_edges() -> None:
    means = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    nobody = torch.tensor([False, False])
    unchanged = torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(calibrate(means, nobody, ~nobody, 0.5, 16.0), unchanged)
    one = torch.tensor([False, True])
    assert bool(calibrate(means, one, ~one, 0.5, 16.0).isfinite().all())  # a mean of zeros
    torch.testing.assert_close(calibrate(means, one, ~one, 0.0, 16.0), unchanged)


def state_of(lab: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The server's, had classes 0 to 5 been the first task's."""
    return {**found, "base": torch.arange(10) < 6}


def expected_scores(lab: Any, base: list[int], alpha: float) -> Tensor:
    """The centralised head; classes without a mean are 0."""
    train, test = lab.features("train"), lab.features("test")
    means = [train[[i for i, y in enumerate(lab.labels) if y == c]].mean(0).tolist() for c in range(10)]
    prototypes = torch.tensor(literal(means, base, alpha, TAU), dtype=torch.float64)
    return torch.nn.functional.cosine_similarity(test[:, None], prototypes[None], dim=2)


def test_any_partition_gives_the_centralised_head(pooled: Any, partition: tuple[int, int, float, int]) -> None:
    lab = pooled("teen", alpha=ALPHA, temperature=TAU)
    clients, nodes, skew, seed = partition
    scores = lab.scores(state_of(lab, lab.asked(lab.rows(clients, skew, seed), min(nodes, clients))))
    means = lab.scores(state_of(lab, lab.asked([list(range(len(lab.labels)))])))
    torch.testing.assert_close(scores, means, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [ALPHA, 0.0, 1.0])
def test_the_head_is_the_literal_one(pooled: Any, alpha: float) -> None:
    lab = pooled("teen", alpha=alpha, temperature=TAU)
    scores = lab.scores(state_of(lab, lab.asked([list(range(len(lab.labels)))])))
    torch.testing.assert_close(scores, expected_scores(lab, BASE, alpha), rtol=0, atol=1e-8)


def test_without_calibration_it_is_simplecil(pooled: Any) -> None:
    teen, simple = pooled("teen", alpha=0.0), pooled("simplecil")
    everything = [list(range(len(teen.labels)))]
    calibrated = state_of(teen, teen.asked(everything))
    torch.testing.assert_close(teen.scores(calibrated), simple.scores(simple.asked(everything)), rtol=0, atol=1e-12)
    # To the first order in alpha, the scores of new classes move as the literal ones do.
    step = 1e-6
    moved = (pooled("teen", alpha=step, temperature=TAU).scores(calibrated) - teen.scores(calibrated)) / step
    literal_move = (expected_scores(teen, BASE, step) - expected_scores(teen, BASE, 0.0)) / step
    torch.testing.assert_close(moved, literal_move, rtol=0, atol=1e-6)
    assert float(moved[:, 6:].abs().max()) > 1e-3
    assert float(moved[:, :6].abs().max()) == 0.0


def test_the_base_session_is_the_literal_loop_of_a_cosine_classifier(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
        hidden = hidden * (hidden > 0)
        dots = hidden @ w["head.weight"].T
        lengths = hidden.square().sum(1).sqrt()[:, None] * w["head.weight"].square().sum(1).sqrt()
        return oracle.cross_entropy(7.0 * dots / lengths, y, local.known)

    def edit(grads: Any, w: Any, local: Any) -> Any:
        return {n: g * (not n.startswith("encoder.") or local.task == 0) for n, g in grads.items()}

    settings = {"strategy": ["teen"], "options.teen.scale": 7.0, "optimiser.lr": 0.02}
    expected = oracle.federated(tiny_config(settings), oracle.Method(loss, edit=edit))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_base_classes_are_those_of_the_first_task(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {"strategy": ["teen"], "scenario.tasks": 3, "scenario.base": 6, "options.teen.alpha": 1.0}
    result, experiment = tiny(settings), build(tiny_config(settings))
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    state = {n.removeprefix("strategy/teen/"): a for n, a in found.arrays.items() if n.startswith("strategy/teen/")}
    assert state["base"].tolist() == [True] * 6
    means = (state["sums"] / state["counts"][:, None]).tolist()
    prototypes = torch.tensor(literal(means, BASE, 1.0, 16.0), dtype=torch.float64)
    ids = experiment.stream.stages[2].test_ids
    x = experiment.test.batch(torch.from_numpy(ids), torch.float64)
    f = experiment.node.forward(oracle.final(result), x, "eval").features.detach()
    cosine = torch.nn.functional.cosine_similarity(f[:, None], prototypes[None], dim=2)
    right = float((cosine.argmax(1).numpy() == experiment.stream.test_labels[ids]).mean())
    assert result.matrix[2][2] == pytest.approx(right, abs=1e-12)


def test_base_classes_nobody_has_take_no_part(pooled: Any) -> None:
    lab = pooled("teen", alpha=ALPHA, temperature=TAU)
    some = state_of(lab, lab.asked([[i for i, y in enumerate(lab.labels) if y != 2]]))
    scores = lab.scores(some)
    assert bool((scores[:, 2] == -torch.inf).all())
    expected = expected_scores(lab, [0, 1, 3, 4, 5], ALPHA)
    torch.testing.assert_close(scores[:, 6:], expected[:, 6:], rtol=0, atol=1e-8)
    none = state_of(lab, lab.asked([[i for i, y in enumerate(lab.labels) if y > 5]]))
    assert bool(lab.scores(none)[:, 6:].isfinite().all())


def test_before_the_first_mean_the_cosine_classifier_predicts(pooled: Any) -> None:
    lab = pooled("teen", scale=3.0)
    f, w = lab.features("test"), lab.arrays["head.weight"]
    expected = 3.0 * torch.nn.functional.cosine_similarity(f[:, None], w[None], dim=2)
    torch.testing.assert_close(lab.scores({}), expected, rtol=0, atol=1e-12)


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    matrix = tiny({"strategy": ["teen"], "optimiser.lr": 0.01, **hard}).matrix
    assert all(v is not None and 0 <= v <= 1 for t, row in enumerate(matrix) for v in row[: t + 1])


@pytest.mark.parametrize(
    ("key", "value"), [("alpha", 1.5), ("alpha", -0.1), ("temperature", 0.0), ("scale", float("inf")), ("tau", 16.0)]
)
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.teen") as caught:
        build(tiny_config({"strategy": ["teen"], f"options.teen.{key}": value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"model.head": "simplex", "model.head_allocate": "all"}, {"time.order": "asynchronous"}]
)
def test_settings_that_cannot_work_are_refused(tiny_config: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings)).replace(".", r"\.")) as caught:
        build(tiny_config({"strategy": ["teen"], "model.width": 16, **settings}))
    assert "teen" in str(caught.value)
