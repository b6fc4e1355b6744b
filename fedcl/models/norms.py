"""Normalisation by one switch: BatchNorm, GroupNorm, LayerNorm or none."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fedcl.errors import UsageError

Kind = Literal["batch", "group", "layer", "none"]
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def groups_of(channels: int, least: int = 2) -> int:
    """Groups for GroupNorm: at most 32 (Wu and He 2018), a divisor, with ``least`` channels or more in each.

    A group of one value has no variance, so vectors need larger groups than images.

    >>> groups_of(64), groups_of(20), groups_of(128, least=8), groups_of(7)
    (32, 10, 16, 1)
    """
    top = max(1, min(32, channels // least))
    return next(count for count in range(top, 0, -1) if channels % count == 0)


def make_norm(kind: Kind, channels: int, axes: Literal["vector", "image"]) -> nn.Module:
    """A normalisation of (B, channels) vectors or (B, channels, H, W) images."""
    if kind == "batch":
        return nn.BatchNorm2d(channels) if axes == "image" else nn.BatchNorm1d(channels)
    if kind == "group":
        return nn.GroupNorm(groups_of(channels, 2 if axes == "image" else 8), channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


class TokenNorm(nn.Module):
    """Normalises the last axis of (B, tokens, channels) as the channels of an image are."""

    def __init__(self, kind: Kind, channels: int) -> None:
        super().__init__()
        self.norm = make_norm(kind, channels, "vector")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) in and out."""
        out: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out


def token_norm(kind: Kind, channels: int) -> nn.Module:
    """A normalisation of (B, tokens, channels); ``layer`` is over each token alone."""
    if kind == "layer":
        return nn.LayerNorm(channels)
    return nn.Identity() if kind == "none" else TokenNorm(kind, channels)


def _replacement(old: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, kind: Kind) -> nn.Module:
    axes: Literal["vector", "image"] = "vector" if isinstance(old, nn.BatchNorm1d) else "image"
    new = make_norm(kind, old.num_features, axes)
    if isinstance(new, nn.GroupNorm) and old.affine:
        new.weight, new.bias = old.weight, old.bias
    # timm's BatchNormAct carries the activation that follows; it must survive.
    rest = [part for part in (getattr(old, "drop", None), getattr(old, "act", None)) if part is not None]
    return nn.Sequential(new, *rest) if rest else new


def replace_norms(root: nn.Module, kind: Kind, model_name: str) -> None:
    """Puts ``kind`` in place of every BatchNorm of ``root``, in place; scales and shifts are kept.

    Raises:
        UsageError: when the network has no BatchNorm.
    """
    found = [(name, module) for name, module in root.named_modules() if isinstance(module, _BATCH)]
    if not found:
        raise UsageError("model.norm", kind, f"{model_name} has no BatchNorm to replace; use 'default'")
    if kind == "batch":
        return
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, _replacement(module, kind))


def scale_and_shift(root: nn.Module) -> set[str]:
    """Names of the scales and shifts of all normalisation layers of a network.

    >>> sorted(scale_and_shift(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    ['1.bias', '1.weight']
    """
    layers = (*_BATCH, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
    return {
        f"{place}.{name}" if place else name
        for place, module in root.named_modules()
        if isinstance(module, layers)
        for name, _ in module.named_parameters(recurse=False)
    }
