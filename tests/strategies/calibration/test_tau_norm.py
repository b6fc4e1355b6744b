"""tau-normalisation against a plain loop, and the choice of tau on the server's own images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.errors import UsageError
from fedcl.strategies.calibration.tau_norm import TauNorm, tau_normalised


def literal(weight: Any, tau: float) -> Any:
    rows = []
    for row in weight.tolist():
        norm = sum(v**2 for v in row) ** 0.5
        rows.append([v / norm**tau if norm else 0.0 for v in row])
    return torch.tensor(rows, dtype=weight.dtype)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
def test_rows_are_divided_by_a_power_of_their_norm(tau: float) -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[2] = 0.0
    found = tau_normalised(weight, tau)
    torch.testing.assert_close(found, literal(weight, tau), rtol=0, atol=1e-12)
    if tau == 0.0:
        assert torch.equal(found, weight)
    if tau == 1.0:
        assert torch.linalg.vector_norm(found, dim=1)[[0, 1, 3, 4]].tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("use", ["evaluation", "training"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_head_of_a_run_is_normalised_and_has_no_bias(
    tiny: Any, tiny_config: Any, oracle: Any, after: Any, use: str, bias: bool
) -> None:
    def end_task(w: Any, local: Any) -> Any:
        if use == "evaluation":
            return w
        found = {**w, "head.weight": literal(w["head.weight"], 1.3)}
        return {**found, "head.bias": torch.zeros_like(w["head.bias"])} if bias else found

    settings = {"strategy": ["tau_norm"], "options.tau_norm.tau": 1.3, "options.tau_norm.use": use}
    settings["model.head_bias"] = bias
    method = oracle.Method(
        lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known), end_task=end_task
    )
    w = oracle.federated(tiny_config(settings), method)
    found = after.ended(tiny(settings), "tau_norm")
    assert oracle.distance(found.model, w) < 1e-10
    if use == "evaluation":
        expected = {**w, "head.weight": literal(w["head.weight"], 1.3)}
        if bias:
            expected["head.bias"] = torch.zeros_like(w["head.bias"])
        assert oracle.distance(found.evaluated, expected) < 1e-10


def test_classes_that_are_not_known_yet_are_left(tiny: Any) -> None:
    known = torch.tensor([True, False])
    head = {"head.weight": torch.tensor([[3.0, 4.0], [3.0, 4.0]]), "head.bias": torch.ones(2)}
    found = TauNorm().scaled(head, 1.0, known)
    torch.testing.assert_close(found["head.weight"], torch.tensor([[0.6, 0.8], [3.0, 4.0]]))
    assert found["head.bias"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_tau_is_the_best_one_on_the_servers_images(tiny: Any, tiny_config: Any, after: Any, norm: str) -> None:
    from fedcl.build import build

    settings = {
        "strategy": ["tau_norm"], "options.tau_norm.choose": "public", "partition.public": 4, "scenario.tasks": 1,
        "federation.rounds": 1, "data.limit": 24, "model.feature_norm": norm,
    }  # fmt: skip
    found = after.ended(tiny(settings), "tau_norm")
    experiment = build(tiny_config(settings))
    assert experiment.split.public is not None
    rows = torch.from_numpy(experiment.split.public[0])
    assert len(rows) == 40
    store = experiment.node.store
    z = after.hidden(found.model, store.batch(rows, torch.float64).flatten(1))
    if norm == "layer":
        z = (z - z.mean(dim=1, keepdim=True)) / z.std(dim=1, keepdim=True, correction=0)
    scores = {}
    for tau in [round(0.1 * i, 1) for i in range(21)]:
        logits = z @ literal(found.model["head.weight"], tau).T
        scores[tau] = sum(int(row.argmax()) == int(y) for row, y in zip(logits, store.label_tensor[rows], strict=True))
    best = min(tau for tau, score in scores.items() if score == max(scores.values()))
    assert len(set(scores.values())) > 1
    expected = literal(found.model["head.weight"], best)
    torch.testing.assert_close(found.evaluated["head.weight"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("public", [{}, {"partition.public": 2, "labels.public": False}])
def test_choosing_needs_labelled_images_at_the_server(tiny: Any, public: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"partition\.public"):
        tiny({"strategy": ["tau_norm"], "options.tau_norm.choose": "public", **public})


def test_only_a_linear_head_has_rows_to_scale(tiny: Any) -> None:
    with pytest.raises(UsageError, match="linear"):
        tiny({"strategy": ["tau_norm"], "model.head": "cosine"})


def test_it_composes_with_alignment_and_drawn_features(tiny: Any, after: Any, oracle: Any) -> None:
    """What the stage before left for the next task is what is normalised."""
    few = {"options.ccvr.draws": 4, "options.ccvr.epochs": 2, "options.ccvr.use": "training"}
    both = after.ended(tiny({"strategy": ["ccvr", "tau_norm"], **few, "options.tau_norm.tau": 1.0}), "tau_norm")
    alone = after.ended(tiny({"strategy": ["ccvr"], **few}), "ccvr")
    assert oracle.identical(both.model, alone.model)
    expected = literal(alone.model["head.weight"], 1.0)
    torch.testing.assert_close(both.evaluated["head.weight"], expected, rtol=0, atol=1e-12)


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    found = tiny({"strategy": ["tau_norm"], **hard})
    assert all(value is None or 0 <= value <= 1 for row in found.matrix for value in row)
    assert found.summary["status"] == "done"


@pytest.mark.parametrize(("key", "value"), [("tau", -0.1), ("tau", float("nan")), ("choose", "test"), ("use", "both")])
def test_wrong_options(tiny: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["tau_norm"], f"options.tau_norm.{key}": value})
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)
