"""Priors of classes: formulas by hand, and classes without an image."""

from __future__ import annotations

import math

import pytest
import torch

from fedcl.blocks.class_counts import adjusted, log_prior


def prior(counts: list[int]) -> list[float]:
    floor = [max(c, 1) for c in counts]
    return [math.log(c / sum(floor)) for c in floor]


def test_the_prior_of_an_absent_class_is_that_of_one_image() -> None:
    counts = [7, 0, 3]
    found = log_prior(torch.tensor(counts), torch.zeros(1, dtype=torch.float64))
    assert found.tolist() == pytest.approx(prior(counts), rel=1e-12)
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = adjusted(logits, torch.tensor(counts), 0.5)
    assert torch.allclose(shifted, logits + 0.5 * torch.tensor(prior(counts), dtype=torch.float64), atol=1e-12)
    assert adjusted(logits, torch.zeros(3), 1.0).isfinite().all()
