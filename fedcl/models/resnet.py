"""Residual networks for small images (He et al. 2016), all with a 3x3 stem and no first pooling."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.models.norms import Kind, make_norm

Shortcut = Literal["pad", "conv"]


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class PadShortcut(nn.Module):
    """Option A of the paper: every ``stride``-th pixel, new channels are zero. No parameters."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added, self.stride = added, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + added, H / stride, W / stride)."""
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Kind, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = make_norm(norm, outputs, "image")
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = make_norm(norm, outputs, "image")
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            if shortcut == "pad":
                self.shortcut = PadShortcut(outputs - inputs, stride)
            else:
                self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), make_norm(norm, outputs, "image"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Stages of basic blocks; the channels double from stage to stage and the image halves.

    Args:
        channels: of the images.
        width: channels of the first stage.
        blocks: number of blocks in each stage.
        shortcut: ``pad`` (option A) or ``conv`` (option B of the paper) where the shape changes.
    """

    def __init__(self, channels: int, width: int, blocks: tuple[int, ...], norm: Kind, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3, 1)
        self.norm1 = make_norm(norm, width, "image")
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(inputs, outputs, stride, norm, shortcut))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        self.feature_dim = inputs
        self._initialise(norm)

    def _initialise(self, norm: Kind) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Without normalisation the variance doubles with every block; starting each block as
        # its shortcut (Zhang et al. 2019, Fixup) keeps deep networks finite.
        for module in self.modules():
            if norm == "none" and isinstance(module, BasicBlock):
                nn.init.zeros_(module.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, feature_dim): the mean over the last stage's pixels."""
        out = F.relu(self.norm1(self.conv1(x)))
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return out.mean((2, 3))
