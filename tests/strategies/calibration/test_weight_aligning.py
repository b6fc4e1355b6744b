"""Weight aligning against a literal loop, in stacks, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.calibration.weight_aligning import WeightAligning, align
from fedcl.strategy import Strategy


def _aligned(weight: Any, old: list[int], new: list[int]) -> Any:
    """Row by row: new rows times mean norm of old rows over mean norm of new rows."""
    norms = [sum(float(v) ** 2 for v in row) ** 0.5 for row in weight]
    gamma = (sum(norms[c] for c in old) / len(old)) / (sum(norms[c] for c in new) / len(new))
    out = weight.clone()
    for c in new:
        out[c] = gamma * weight[c]
    return out


def _method(oracle: Any, clip: bool = True, squared: bool = True, temperature: float = 2.0, loss: Any = None) -> Any:
    def own(w: Any, x: Any, y: Any, local: Any) -> Any:
        scores = oracle.logits(w, x)
        value = oracle.cross_entropy(scores, y, local.known)
        if local.previous is None:
            return value
        share = len(local.old) / len(local.known)
        teacher = oracle.logits(local.previous, x)
        kl = oracle.soft_cross_entropy(scores, teacher, local.old, temperature)
        kl = kl - oracle.entropy(teacher, local.old, temperature)
        return (1 - share) * value + share * (temperature**2 if squared else 1) * kl

    def after_step(w: Any) -> Any:
        if not clip:
            return w
        head = w["head.weight"]
        return {
            **w,
            "head.weight": torch.tensor([[max(float(v), 0.0) for v in row] for row in head], dtype=head.dtype),
        }

    def end_task(w: Any, local: Any) -> Any:
        if not local.old or not w["head.weight"][local.new].any():
            return w
        return {**w, "head.weight": _aligned(w["head.weight"], local.old, local.new)}

    return oracle.Method(loss or own, after_step, end_task)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"scenario.tasks": 3, "model.head_bias": False}, {"clip": False}),
        ({"scenario.tasks": 3, "federation.participation": 0.67}, {"squared": False, "temperature": 1.3}),
        ({"model.head_allocate": "all", "optimiser.weight_decay": 0.01}, {}),
    ],
    ids=["default", "three tasks", "plain", "whole head"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    named = {f"options.weight_aligning.{n}": v for n, v in options.items()}
    settings = {"strategy": ["weight_aligning"], "seed": 5, **settings, **named}
    expected = oracle.federated(tiny_config(settings), _method(oracle, **options))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


@pytest.mark.parametrize("stack", [["fedlwf", "weight_aligning"], ["weight_aligning", "fedlwf"]])
@pytest.mark.parametrize("clip", [True, False])
def test_it_leaves_the_task_loss_to_a_stronger_claim(
    tiny: Any, tiny_config: Any, oracle: Any, stack: list[str], clip: bool
) -> None:
    def lwf(w: Any, x: Any, y: Any, local: Any) -> Any:
        scores = oracle.logits(w, x)
        value = oracle.cross_entropy(scores, y, local.new)
        if local.previous is None:
            return value
        teacher = oracle.logits(local.previous, x)
        return value + 3.0 * oracle.soft_cross_entropy(scores, teacher, local.old, 2.0)

    settings = {"strategy": stack, "options.weight_aligning.clip": clip}
    expected = oracle.federated(tiny_config(settings), _method(oracle, clip=clip, loss=lwf))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_a_strategy_without_a_task_loss_leaves_it_to_weight_aligning(tiny: Any, oracle: Any) -> None:
    prox = {"options.fedprox.mu": 0.0}
    stacked = oracle.final(tiny({"strategy": ["fedprox", "weight_aligning"], **prox}))
    assert oracle.identical(stacked, oracle.final(tiny({"strategy": ["weight_aligning"]})))


def test_a_single_task_is_not_aligned(tiny: Any, oracle: Any) -> None:
    one = {"scenario.tasks": 1}
    aligned = oracle.final(tiny({"strategy": ["weight_aligning"], "options.weight_aligning.clip": False, **one}))
    assert oracle.identical(aligned, oracle.final(tiny(one)))


def test_clipped_rows_are_never_negative(tiny: Any, oracle: Any) -> None:
    def least(clip: bool) -> float:
        settings = {
            "strategy": ["weight_aligning"],
            "options.weight_aligning.clip": clip,
            "model.head_bias": False,
        }
        return float(oracle.final(tiny(settings))["head.weight"].min())

    assert least(True) == 0.0
    assert least(False) < 0.0


def test_align_equals_the_literal_form_and_evens_the_norms() -> None:
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = (
        torch.tensor([1, 1, 0, 0, 1, 0, 0], dtype=torch.bool),
        torch.tensor([0, 0, 1, 1, 0, 1, 0], dtype=torch.bool),
    )
    found = align(weight, old, new)
    assert torch.allclose(found, _aligned(weight, [0, 1, 4], [2, 3, 5]), atol=1e-12)
    assert torch.equal(found[[0, 1, 4, 6]], weight[[0, 1, 4, 6]])
    norms = found.norm(dim=1)
    assert norms[old].mean().item() == pytest.approx(norms[new].mean().item())


def test_align_without_old_or_new_classes_or_with_zero_rows() -> None:
    weight, some, none = torch.ones(2, 3), torch.tensor([True, False]), torch.tensor([False, False])
    assert torch.equal(align(weight, none, some), weight)
    assert torch.equal(align(weight, some, none), weight)
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(align(weight, some, ~some), weight)


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {"strategy": ["weight_aligning"], **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, oracle.federated(tiny_config(settings), _method(oracle))) < 1e-10


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("temperature", -1.0), ("clip", "yes"), ("squared", 1), ("gamma", 1.0)],
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.weight_aligning") as caught:
        build(tiny_config({"strategy": ["weight_aligning"], f"options.weight_aligning.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", ["cosine", "nearest_mean", "simplex"])
def test_only_a_linear_head_can_be_aligned(tiny_config: Any, head: str) -> None:
    with pytest.raises(UsageError, match=r"^model\.head='.*linear"):
        build(tiny_config({"strategy": ["weight_aligning"], "model.head": head, "model.head_allocate": "all"}))


@pytest.mark.parametrize(("scenario", "shift"), [("new_instances", "given"), ("domain_incremental", "permuted")])
def test_without_new_classes_there_is_nothing_to_align(tiny: Any, scenario: str, shift: str) -> None:
    settings = {"scenario.name": scenario, "scenario.shift": shift}
    aligned = tiny({**settings, "strategy": ["weight_aligning"], "options.weight_aligning.clip": False})
    assert aligned.summary["model_sha256"] == tiny(settings).summary["model_sha256"]


def test_a_blurry_task_without_a_new_class_is_trained_like_finetune(tiny: Any, oracle: Any) -> None:
    """Its last task exposes nothing: the loss is the cross entropy, and no row is scaled."""
    settings = {"scenario.name": "linear_blurry", "scenario.steps": 2, "strategy": ["weight_aligning"]}
    assert tiny(settings).summary["untested_tasks"] == [3]
    w, before = oracle.leaves(oracle.model(5, 4, 3, 0)), oracle.model(5, 4, 3, 1)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = oracle.step(w, x, [0, 2, 1, 2], known=[0, 1, 2], new=[], previous=before)
    assert WeightAligning().task_loss(step).item() == Strategy().task_loss(step).item()
