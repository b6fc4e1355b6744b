"""A small vision transformer (Dosovitskiy et al. 2021) for tests of prompts, adapters and LoRA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.models.norms import Kind, token_norm


def patch_size(height: int, width: int) -> int | None:
    """Pixels a side of a patch: the smallest common divisor that leaves 2 to 8 patches a side, or None.

    >>> [patch_size(s, s) for s in (8, 16, 28, 32, 64, 31)]
    [2, 2, 4, 4, 8, None]
    """
    for size in range(2, min(height, width) // 2 + 1):
        if height % size == 0 and width % size == 0 and max(height, width) <= 8 * size:
            return size
    return None


class Attention(nn.Module):
    """Multi-head self-attention in plain matrix products.

    The fused kernel has no batching rule over clients and would fall back to a loop.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) in and out."""
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)
        mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)
        out: Tensor = self.proj(mixed.reshape(batch, tokens, width))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a normalisation and around a shortcut."""

    def __init__(self, width: int, heads: int, norm: Kind) -> None:
        super().__init__()
        self.norm1 = token_norm(norm, width)
        self.attention = Attention(width, heads)
        self.norm2 = token_norm(norm, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) in and out."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class TinyViT(nn.Module):
    """Patches, a class token, learned positions and ``depth`` blocks; the class token is the feature."""

    def __init__(
        self, in_shape: tuple[int, int, int], patch: int, width: int, depth: int, heads: int, norm: Kind
    ) -> None:
        super().__init__()
        channels, height, side = in_shape
        self.patch = nn.Conv2d(channels, width, patch, stride=patch)
        tokens = 1 + (height // patch) * (side // patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*[Block(width, heads, norm) for _ in range(depth)])
        self.norm = token_norm(norm, width)
        self.feature_dim = width
        for array in [self.token, self.position]:
            nn.init.trunc_normal_(array, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        patches = self.patch(x).flatten(2).transpose(1, 2)
        token = self.token.expand(len(x), -1, -1)
        out = self.blocks(torch.cat([token, patches], dim=1) + self.position)
        features: Tensor = self.norm(out)[:, 0]
        return features
