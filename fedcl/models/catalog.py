"""The names that the keys of the section ``model`` may have (no torch)."""

from __future__ import annotations

from typing import NamedTuple


class Encoder(NamedTuple):
    """One entry of ``fedcl list encoders``.

    ``width`` and ``depth`` are the values used when the configuration leaves them out; None: there is no
    such choice.
    """

    name: str
    summary: str
    width: int | None
    depth: int | None


ENCODERS: tuple[Encoder, ...] = (
    Encoder("mlp", "flattened image, hidden layers of model.width units with ReLU", 128, 2),
    Encoder("lenet", "two 5x5 convolutions with pooling, 64 units; images from 16x16", None, None),
    Encoder("simple_cnn", "CNN of the pfl-research CIFAR-10 benchmark, with dropout; images from 6x6", None, None),
    Encoder("alexnet", "three convolutions with pooling, two layers of 2,048, dropout (HAT); from 19x19", None, None),
    Encoder("resnet18", "ResNet-18 with a 3x3 stem for small images, 512 features", 64, None),
    Encoder("resnet20", "ResNet-20 for CIFAR (He et al. 2016), 64 features", 16, None),
    Encoder("resnet32", "ResNet-32 for CIFAR (He et al. 2016), 64 features", 16, None),
    Encoder("slim_resnet18", "ResNet-18 with 20 first-stage channels (GEM), 160 features", 20, None),
    Encoder("tiny_vit", "vision transformer of 4 blocks, 64 features, about 8x8 patches an image", 64, 4),
)
EXTERNAL: tuple[Encoder, ...] = (
    Encoder("torchvision:NAME", "classification model of torchvision; weights from model.checkpoint", None, None),
    Encoder("timm:NAME", "model of timm (extra 'timm'); weights from model.checkpoint", None, None),
)
NORMS: tuple[str, ...] = ("default", "batch", "group", "layer", "none")
HEADS: tuple[str, ...] = ("linear", "cosine", "nearest_mean", "simplex")
PROJECTORS: tuple[str, ...] = ("auto", "none", "linear", "mlp")
ALLOCATIONS: tuple[str, ...] = ("grow", "all")
FEATURE_NORMS: tuple[str, ...] = ("none", "l2", "l2_sqrt", "layer")


def find(name: str) -> Encoder | None:
    """The built-in encoder ``name``, or None.

    >>> find("mlp").width
    128
    """
    return next((entry for entry in ENCODERS if entry.name == name), None)
