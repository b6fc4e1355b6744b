"""The built-in encoders by name."""

from __future__ import annotations

import math
from typing import cast

from torch import nn

from fedcl.config import Model
from fedcl.errors import UsageError
from fedcl.models import catalog
from fedcl.models.norms import Kind, make_norm
from fedcl.models.resnet import ResNet
from fedcl.models.vit import TinyViT, patch_size

Shape = tuple[int, int, int]
_VIT_HEADS = 4


def _positive(config: Model, field: str, default: int | None) -> int:
    value: int | None = getattr(config, field)
    if value is None:
        return default or 0
    if default is None:
        raise UsageError(f"model.{field}", value, f"{config.name} has no {field} to choose; leave it out")
    if value < 1:
        raise UsageError(f"model.{field}", value, "a whole number above 0")
    return value


def _too_small(name: str, shape: Shape, least: int) -> UsageError:
    allowed = f"needs images of at least {least}x{least}, these are {shape[1]}x{shape[2]}; set data.size"
    return UsageError("model.name", name, allowed)


def _mlp(shape: Shape, width: int, depth: int, norm: Kind, bias: bool) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(inputs, width, bias=bias)]
        if norm != "none":
            layers.append(make_norm(norm, width, "vector"))
        layers.append(nn.ReLU())
        inputs = width
    return nn.Sequential(*layers), width


def _lenet(shape: Shape, norm: Kind, bias: bool) -> tuple[nn.Module, int]:
    if min(shape[1:]) < 16:
        raise _too_small("lenet", shape, 16)
    height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
    layers: list[nn.Module] = []
    for inputs, outputs in ((shape[0], 16), (16, 32)):
        layers.append(nn.Conv2d(inputs, outputs, 5, bias=bias))
        if norm != "none":
            layers.append(make_norm(norm, outputs, "image"))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * height * width, 64, bias=bias), nn.ReLU()), 64


def _simple_cnn(shape: Shape, norm: Kind, bias: bool) -> tuple[nn.Module, int]:
    if min(shape[1:]) < 6:
        raise _too_small("simple_cnn", shape, 6)
    height, width = ((side - 4) // 2 for side in shape[1:])
    layers: list[nn.Module] = []
    for inputs, outputs in ((shape[0], 32), (32, 64)):
        layers.append(nn.Conv2d(inputs, outputs, 3, bias=bias))
        if norm != "none":
            layers.append(make_norm(norm, outputs, "image"))
        layers.append(nn.ReLU())
    layers += [nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64 * height * width, 128, bias=bias), nn.ReLU(), nn.Dropout(0.5)), 128


def _alexnet(shape: Shape, norm: Kind, bias: bool) -> tuple[nn.Module, int]:
    if min(shape[1:]) < 19:
        raise _too_small("alexnet", shape, 19)
    layers: list[nn.Module] = []
    inputs, sides = shape[0], list(shape[1:])
    for outputs, size, drop in ((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5)):
        layers.append(nn.Conv2d(inputs, outputs, size, bias=bias))
        if norm != "none":
            layers.append(make_norm(norm, outputs, "image"))
        layers += [nn.ReLU(), nn.Dropout(drop), nn.MaxPool2d(2)]
        inputs, sides = outputs, [(side - size + 1) // 2 for side in sides]
    layers.append(nn.Flatten())
    inputs = 256 * math.prod(sides)
    for _ in range(2):
        layers.append(nn.Linear(inputs, 2048, bias=bias))
        if norm != "none":
            layers.append(make_norm(norm, 2048, "vector"))
        layers += [nn.ReLU(), nn.Dropout(0.5)]
        inputs = 2048
    return nn.Sequential(*layers), 2048


def _tiny_vit(shape: Shape, width: int, depth: int, norm: Kind) -> tuple[nn.Module, int]:
    patch = patch_size(shape[1], shape[2])
    if patch is None:
        allowed = f"{shape[1]}x{shape[2]} images do not divide into 2 to 8 patches a side; set data.size"
        raise UsageError("model.name", "tiny_vit", allowed)
    if width % _VIT_HEADS:
        raise UsageError("model.width", width, f"a multiple of {_VIT_HEADS} (attention heads) for tiny_vit")
    return TinyViT(shape, patch, width, depth, _VIT_HEADS, norm), width


_RESNETS: dict[str, tuple[tuple[int, ...], str]] = {
    "resnet18": ((2, 2, 2, 2), "conv"),
    "slim_resnet18": ((2, 2, 2, 2), "conv"),
    "resnet20": ((3, 3, 3), "pad"),
    "resnet32": ((5, 5, 5), "pad"),
}

_PLAIN = {"lenet": _lenet, "simple_cnn": _simple_cnn, "alexnet": _alexnet}


def build_encoder(config: Model, shape: Shape) -> tuple[nn.Module, int]:
    """The built-in encoder ``config.name`` for images of ``shape`` (C, H, W), and its feature dimension.

    Parameters are drawn from torch's global generator: the caller owns its state.

    Raises:
        UsageError: unknown name, wrong width or depth, or images that are too small.
    """
    name = config.name
    entry = catalog.find(name)
    if entry is None:
        names = [known.name for known in catalog.ENCODERS]
        allowed = f"one of {', '.join(names)}, torchvision:NAME or timm:NAME"
        raise UsageError("model.name", name, allowed, names)
    width = _positive(config, "width", entry.width)
    depth = _positive(config, "depth", entry.depth)
    usual = "layer" if name == "tiny_vit" else "none" if name in _PLAIN or name == "mlp" else "batch"
    norm = cast(Kind, usual if config.norm == "default" else config.norm)
    if not config.bias and name not in _PLAIN and name != "mlp":
        raise UsageError("model.bias", False, f"must be true: {name} has its biases, or none, by its definition")
    if name in _RESNETS:
        blocks, shortcut = _RESNETS[name]
        net = ResNet(shape[0], width, blocks, norm, "pad" if shortcut == "pad" else "conv")
        return net, net.feature_dim
    if name == "mlp":
        return _mlp(shape, width, depth, norm, config.bias)
    if name == "tiny_vit":
        return _tiny_vit(shape, width, depth, norm)
    return _PLAIN[name](shape, norm, config.bias)
