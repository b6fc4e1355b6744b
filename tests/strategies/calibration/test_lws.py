"""LWS: the scales that a plain loop over the clients and their class-balanced samples gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.errors import UsageError


@pytest.mark.parametrize("bias", [True, False])
def test_lws_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, after: Any, bias: bool) -> None:
    run = {
        "strategy": ["lws"], "options.lws.epochs": 2, "model.head_bias": bias, "scenario.tasks": 1,
        "scenario.name": "long_tailed", "scenario.imbalance": 6,
    }  # fmt: skip
    world, w = after.trained(tiny_config, oracle, run)
    start = {"scale": torch.ones(10, dtype=torch.float64)}
    fitted = after.retrained(
        world, w, 0, 2, "lws", start,
        lambda leaf, z: leaf["scale"] * (w["head.weight"] @ z + w.get("head.bias", 0.0)), 2, 0.0,
    )  # fmt: skip
    found = after.ended(tiny(run), "lws")
    assert oracle.distance(found.model, w) < 1e-10
    expected = {n: (a.T * fitted["scale"]).T if n.startswith("head.") else a for n, a in w.items()}
    assert oracle.distance(found.evaluated, expected) < 1e-9
    assert float((fitted["scale"] - 1).abs().min()) > 1e-6


def test_scales_of_classes_without_images_are_1(tiny: Any, after: Any) -> None:
    found = after.ended(tiny({"strategy": ["lws"], "options.lws.epochs": 1}), "lws")
    assert torch.equal(found.evaluated["head.weight"][:5], found.model["head.weight"][:5])
    assert not torch.equal(found.evaluated["head.weight"][5:], found.model["head.weight"][5:])


def test_no_epoch_leaves_the_head(tiny: Any, oracle: Any, after: Any) -> None:
    found = after.ended(tiny({"strategy": ["lws"], "options.lws.epochs": 0}), "lws")
    assert oracle.identical(found.evaluated, found.model)


def test_only_a_linear_head_has_rows_to_scale(tiny: Any) -> None:
    with pytest.raises(UsageError, match="linear"):
        tiny({"strategy": ["lws"], "model.head": "cosine"})


def test_the_next_task_starts_from_the_new_head_when_asked(tiny: Any, oracle: Any, after: Any) -> None:
    found = after.ended(tiny({"strategy": ["lws"], "options.lws.use": "training"}), "lws")
    assert not found.evaluated
    assert not torch.allclose(found.model["encoder.1.weight"], oracle.final(tiny({}))["encoder.1.weight"])


def test_a_task_whose_images_have_passed_is_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="train the head again"):
        tiny({"strategy": ["lws"], "federation.passes": "once"})


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    found = tiny({"strategy": ["lws"], "options.lws.epochs": 1, **hard})
    assert all(value is None or 0 <= value <= 1 for row in found.matrix for value in row)
    assert found.summary["status"] == "done"


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("lr", 0.0), ("batch_size", -1), ("use", "both")])
def test_wrong_options(tiny: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["lws"], f"options.lws.{key}": value})
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)
