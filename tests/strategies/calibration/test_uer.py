"""UER: angles by hand, two losses that add up, and plain replay without its part."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.calibration.uer import UER, angles


def test_angles_do_not_know_norms() -> None:
    make = torch.Generator().manual_seed(1)
    f, w = (torch.randn(*s, generator=make, dtype=torch.float64) for s in ((3, 4), (2, 4)))
    for i in range(3):
        for c in range(2):
            wanted = float(f[i] @ w[c]) / math.sqrt(float(f[i] @ f[i]) * float(w[c] @ w[c]))
            assert angles(f, w)[i, c].item() == pytest.approx(wanted, rel=1e-12)
    assert torch.allclose(angles(7 * f, 0.1 * w), angles(f, w), atol=1e-12)
    assert angles(torch.zeros(1, 4), w.float()).isfinite().all()


def test_uer_sums_angles_of_the_stream_and_products_of_the_memory(oracle: Any) -> None:
    w = {n: a for n, a in oracle.model(2, 2, 2, seed=0).items() if n != "head.bias"}
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = [0, 1, 1, 0, 1]
    step = oracle.step(w, x, y, known=[0, 1], new=[1])
    batch = replace(step.batch, source=torch.tensor([0, 0, 0, 1, 1]), names=("stream", "uer"))
    step = replace(step, batch=batch)
    scale = 3.0
    cosine = scale * angles(step.output.features, w["head.weight"])
    stream = oracle.cross_entropy(cosine[:3], y[:3], [0, 1])
    memory = oracle.cross_entropy(oracle.logits(w, x)[3:], y[3:], [0, 1])
    found = UER(UER.Options(scale=scale)).task_loss(step)
    assert found.item() == pytest.approx((stream + memory).item(), rel=1e-12)


def test_uer_without_its_parts_is_replay(tiny: Any, oracle: Any) -> None:
    mine = {"model.head_bias": False, "strategy": ["uer"], "options.uer.budget": 640}
    ours = oracle.final(tiny({**mine, "options.uer.stream": "product"}))
    replay = {"model.head_bias": False, "strategy": ["replay"], "options.replay.budget": 640}
    assert oracle.identical(ours, oracle.final(tiny(replay)))
    assert not oracle.identical(oracle.final(tiny(mine)), ours)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "linear head without a bias"),
        ({"model.head": "cosine", "model.head_bias": False}, "linear head without a bias"),
        ({"model.head_bias": False, "options.uer.scale": 0.0}, "scale"),
    ],
)
def test_what_cannot_be_is_refused(tiny_config: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        build(tiny_config({"strategy": ["uer"], **settings}))
    assert "\n" not in str(caught.value)
