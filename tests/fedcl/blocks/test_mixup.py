"""Mixup: quantiles against SciPy, mixtures and their cross entropy against loops."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta

from fedcl.blocks.mixup import beta_quantile, mixed, mixed_cross_entropy


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_quantiles_are_those_of_the_beta_distribution(alpha: float) -> None:
    uniform = torch.linspace(2**-25, 1 - 2**-25, 5001, dtype=torch.float64)
    expected = torch.from_numpy(beta(alpha, alpha).ppf(uniform.numpy()))
    torch.testing.assert_close(beta_quantile(uniform, alpha), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(beta_quantile(uniform.float(), alpha).double(), expected, rtol=0, atol=1e-4)
    both = torch.stack([uniform, uniform.flip(0)])
    assert torch.equal(torch.func.vmap(lambda u: beta_quantile(u, alpha))(both), beta_quantile(both, alpha))


def test_mixtures_and_their_cross_entropy() -> None:
    make = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 2, 2, generator=make, dtype=torch.float64)
    logits = torch.randn(3, 5, generator=make, dtype=torch.float64, requires_grad=True)
    first, second, share = torch.tensor([0, 3, 1]), torch.tensor([2, 3, 0]), torch.tensor([0.25, 0.5, 1.0])
    found = mixed(images, first, second, share)
    a, b = torch.tensor([0, 1, 4]), torch.tensor([4, 1, 0])
    classes = torch.tensor([True, True, False, True, True]), torch.tensor([[True] * 5] * 3)
    loss, total = mixed_cross_entropy(logits, (a, b), share, classes), torch.zeros((), dtype=torch.float64)
    for i in range(3):
        s = float(share[i])
        torch.testing.assert_close(found[i], (1 - s) * images[first[i]] + s * images[second[i]])
        for weight, label, among in ((1 - s, int(a[i]), [0, 1, 3, 4]), (s, int(b[i]), [0, 1, 2, 3, 4])):
            total = total + weight * torch.log(sum(torch.exp(logits[i, c] - logits[i, label]) for c in among)) / 3
    torch.testing.assert_close(loss, total, rtol=0, atol=1e-12)
    (one,), (other,) = torch.autograd.grad(loss, logits), torch.autograd.grad(total, logits)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
