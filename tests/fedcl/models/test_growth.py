"""Growth of heads and of everything that is shaped like them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from fedcl.config import Model, Optimiser
from fedcl.errors import UsageError
from fedcl.local.optim import PureOptimiser, make_optimiser
from fedcl.models.arrays import (
    Arrays,
    buffer_names,
    class_axes,
    frozen_names,
    grow_head,
    grow_like,
    initial_arrays,
    last_class_axes,
    parameter_names,
)
from fedcl.models.heads import simplex
from fedcl.models.model import FedModel, build_model, run

SHAPE = (1, 8, 8)
HEADS = ["linear", "linear without bias", "cosine", "nearest_mean"]
OPTIMISERS = [
    Optimiser(momentum=0.0),
    Optimiser(momentum=0.9, weight_decay=1e-3),
    Optimiser(name="adam", lr=0.01),
    Optimiser(name="adamw", lr=0.01, weight_decay=0.1),
]


def _model(head: str, **settings: object) -> FedModel:
    config = Model(width=12, head=head.split()[0], head_bias="without" not in head)
    for name, value in settings.items():
        setattr(config, name, value)
    return build_model(config, SHAPE, projector=False, seed=5)


def _step(
    model: FedModel, optimiser: PureOptimiser, arrays: Arrays, state: Arrays, classes: int
) -> tuple[Arrays, Arrays]:
    generator = torch.Generator().manual_seed(classes)
    x = torch.randn(16, *SHAPE, generator=generator, dtype=torch.float64)
    y = torch.arange(16) % classes

    def loss(params: Arrays) -> Tensor:
        return F.cross_entropy(run(model, params, x, train=True).logits, y)

    params = {n: arrays[n] for n in parameter_names(model)}
    return optimiser.update(params, grad(loss)(params), state, 0.05)


@pytest.mark.parametrize("added", [1, 2, 7])
@pytest.mark.parametrize("head", HEADS)
def test_classes_keep_their_values_and_new_ones_do_not_depend_on_when(head: str, added: int) -> None:
    model = _model(head)
    empty = initial_arrays(model)
    old, new = [40, 7], list(range(20, 20 + added))
    first = grow_head(empty, model, old, seed=1)
    later = grow_head(first, model, new, seed=1)
    at_once = grow_head(empty, model, new + old, seed=1)
    for name in class_axes(model):
        assert empty[name].shape[0] == 0
        assert later[name].shape == (2 + added, *empty[name].shape[1:])
        assert torch.equal(later[name][:2], first[name])
        assert torch.equal(later[name][2:], at_once[name][:added])
        assert torch.equal(later[name][:2], at_once[name][added:])
        bound = 12**-0.5
        assert later[name].abs().max() <= bound
        assert len(later[name].flatten().unique()) == later[name].numel()
        assert not torch.equal(grow_head(empty, model, old, seed=2)[name], first[name])
    assert all(later[n] is empty[n] for n in empty if n not in class_axes(model))
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    before, after = (run(model, arrays, x, train=False).logits for arrays in (first, later))
    assert after.shape == (3, 2 + added)
    torch.testing.assert_close(after[:, :2], before)


@pytest.mark.parametrize("added", [1, 2, 7])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("config", OPTIMISERS, ids=["sgd", "momentum", "adam", "adamw"])
def test_optimisers_go_on_after_growth_as_from_zero_padded_states(config: Optimiser, head: str, added: int) -> None:
    model, optimiser = _model(head), make_optimiser(config)
    arrays = grow_head(initial_arrays(model, torch.float64), model, [3, 1, 2], seed=0)
    state = optimiser.init({n: arrays[n] for n in parameter_names(model)})
    for _ in range(2):
        arrays, state = _step(model, optimiser, arrays, state, 3)
    new = list(range(10, 10 + added))
    grown = grow_head(arrays, model, new, seed=0)
    grown_state = {name: grow_like(tensor, name, model, new) for name, tensor in state.items()}

    padded = optimiser.init({n: grown[n] for n in parameter_names(model)})
    assert {n: t.shape for n, t in padded.items()} == {n: t.shape for n, t in grown_state.items()}
    for name, tensor in state.items():
        padded[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    ours = _step(model, optimiser, grown, grown_state, 3 + added)
    expected = _step(model, optimiser, grown, padded, 3 + added)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    rows = ours[0]["head.weight"][3:]
    assert rows.shape == (added, 12)
    assert not torch.equal(rows, grown["head.weight"][3:])


@pytest.mark.parametrize("added", [1, 2, 7])
def test_grow_like_for_masks_snapshots_and_stacks(added: int) -> None:
    model = _model("linear")
    arrays = grow_head(initial_arrays(model), model, [0, 1, 2], seed=0)
    new = list(range(3, 3 + added))
    grown = grow_head(arrays, model, new, seed=0)
    for name, initial in itertools.product(arrays, (False, True)):
        stack = torch.stack([arrays[name]] * 4)
        fill: object = "initial" if initial else 1.0
        out = grow_like(stack, f"control/{name}", model, new, fill=fill, seed=0)  # type: ignore[arg-type]
        assert out.shape == (4, *grown[name].shape)
        if initial:
            assert all(torch.equal(out[k], grown[name]) for k in range(4))
        elif name in class_axes(model):
            assert torch.equal(out[:, :3], stack)
            assert (out[:, 3:] == 1.0).all()
    assert grow_like(torch.tensor(3), "step", model, new).shape == ()
    assert grow_like(arrays["head.bias"], "head.bias", model, []).shape == (3,)


def test_which_arrays_have_classes() -> None:
    assert class_axes(_model("linear")) == {"head.weight": 0, "head.bias": 0}
    assert class_axes(_model("linear without bias")) == {"head.weight": 0}
    assert last_class_axes(_model("linear")) == {"head.weight": -2, "head.bias": -1}
    assert class_axes(_model("cosine")) == {"head.weight": 0}
    assert "head.scale" in parameter_names(_model("cosine"))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 13])
def test_simplex_cosines(classes: int) -> None:
    model = _model("simplex", head_allocate="all")
    ids = [17 * c % 31 for c in range(classes)]
    empty = initial_arrays(model, torch.float64)
    weight = grow_head(empty, model, ids, seed=0)["head.weight"]
    cosines = weight @ weight.T
    expected = torch.full_like(cosines, -1.0 / max(1, classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-6)
    exact = simplex(classes) @ simplex(classes).T
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-14)
    turned = grow_head(empty, model, ids[::-1], seed=0)["head.weight"]
    assert torch.equal(turned.flip(0), weight)


def test_simplex_is_fixed() -> None:
    model = _model("simplex", head_allocate="all")
    arrays = grow_head(initial_arrays(model), model, range(4), seed=0)
    assert "head.weight" in buffer_names(model)
    assert frozen_names(model) == {"head.weight"}
    assert frozen_names(_model("linear")) == set()
    for added in (1, 2, 7):
        with pytest.raises(UsageError, match=r"model\.head_allocate"):
            grow_head(arrays, model, range(4, 4 + added), seed=0)
    with pytest.raises(UsageError, match="14 classes need 13 features"):
        grow_head(initial_arrays(model), model, range(14), seed=0)


def test_head_formulas() -> None:
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for head in ("cosine", "nearest_mean", "linear without bias"):
        model = _model(head)
        arrays = grow_head(initial_arrays(model, torch.float64), model, range(3), seed=0)
        out = run(model, arrays, x, train=False)
        pairs = [[(f, w) for w in arrays["head.weight"]] for f in out.features]
        formula = {
            "cosine": lambda f, w: 10.0 * float(f @ w / f.norm() / w.norm()),
            "nearest_mean": lambda f, w: -float(((f - w) ** 2).sum()),
            "linear without bias": lambda f, w: float(f @ w),
        }[head]
        expected = torch.tensor([[formula(f, w) for f, w in row] for row in pairs], dtype=torch.float64)
        torch.testing.assert_close(out.logits, expected, rtol=1e-12, atol=1e-12)
