"""AMGC: the closed form against literal exponentials and Monte-Carlo draws, and whole runs against a plain loop."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl.blocks.losses import cross_entropy
from fedcl.errors import RunFailed, UsageError
from fedcl.strategies.calibration.amgc import AMGC, expected_cross_entropy, margins, widened

K, D = 4, 3


def setting(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight (K, D), bias (K,), means (K, D) and covariances (K, D, D)."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    root = normal(K, D, D)
    return normal(K, D), normal(K), normal(K, D), 0.3 * root @ root.mT


def literal(w: Any, b: Any, means: Any, spreads: Any, lam: list[float], classes: list[list[int]]) -> float:
    """``1/K sum_k log sum_j exp( v_jk mu_k + b_j - b_k + 1/2 v_jk S_k v_jk )``, term by term."""
    total = 0.0
    for k in range(len(means)):
        wide = spreads[k] + lam[k] * np.diag(np.diag(spreads[k]))
        below = 0.0
        for j in classes[k]:
            v = w[j] - w[k]
            below += math.exp(v @ means[k] + b[j] - b[k] + 0.5 * v @ wide @ v)
        total += math.log(below)
    return total / len(means)


@pytest.mark.parametrize("diagonal", [False, True])
def test_closed_form_is_the_literal_one(diagonal: bool) -> None:
    w, b, means, spread = setting()
    lam = [0.0, 1.0, 0.5, 2.0]
    if diagonal:
        spread = torch.diag_embed(spread.diagonal(dim1=1, dim2=2))
    given = spread.diagonal(dim1=1, dim2=2) if diagonal else spread
    everything = torch.ones(K, K, dtype=torch.bool)
    given = widened(given, torch.tensor(lam, dtype=torch.float64))
    found = expected_cross_entropy(w, b, means, given, everything)
    expected = literal(w.numpy(), b.numpy(), means.numpy(), spread.numpy(), lam, [list(range(K))] * K)
    assert float(found) == pytest.approx(expected, abs=1e-10)
    groups = [[0, 1], [0, 1], [2, 3], [2, 3]]
    mask = torch.tensor([[j in group for j in range(K)] for group in groups])
    found = expected_cross_entropy(w, b, means, given, mask)
    expected = literal(w.numpy(), b.numpy(), means.numpy(), spread.numpy(), lam, groups)
    assert float(found) == pytest.approx(expected, abs=1e-10)


def test_without_spread_it_is_the_cross_entropy_at_the_means() -> None:
    w, b, means, spread = setting()
    everything = torch.ones(K, K, dtype=torch.bool)
    none = torch.zeros_like(spread)
    for flat in (none, none.diagonal(dim1=1, dim2=2)):
        found = expected_cross_entropy(w, b, means, widened(flat, torch.full((K,), 3.0)), everything)
        plain = cross_entropy(means @ w.mT + b, torch.arange(K), torch.ones(K, dtype=torch.bool))
        assert float(found) == pytest.approx(float(plain), abs=1e-12)


def test_it_bounds_the_cross_entropy_of_draws_and_is_near_it_for_narrow_gaussians() -> None:
    w, b, means, spread = setting()
    everything = torch.ones(K, K, dtype=torch.bool)
    for scale in (1.0, 0.1, 0.001):
        bound = float(expected_cross_entropy(w, b, means, scale * spread, everything))
        draws = torch.distributions.MultivariateNormal(means, scale * spread + 1e-12 * torch.eye(D))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = draws.sample((20_000,))
        logits = x @ w.mT + b
        labels = torch.arange(K).expand(20_000, K)
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        found, error = float(each.mean()), float(each.std()) / math.sqrt(len(each))
        assert found <= bound + 4 * error
        if scale == 0.001:
            assert bound - found < 4 * error + 1e-4


def test_margins_are_not_negative_and_grow_with_lambda() -> None:
    w, _, _, spread = setting()
    lam = torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    narrow, wide = margins(w, spread), margins(w, widened(spread, lam))
    assert float(narrow.min()) >= -1e-12
    assert torch.allclose(narrow.diagonal(), torch.zeros(K, dtype=torch.float64))
    assert torch.equal(wide[0], narrow[0])
    off = ~torch.eye(K, dtype=torch.bool)
    assert bool((wide[1:][off[1:]] > narrow[1:][off[1:]]).all())


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"enlarge": 2.0}),
        (
            {"scenario.tasks": 3, "model.head_bias": False},
            {"distil": 0.5, "compete": "known", "covariance": "diagonal"},
        ),
        ({"federation.clients": 1, "scenario.tasks": 2}, {"use": "evaluation"}),
    ],
    ids=["wider", "three tasks, diagonal", "one client, evaluation alone"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, after: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    named = {f"options.amgc.{n}": v for n, v in {"steps": 4, "lr": 0.02, "distil": 0.1, **options}.items()}
    settings = {"strategy": ["amgc"], **settings, **named}
    world = oracle.World.of(tiny_config(settings))
    gaussians: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    solved: dict[str, Any] = {}

    def loss(w: Any, x: Any, y: list[int], local: Any) -> Any:
        classes = local.known if options.get("compete") == "known" else local.new
        value = oracle.cross_entropy(oracle.logits(w, x), y, classes)
        if local.previous is None:
            return value

        def features(arrays: Any) -> Any:
            h = x @ arrays["encoder.1.weight"].T + arrays["encoder.1.bias"]
            return h * (h > 0)

        gap = (features(w) - features(local.previous)) ** 2
        return value + options.get("distil", 0.1) * gap.sum() / len(y)

    def end_task(w: Any, local: Any) -> Any:
        for c, rows in after.by_class(w, world, local.task).items():
            spread = np.cov(rows, rowvar=False) if len(rows) > 1 else np.zeros((rows.shape[1],) * 2)
            diagonal = options.get("covariance") == "diagonal"
            gaussians[c] = rows.mean(axis=0), np.diag(np.diag(spread)) if diagonal else spread
        solved.update(_solve(w, gaussians, local.old, options.get("enlarge", 1.0)))
        return {**w, **solved} if options.get("use") != "evaluation" else w

    w = oracle.federated(tiny_config(settings), oracle.Method(loss, end_task=end_task), world)
    found = after.ended(tiny(settings), "amgc")
    assert oracle.distance(found.model, w) < 1e-8
    assert bool(found.evaluated) == (options.get("use") == "evaluation")
    if found.evaluated:
        assert oracle.distance(found.evaluated, {**w, **solved}) < 1e-8
        assert oracle.distance(found.evaluated, w) > 1e-3


def _solve(w: Any, gaussians: Any, old: list[int], enlarge: float) -> Any:
    """Four steps of Adam written out, on the literal bound."""
    names = [n for n in ("head.weight", "head.bias") if n in w]
    w = {n: w[n].clone() for n in names}
    first, second = ({n: torch.zeros_like(a) for n, a in w.items()} for _ in range(2))
    for t in range(1, 5):
        leaf = {n: a.clone().requires_grad_() for n, a in w.items()}
        weight = leaf["head.weight"]
        bias = leaf.get("head.bias", torch.zeros(len(weight), dtype=torch.float64))
        total = torch.zeros((), dtype=torch.float64)
        for k, (mean, spread) in gaussians.items():
            wide = torch.tensor(spread + (enlarge if k in old else 0.0) * np.diag(np.diag(spread)))
            mu = torch.tensor(mean)
            terms = [
                (weight[j] - weight[k]) @ mu + bias[j] - bias[k]
                + 0.5 * (weight[j] - weight[k]) @ wide @ (weight[j] - weight[k])
                for j in gaussians
            ]  # fmt: skip
            total = total + torch.logsumexp(torch.stack(terms), 0) / len(gaussians)
        grads = dict(zip(names, torch.autograd.grad(total, list(leaf.values())), strict=True))
        for n in names:
            first[n] = 0.9 * first[n] + 0.1 * grads[n]
            second[n] = 0.999 * second[n] + 0.001 * grads[n] ** 2
            w[n] = w[n] - 0.02 * (first[n] / (1 - 0.9**t)) / ((second[n] / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


def test_classes_without_an_image_keep_their_row() -> None:
    strategy = AMGC(AMGC.Options(steps=9))
    counts = torch.tensor([3, 0, 4, 0])
    w, b, means, spread = setting()
    moments = {
        "counts": counts, "sums": counts[:, None] * means,
        "outer": (counts - 1).clamp(min=0)[:, None, None] * spread
        + counts[:, None, None] * means[:, :, None] * means[:, None, :],
    }  # fmt: skip
    known = torch.ones(K, dtype=torch.bool)
    server = SimpleNamespace(
        arrays={"head.weight": w, "head.bias": b},
        evaluated={"head.weight": w, "head.bias": b},
        known=known,
        new=known,
        task=0,
        task_known=False,
        state={},
    )
    found = strategy.calibrated(server, moments)  # type: ignore[arg-type]
    assert torch.equal(found["head.weight"][[1, 3]], w[[1, 3]])
    assert torch.equal(found["head.bias"][[1, 3]], b[[1, 3]])
    assert bool((found["head.weight"][[0, 2]] != w[[0, 2]]).all())


@pytest.mark.parametrize("form", ["full", "diagonal", "shared"])
def test_a_head_that_knows_nothing_learns_the_classes_from_the_gaussians(tiny: Any, form: str) -> None:
    frozen = {"optimiser.lr": 1e-300, "scenario.tasks": 1, "model.width": 64}
    options = {"options.amgc.covariance": form, "options.amgc.lr": 0.05, "options.amgc.steps": 200}
    assert tiny({"strategy": ["amgc"], **frozen, **options}).summary["average_accuracy"] > 0.6


def test_where_tasks_are_known_a_task_does_not_move_the_rows_of_another(tiny: Any, oracle: Any, after: Any) -> None:
    settings = {
        "strategy": ["amgc"], "scenario.name": "task_incremental", "options.amgc.use": "evaluation",
        "options.amgc.distil": 0.0, "options.amgc.steps": 30, "options.amgc.enlarge": 0.0,
    }  # fmt: skip
    once = after.ended(tiny({**settings, "optimiser.lr": 1e-300}), "amgc").evaluated["head.weight"]
    wide = after.ended(tiny({**settings, "optimiser.lr": 1e-300, "options.amgc.enlarge": 5.0}), "amgc").evaluated[
        "head.weight"
    ]
    assert torch.equal(once[5:], wide[5:])
    assert not torch.equal(once[:5], wide[:5])


def test_gaussians_are_of_the_features_that_the_head_sees(tiny: Any, after: Any) -> None:
    settings = {"strategy": ["amgc"], "model.feature_norm": "l2", "scenario.tasks": 1, "options.amgc.steps": 1}
    state = after.ended(tiny(settings), "amgc").state
    lengths = state["outer"].diagonal(dim1=1, dim2=2).sum(dim=1)
    assert int(state["counts"].min()) > 0
    torch.testing.assert_close(lengths, state["counts"].double(), rtol=0, atol=1e-9)


def test_a_solution_that_diverges_says_so() -> None:
    w, b, means, spread = setting()
    everything = torch.ones(K, K, dtype=torch.bool)
    strategy = AMGC(AMGC.Options(lr=1e200, steps=20))
    with pytest.raises(RunFailed, match="take a smaller one"):
        strategy.solve((w, b), means, spread, everything)


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    found = tiny({"strategy": ["amgc"], "options.amgc.steps": 5, "options.amgc.distil": 0.1, **hard})
    assert all(value is None or 0 <= value <= 1 for row in found.matrix for value in row)
    assert found.summary["status"] == "done"


@pytest.mark.parametrize(
    ("key", "value"), [("enlarge", -1.0), ("steps", -1), ("lr", 0.0), ("distil", float("inf")), ("compete", "old")]
)
def test_wrong_options(tiny: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["amgc"], f"options.amgc.{key}": value})
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)


def test_only_a_linear_head_can_be_solved_for(tiny: Any) -> None:
    with pytest.raises(UsageError, match="linear"):
        tiny({"strategy": ["amgc"], "model.head": "cosine"})
