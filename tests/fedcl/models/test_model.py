"""Models as functions of their arrays: alone, in a stack, and without touching what they are given."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from fedcl.config import Model
from fedcl.errors import UsageError
from fedcl.models.arrays import Arrays, buffer_names, grow_head, initial_arrays, own_buffers, parameter_names
from fedcl.models.model import FedModel, build_model, run

DIGITS = (1, 8, 8)
TINY = {
    "mlp": (Model(name="mlp", width=16, norm="batch"), DIGITS),
    "lenet": (Model(name="lenet", norm="batch"), (1, 16, 16)),
    "simple_cnn": (Model(name="simple_cnn", norm="batch"), DIGITS),
    "resnet18": (Model(name="resnet18", width=4), DIGITS),
    "resnet20": (Model(name="resnet20", width=4), DIGITS),
    "resnet32": (Model(name="resnet32", width=4), DIGITS),
    "slim_resnet18": (Model(name="slim_resnet18", width=4), (3, 8, 8)),
    "tiny_vit": (Model(name="tiny_vit", width=16, depth=2, norm="batch"), DIGITS),
    "group norm": (Model(name="resnet20", width=4, norm="group"), DIGITS),
}


def _model(config: Model, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[FedModel, Arrays]:
    model = build_model(config, shape, projector=True, seed=3)
    return model, grow_head(initial_arrays(model, dtype), model, range(5), seed=3)


def _images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _loss(model: FedModel) -> Any:
    def loss(params: Arrays, buffers: Arrays, x: Tensor, y: Tensor, seed: Tensor) -> tuple[Tensor, Arrays]:
        out = run(model, {**params, **buffers}, x, train=True, seed=seed)
        assert out.embeddings is not None
        return F.cross_entropy(out.logits, y) + out.embeddings.square().mean(), buffers

    return grad(loss, has_aux=True)


@pytest.mark.parametrize("name", TINY)
def test_stacked_gradients_equal_one_by_one(name: str) -> None:
    model, arrays = _model(*TINY[name], torch.float64)
    clients, buffers = 3, buffer_names(model)
    x = _images(clients, 6, *TINY[name][1])
    y = torch.arange(clients * 6).reshape(clients, 6) % 5
    seeds = torch.tensor([11, 12, 13])
    params = {n: torch.stack([arrays[n] * (1 + 0.01 * k) for k in range(clients)]) for n in parameter_names(model)}
    stacked = {n: torch.stack([arrays[n]] * clients) for n in buffers}
    before = {n: t.clone() for n, t in stacked.items()}
    gradients, new = vmap(_loss(model), randomness="error")(
        params, {n: t.clone() for n, t in stacked.items()}, x, y, seeds
    )
    for k in range(clients):
        own = {n: t[k].clone() for n, t in before.items()}
        alone, updated = _loss(model)({n: t[k] for n, t in params.items()}, own, x[k], y[k], seeds[k])
        for n, gradient in alone.items():
            torch.testing.assert_close(gradients[n][k], gradient, rtol=0, atol=1e-12)
        for n, tensor in updated.items():
            torch.testing.assert_close(new[n][k], tensor, rtol=0, atol=1e-12)
    if name != "group norm":
        assert buffers
        assert not torch.equal(new[buffers[0]], before[buffers[0]])


@pytest.mark.parametrize("name", TINY)
def test_run_equals_the_module_with_the_same_arrays(name: str) -> None:
    model, arrays = _model(*TINY[name], torch.float32)
    x, seed = _images(4, *TINY[name][1], dtype=torch.float32), torch.tensor(5)
    twin = build_model(TINY[name][0], TINY[name][1], projector=True, seed=99)
    twin.head.weight = torch.nn.Parameter(torch.zeros_like(arrays["head.weight"]))
    twin.head.bias = torch.nn.Parameter(torch.zeros_like(arrays["head.bias"]))
    twin.load_state_dict(arrays)
    for train in (True, False):
        mine = own_buffers(model, arrays)
        out = run(model, mine, x, train=train, seed=seed)
        expected = twin.train(train)(x, seed=seed)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.features, expected.features)
        assert torch.equal(out.embeddings, expected.embeddings)
        assert out.features.shape == (4, model.feature_dim)
        assert all(torch.equal(mine[n], twin.get_buffer(n)) for n in buffer_names(model))
        twin.load_state_dict(arrays)


def test_training_leaves_the_servers_buffers_and_evaluation_writes_none() -> None:
    model, arrays = _model(*TINY["resnet20"], torch.float32)
    x = _images(4, *DIGITS, dtype=torch.float32)
    server = {n: t.clone() for n, t in arrays.items()}
    skeleton = {n: t.clone() for n, t in model.state_dict().items()}
    mine = own_buffers(model, arrays)
    run(model, mine, x, train=True)
    assert int(mine["encoder.norm1.num_batches_tracked"]) == 1
    assert not torch.equal(mine["encoder.norm1.running_mean"], server["encoder.norm1.running_mean"])
    assert mine["encoder.conv1.weight"] is arrays["encoder.conv1.weight"]
    run(model, arrays, x, train=False)
    run(model, arrays, x, train=True, batch_norm="eval")
    assert all(torch.equal(arrays[n], server[n]) for n in server)
    assert all(torch.equal(t, skeleton[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("before", [True, False])
def test_run_leaves_the_skeletons_mode(before: bool) -> None:
    model, arrays = _model(*TINY["resnet20"], torch.float32)
    model.train(before)
    x = _images(2, *DIGITS, dtype=torch.float32)
    for train, batch_norm in itertools.product((True, False), ("same", "eval")):
        run(model, own_buffers(model, arrays), x, train=train, batch_norm=batch_norm)  # type: ignore[arg-type]
        assert {module.training for module in model.modules()} == {before}


def test_arrays_must_fit() -> None:
    model, arrays = _model(*TINY["mlp"], torch.float32)
    x = _images(2, *DIGITS, dtype=torch.float32)
    with pytest.raises(KeyError, match=r"head\.bias"):
        run(model, {n: t for n, t in arrays.items() if n != "head.bias"}, x, train=True)
    with pytest.raises(KeyError, match="stranger"):
        run(model, {**arrays, "stranger": x}, x, train=True)


def test_dropout_is_the_same_alone_and_stacked_and_follows_the_seed() -> None:
    model, arrays = _model(Model(name="simple_cnn", dropout=0.3), DIGITS, torch.float32)
    x, seeds = _images(3, 5, *DIGITS, dtype=torch.float32), torch.tensor([4, 5, 4])

    def features(x: Tensor, seed: Tensor) -> Tensor:
        return run(model, arrays, x, train=True, seed=seed, taps=("dropout",)).taps["dropout"].output

    with torch.no_grad():
        both = vmap(features, randomness="error")(x, seeds)
        zeros = [(features(x[0], s) == 0) & (features(x[0], seeds[1]) != 0) for s in seeds]
        for k in range(3):
            # The masks are equal bit for bit; sums of convolutions need not be.
            alone = features(x[k], seeds[k])
            assert torch.equal(both[k] == 0, alone == 0)
            torch.testing.assert_close(both[k], alone, rtol=1e-5, atol=1e-6)
    assert zeros[0].any()
    assert torch.equal(zeros[0], zeros[2])
    with pytest.raises(RuntimeError, match="seed"):
        run(model, arrays, x[0], train=True)
    assert torch.equal(
        run(model, arrays, x[0], train=False).logits,
        run(model, arrays, x[0], train=False, seed=seeds[0]).logits,
    )


def test_taps_catch_inputs_and_outputs_also_in_a_stack() -> None:
    model, arrays = _model(*TINY["resnet20"], torch.float64)
    taps = ("encoder.layer1", "encoder.layer2", "head")
    x = _images(2, 4, *DIGITS)
    one = run(model, arrays, x[1], train=False, taps=taps)
    assert tuple(one.taps) == taps
    assert torch.equal(one.taps["encoder.layer1"].output, one.taps["encoder.layer2"].input)
    assert torch.equal(one.taps["head"].input, one.features)
    assert torch.equal(one.taps["head"].output, one.logits)
    many = vmap(lambda x: run(model, arrays, x, train=False, taps=taps).taps)(x)
    torch.testing.assert_close(many["encoder.layer2"].output[1], one.taps["encoder.layer2"].output)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(AttributeError):
        run(model, arrays, x[0], train=False, taps=("encoder.layer9",))


def test_initial_values_depend_on_the_seed_alone() -> None:
    config = Model(name="resnet20", width=4)
    state = torch.get_rng_state()
    first = initial_arrays(build_model(config, DIGITS, projector=True, seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    torch.set_default_dtype(torch.float64)
    try:
        second = initial_arrays(build_model(config, DIGITS, projector=False, seed=0))
    finally:
        torch.set_default_dtype(torch.float32)
    other = initial_arrays(build_model(config, DIGITS, projector=True, seed=1))
    assert {n for n in first if n not in second} == {n for n in first if n.startswith("projector.")}
    assert all(torch.equal(first[n], second[n]) for n in second)
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])
    assert not torch.equal(first["projector.0.weight"], other["projector.0.weight"])


def test_projector_is_there_when_asked_for() -> None:
    def projector(kind: str, asked: bool) -> torch.nn.Module | None:
        config = Model(projector=kind, projector_dim=6)
        return build_model(config, DIGITS, projector=asked, seed=0).projector

    assert projector("auto", False) is None
    assert projector("none", True) is None
    assert isinstance(projector("linear", False), torch.nn.Linear)
    for kind in ("auto", "mlp", "linear"):
        model = build_model(Model(projector=kind, projector_dim=6), DIGITS, projector=True, seed=0)
        out = run(model, initial_arrays(model), _images(2, *DIGITS, dtype=torch.float32), train=True)
        assert out.embeddings is not None
        assert out.embeddings.shape == (2, 6)


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("name", Model(name="resnet33")),
        ("norm", Model(norm="bach")),
        ("projector", Model(projector="lin")),
        ("projector_dim", Model(projector="mlp", projector_dim=0)),
        ("head", Model(head="cosin")),
        ("head_allocate", Model(head_allocate="al")),
        ("head_allocate", Model(head="simplex")),
        ("dropout", Model(dropout=1.0)),
        ("dropout", Model(dropout=float("nan"))),
        ("width", Model(width=0)),
        ("width", Model(name="simple_cnn", width=9)),
        ("width", Model(name="tiny_vit", width=9)),
        ("depth", Model(name="resnet18", depth=2)),
    ],
)
def test_wrong_settings_are_named(key: str, config: Model) -> None:
    with pytest.raises(UsageError, match=rf"^model\.{key}="):
        build_model(config, DIGITS, projector=True, seed=0)
