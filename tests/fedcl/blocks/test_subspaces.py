"""Subspaces of layers' inputs: rows against layers' own outputs, ranks against NumPy's SVD, what updates spare."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcl.blocks import subspaces
from fedcl.blocks.subspaces import (
    Layer,
    energy,
    input_parts,
    input_rows,
    joined,
    leading,
    outside,
    projected,
    wanted_share,
    weight_layers,
)

LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "tokens": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "strided": (lambda: nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 7)),
    "shortcut": (lambda: nn.Conv2d(3, 4, 1, stride=2, bias=False), (2, 3, 6, 6)),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis_of(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span by NumPy."""
    _, values, vectors = np.linalg.svd(rows.numpy(), full_matrices=False)
    return torch.from_numpy(vectors[values > 1e-10 * values[0]].T.copy())


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_the_weight_are_the_layers_outputs(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = make().double()
    x = normal(*shape)
    rows = input_rows(layer, x)
    found = rows @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    expected = layer(x) if x.dim() < 4 else layer(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected.reshape(len(rows), -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_update_changes_nothing_on_old_inputs_and_is_kept_on_others(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = make().double()
    old = input_rows(layer, normal(*shape))[:4]
    before = layer.weight.detach()
    after = before + normal(*before.shape, seed=1)
    update = (projected(before, after, basis_of(old)) - before).flatten(1)
    assert (update @ old.T).abs().max() < 1e-12
    new = input_rows(layer, normal(*shape, seed=2))
    away = new - new @ torch.linalg.pinv(old) @ old
    torch.testing.assert_close(update @ away.T, (after - before).flatten(1) @ away.T, rtol=0, atol=1e-12)
    assert update.abs().max() > 0.01 or away.abs().max() < 1e-12


def test_no_basis_leaves_the_update_and_a_whole_one_leaves_nothing_of_it() -> None:
    before, after = normal(2, 3), normal(2, 3, seed=1)
    torch.testing.assert_close(projected(before, after, torch.zeros(3, 0, dtype=torch.float64)), after)
    torch.testing.assert_close(projected(before, after, torch.eye(3, dtype=torch.float64)), before)
    assert projected(before.float(), after.float(), torch.eye(3, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 9), (5, 5), (7, 3)])
@pytest.mark.parametrize("share", [-0.5, 0.3, 0.8, 0.97, 1.0])
def test_leading_directions_are_numpys(shape: tuple[int, int], share: float) -> None:
    matrix = normal(*shape) * 0.5 ** torch.arange(shape[0])[:, None]
    vectors, values, _ = np.linalg.svd(matrix.numpy())
    rank = len(values)
    for i in range(len(values)):
        if sum(values[: i + 1] ** 2) / sum(values**2) > share:
            rank = i + 1
            break
    found = leading(matrix, share)
    assert found.shape == (shape[0], rank)
    expected = torch.from_numpy(vectors[:, :rank])
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-9)
    single = leading(matrix, share, torch.float32)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single @ single.T, expected @ expected.T, rtol=0, atol=1e-3)


def test_directions_that_are_rounding_are_no_directions() -> None:
    assert leading(torch.zeros(4, 6, dtype=torch.float64), 0.5).shape == (4, 0)
    assert leading(normal(4, 2) @ normal(2, 30, seed=1), 1.0).shape == (4, 2)


def test_joined_bases_are_orthonormal_and_span_both() -> None:
    first, rows = basis_of(normal(2, 6)), normal(9, 6, seed=1)
    rest = outside(rows, first)
    assert (rest @ first).abs().max() < 1e-12
    both = joined(first, basis_of(rest[:1]))
    torch.testing.assert_close(both.T @ both, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert outside(first.T, both).abs().max() < 1e-12
    assert outside(rows[:1], both).abs().max() < 1e-12


def test_the_share_that_is_taken_in_brings_the_whole_to_the_threshold() -> None:
    rows, threshold = normal(40, 6) * 0.6 ** torch.arange(6), 0.9
    basis = basis_of(rows[:1])
    rest = outside(rows, basis)
    left = float(energy(rest) / energy(rows))
    assert 0.1 < left < 1
    both = joined(basis, leading(rest.T, wanted_share(left, threshold)))
    inside = 1 - float(energy(outside(rows, both)) / energy(rows))
    fewer = 1 - float(energy(outside(rows, both[:, :-1])) / energy(rows))
    assert fewer <= threshold < inside
    assert wanted_share(0.05, threshold) < 0


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_parts_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[kind]
    layer = make().double()
    x = normal(7, *shape[1:])
    whole = input_rows(layer, x)
    monkeypatch.setattr(subspaces, "NUMBERS", 2 * (len(whole) // 7) * 40)
    parts = list(input_parts(layer, x, 40))
    assert len(parts) == 4
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.MultiheadAttention(4, 2),
        nn.Embedding(4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_it_cannot_see_into_are_named(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"net\.1 is a") as caught:
        weight_layers(nn.Sequential(nn.Linear(2, 2), layer), "net")
    assert "\n" not in str(caught.value)


def test_layers_without_a_matrix_are_passed_by() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)))
    assert list(weight_layers(net, "net")) == ["net.0", "net.2.1"]


REAL_SIZE = """
import resource, torch
from fedcl.federation.reduction import Reducer
from fedcl.blocks.subspaces import input_parts, joined, leading, outside, projected
torch.set_num_threads(1)
layer = torch.nn.Conv2d(512, 512, 3, padding=1, bias=False)
make = torch.Generator().manual_seed(0)
basis = torch.linalg.qr(torch.randn(4608, 64, generator=make, dtype=torch.float64)).Q
reducer = Reducer({"sketch": "sum"})
for client in range(2):
    sketch = torch.zeros(4608, 4608, dtype=torch.float64)
    for rows in input_parts(layer, torch.randn(4, 512, 4, 4, generator=make), 4608):
        rest = outside(rows, basis.float())
        sketch += rest.T @ torch.randn(len(rest), 4608, generator=make)
    reducer.add({"sketch": sketch}, 1.0)
wide = joined(basis, leading(reducer.result()["sketch"], 0.9, torch.float32))
assert 64 < wide.shape[1] <= 64 + 128, wide.shape
with torch.no_grad():
    after = layer.weight + 0.01
    update = (projected(layer.weight, after, wide) - layer.weight).flatten(1).double()
assert float((update @ wide).abs().max()) < 1e-6 and float(update.abs().max()) > 1e-3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_layer_of_512_x_512_x_3_x_3_stays_below_eight_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", REAL_SIZE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout)
    assert 300_000 < kilobytes < 8_000_000
