"""What SI and MAS have in common: finetune_masked at weight 0, and the term c sum Omega (w - w*)^2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.strategies.continual._penalty import Penalty
from fedcl.strategies.continual.mas import MAS
from fedcl.strategies.continual.si import SI


@pytest.mark.parametrize("name", ["mas", "si"])
def test_weight_zero_is_finetune_masked_bit_for_bit(tiny: Any, oracle: Any, name: str) -> None:
    zero = oracle.final(tiny({"strategy": [name], f"options.{name}.weight": 0.0}))
    masked = oracle.final(tiny({"strategy": ["finetune_masked"]}))
    assert oracle.identical(zero, masked)
    assert oracle.distance(oracle.final(tiny({"strategy": [name]})), masked) > 1e-4


@pytest.mark.parametrize("method", [MAS, SI])
def test_term_and_its_gradient(oracle: Any, method: type[Penalty]) -> None:
    w, anchor = oracle.leaves(oracle.model(3, 2, 3, seed=0)), oracle.model(3, 2, 3, seed=1)
    importance = {n: a.square() for n, a in oracle.model(3, 2, 3, seed=2).items()}
    down = {f"importance/{n}": a for n, a in importance.items()} | {f"anchor/{n}": a for n, a in anchor.items()}
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [2], known=[0, 1, 2], new=[2], down=down)

    def term(weight: float) -> Any:
        return method(method.Options(weight=weight)).loss(step)["penalty"]

    slope = (term(1e-3) - term(0.0)) / 1e-3
    literal = sum((importance[n] * (w[n] - anchor[n]) ** 2).sum() for n in w)
    assert slope.item() == pytest.approx(literal.item(), rel=1e-12)
    found = oracle.gradient(slope, w)
    assert all(torch.allclose(found[n], 2 * importance[n] * (w[n] - anchor[n]), atol=1e-10) for n in w)
