"""Networks by name: sizes, parameter counts, normalisations, and weights from files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedcl.bridges.avalanche_import import quiet_avalanche
from fedcl.config import Model
from fedcl.errors import UsageError
from fedcl.models import catalog
from fedcl.models.arrays import grow_head, initial_arrays
from fedcl.models.layers import Dropout, replace_dropout, step_seed
from fedcl.models.model import FedModel, build_model, run
from fedcl.models.norms import groups_of, scale_and_shift

Shape = tuple[int, int, int]


def _build(name: str, shape: Shape = (3, 32, 32), **settings: object) -> FedModel:
    config = Model(name=name)
    for field, value in settings.items():
        setattr(config, field, value)
    return build_model(config, shape, projector=False, seed=0)


def _pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(6))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "count", "width"),
    [
        ("resnet32", 463_504, 64),  # the class-incremental survey's count
        ("resnet20", 269_722 - 650, 64),  # usual count with 10 classes, less its head
        ("resnet18", 11_173_962 - 5130, 512),
        ("simple_cnn", 1_626_442 - 1290, 128),
        # three convolutions, 256 x 2 x 2 pixels into two layers of 2,048
        ("alexnet", 48 * 64 + 576 * 128 + 512 * 256 + 448 + 1024 * 2048 + 2048 * 2048 + 4096, 2048),
        ("slim_resnet18", 1_109_240 - 16_100, 160),  # usual count with 100 classes, less its head
        # blocks, positions with the class token, class token, patches with bias, last norm
        ("tiny_vit", 4 * (12 * 64 * 64 + 13 * 64) + 65 * 64 + 64 + (48 * 64 + 64) + 2 * 64, 64),
    ],
)
def test_parameter_counts(name: str, count: int, width: int) -> None:
    model = _build(name)
    assert _count(model.encoder) == count
    assert model.feature_dim == width


def test_slim_resnet_has_the_shapes_of_avalanches() -> None:
    quiet_avalanche()
    reference = pytest.importorskip("avalanche.models.slim_resnet18").SlimResNet18(10)
    expected = sorted(tuple(p.shape) for n, p in reference.named_parameters() if "linear" not in n)
    model = _build("slim_resnet18")
    assert sorted(tuple(p.shape) for p in model.encoder.parameters()) == expected
    assert model.feature_dim == 160


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
@pytest.mark.parametrize("name", [entry.name for entry in catalog.ENCODERS])
def test_all_sizes_work_or_say_why_not(name: str, shape: Shape) -> None:
    width = 8 if name.startswith(("resnet", "slim")) else None
    least = {"lenet": 16, "alexnet": 19}.get(name, 0)
    if shape[1] < least:
        with pytest.raises(UsageError, match=rf"model\.name='{name}'.*{least}x{least}.*{shape[1]}x{shape[1]}"):
            _build(name, shape)
        return
    model = _build(name, shape, width=width)
    out = run(model, initial_arrays(model), _pixels(2, *shape), train=True, seed=torch.tensor(1))
    assert out.features.shape == (2, model.feature_dim)
    assert out.features.isfinite().all()
    assert out.logits.shape == (2, 0)


def test_images_that_do_not_divide_into_patches() -> None:
    with pytest.raises(UsageError, match=r"model\.name='tiny_vit'.*31x31"):
        _build("tiny_vit", (1, 31, 31))
    with pytest.raises(UsageError, match=r"model\.name='simple_cnn'"):
        _build("simple_cnn", (1, 5, 5))


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("name", [entry.name for entry in catalog.ENCODERS])
def test_norm_switch(name: str, norm: str) -> None:
    width = 8 if name.startswith(("resnet", "slim")) else None
    shape = (1, 19, 19) if name == "alexnet" else (1, 16, 16)
    model = _build(name, shape, width=width, norm=norm)
    kinds = {type(m) for m in model.modules() if "Norm" in type(m).__name__ and type(m).__name__ != "TokenNorm"}
    batch = {nn.BatchNorm1d} if name in ("mlp", "tiny_vit") else {nn.BatchNorm2d}
    batch |= {nn.BatchNorm1d} if name == "alexnet" else set()
    layer = nn.LayerNorm if name == "tiny_vit" else nn.GroupNorm
    assert kinds == {"batch": batch, "group": {nn.GroupNorm}, "layer": {layer}, "none": set()}[norm]
    groups = {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert (groups <= {1}) == (norm != "group")
    arrays = grow_head(initial_arrays(model), model, range(3), 0)
    out = run(model, arrays, _pixels(4, *shape), train=True, seed=torch.tensor(1))
    assert out.logits.isfinite().all()
    assert 1e-3 < float(out.features.std()) < 30.0


def test_groups_divide_and_never_hold_one_value() -> None:
    for channels in range(2, 200):
        count = groups_of(channels)
        assert channels % count == 0
        assert count <= 32
        assert channels // count >= 2


def test_scales_and_shifts_are_those_of_normalisation_layers_alone() -> None:
    norms = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4)))
    named = {f"{place}.{kind}" for place in ("0", "2.0", "2.1") for kind in ("weight", "bias")}
    assert scale_and_shift(norms) == named
    assert scale_and_shift(nn.LayerNorm(4)) == {"weight", "bias"}
    assert scale_and_shift(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, elementwise_affine=False))) == set()


def test_external_models_give_features_for_one_and_three_channels() -> None:
    for name, width in (("torchvision:resnet18", 512), ("torchvision:squeezenet1_1", 512)):
        for channels in (1, 3):
            model = _build(name, (channels, 32, 32))
            assert model.feature_dim == width
            assert not any(m.out_features == 1000 for m in model.modules() if isinstance(m, nn.Linear))
            x = _pixels(2, channels, 32, 32)
            out = run(model, initial_arrays(model), x, train=True, seed=torch.tensor(1))
            assert out.features.shape == (2, width)


def test_external_models_lose_batch_norm_and_global_randomness() -> None:
    model = _build("torchvision:efficientnet_b0", norm="group")
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Dropout) for m in model.modules())
    assert any(isinstance(m, Dropout) and m.drawn == 1 and m.p > 0 for m in model.modules())
    arrays, x = initial_arrays(model), _pixels(2, 2, 3, 32, 32)
    seeds = torch.tensor([1, 2])
    with torch.no_grad():
        stacked = torch.func.vmap(lambda x, s: run(model, arrays, x, train=True, seed=s).features, randomness="error")(
            x, seeds
        )
        alone = run(model, arrays, x[1], train=True, seed=seeds[1]).features
    torch.testing.assert_close(stacked[1], alone, rtol=1e-4, atol=1e-5)


def test_timm_models() -> None:
    pytest.importorskip("timm")
    model = _build("timm:resnet10t", (1, 32, 32), norm="group")
    assert model.feature_dim == 512
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(UsageError, match="Did you mean 'timm:resnet18'"):
        _build("timm:resnet18x")
    with pytest.raises(UsageError, match=r"does not take 32x32.*data\.size"):
        _build("timm:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("torchvision:resnet19", {}, r"model\.name=.*Did you mean 'torchvision:resnet1"),
        ("torchvision:vit_b_32", {}, r"model\.name=.*32x32.*data\.size"),
        ("torchvision:resnet18", {"width": 3}, r"model\.width=3"),
        ("torchvision:squeezenet1_1", {"norm": "group"}, r"model\.norm='group'.*no BatchNorm"),
        ("torchvision:resnet18", {"checkpoint": "nowhere.pt"}, r"model\.checkpoint='nowhere\.pt'"),
    ],
)
def test_external_errors_are_one_line(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _build(name, **settings)
    assert "\n" not in str(caught.value)


def test_checkpoints(tmp_path: Path) -> None:
    import torchvision

    donor = torchvision.models.resnet18(weights=None)
    weights = {n: t.detach().clone() for n, t in donor.state_dict().items()}
    torch.save({"state_dict": {f"module.{n}": t for n, t in weights.items()}}, tmp_path / "a.pt")
    save_file(weights, tmp_path / "b.safetensors")
    for file in ("a.pt", "b.safetensors"):
        arrays = initial_arrays(_build("torchvision:resnet18", checkpoint=str(tmp_path / file)))
        assert all(torch.equal(arrays[f"encoder.{n}"], t) for n, t in weights.items() if "fc." not in n)
    grouped = _build("torchvision:resnet18", checkpoint=str(tmp_path / "a.pt"), norm="group")
    assert torch.equal(initial_arrays(grouped)["encoder.conv1.weight"], weights["conv1.weight"])

    own = build_model(Model(name="resnet20", width=4), (1, 8, 8), projector=True, seed=8)
    save_file(grow_head(initial_arrays(own), own, range(3), 8), tmp_path / "own.safetensors")
    read = _build("resnet20", (1, 8, 8), width=4, checkpoint=str(tmp_path / "own.safetensors"))
    assert torch.equal(read.encoder.conv1.weight, own.encoder.conv1.weight)  # type: ignore[arg-type,union-attr]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    files = {"other.pt": {"w": torch.zeros(2)}, "list.pt": [1, 2], "code.pt": {"w": Evil()}}
    for file, content in files.items():
        torch.save(content, tmp_path / file)
    (tmp_path / "torn.safetensors").write_bytes(b"\x05\x00")
    (tmp_path / "torn.pt").write_bytes(b"\x05\x00")
    small = _build("resnet20", (1, 8, 8), width=4)
    save_file(initial_arrays(small), tmp_path / "small.safetensors")
    expected = {
        "other.pt": "missing, first .*1 unknown, first w",
        "list.pt": "named tensors",
        "code.pt": "weights only",
        "torn.safetensors": "readable",
        "torn.pt": "readable",
        "small.safetensors": "of another shape, first conv1.weight",
    }
    for file, message in expected.items():
        with pytest.raises(UsageError, match=rf"^model\.checkpoint=.*{message}") as caught:
            _build("resnet20", (1, 8, 8), checkpoint=str(tmp_path / file))
        assert "\n" not in str(caught.value)


def _seeded(layer: nn.Module, x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    with step_seed(seed):
        return layer(x)  # type: ignore[no-any-return]


def test_dropout_rates_and_axes() -> None:
    net = nn.Sequential(nn.Dropout(0.25), nn.Dropout2d(0.5))
    replace_dropout(net, "net")
    x = torch.ones(64, 8, 6, 6)
    with step_seed(torch.tensor(3)):
        first = net[0](x)
        second = net[1](x)
    assert float((first == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert float(first.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(second, second[:, :, :1, :1].expand_as(x))
    assert float((second == 0).float().mean()) == pytest.approx(0.5, abs=0.06)
    stacked = torch.func.vmap(lambda s: _seeded(net[0], x, s), randomness="error")(torch.tensor([9, 3]))
    assert torch.equal(stacked[1], first)
    assert not torch.equal(stacked[0], first)
    assert torch.equal(net.eval()(x), x)
    with pytest.raises(UsageError, match="AlphaDropout"):
        replace_dropout(nn.Sequential(nn.AlphaDropout(0.1)), "net")


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, fedcl.models.catalog, fedcl.local.rates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_blocks_without_normalisation_start_as_their_shortcuts() -> None:
    plain, normed = (_build("resnet20", (1, 8, 8), width=4, norm=norm) for norm in ("none", "batch"))
    assert not plain.encoder.get_parameter("layer2.1.conv2.weight").any()
    assert plain.encoder.get_parameter("layer2.1.conv1.weight").any()
    assert normed.encoder.get_parameter("layer2.1.conv2.weight").any()


@pytest.mark.parametrize("name", ["mlp", "lenet", "simple_cnn", "alexnet"])
def test_layers_without_biases(name: str) -> None:
    with_biases, without = _build(name), _build(name, bias=False)
    names = [n for n, _ in with_biases.encoder.named_parameters() if not n.endswith("bias")]
    assert [n for n, _ in without.encoder.named_parameters()] == names


def test_a_residual_network_has_no_biases_to_take_away() -> None:
    with pytest.raises(UsageError, match=r"model\.bias"):
        _build("resnet20", bias=False)
