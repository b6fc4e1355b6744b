"""Random images: as many as asked for, of one size, for measuring speed where no dataset is at hand."""

from __future__ import annotations

import numpy as np

from fedcl import random
from fedcl.data.readers import ArrayImages, Part, Raw
from fedcl.data.store import Images

CLASSES = 10
A_CLASS = 500  # training images, without data.limit
SIDES = {"random_grey": 28, "random_colour": 32}  # pixels, without data.size
CHANNELS = {"random_grey": 1, "random_colour": 3}


def images(name: str, size: int | None, limit: int | None) -> Raw:
    """Random uint8 images of 10 classes in turn (sample i has label i mod 10), the same at every call.

    Args:
        name: ``random_grey`` or ``random_colour``.
        size: pixels of a side; None: 28 (grey) or 32 (colour).
        limit: training images a class; None: 500. The test part has a quarter of it, at least one.
    """
    side, channels = size or SIDES[name], CHANNELS[name]
    each = limit or A_CLASS

    def part(count: int, kind: str) -> Part:
        labels = np.arange(count * CLASSES, dtype=np.int64) % CLASSES
        return Part(ArrayImages(pixels((len(labels), side, side, channels), name, kind)), labels)

    return Raw(part(each, "train"), part(max(1, each // 4), "test"), tuple(str(c) for c in range(CLASSES)))


def pixels(shape: tuple[int, ...], *stream: object) -> Images:
    """Uniform bytes of the named random stream in an array of ``shape``."""
    count = int(np.prod(shape))
    # Little-endian words give the same bytes on every machine.
    drawn = random.words(-(-count // 8), "random images", *stream).astype("<u8").view(np.uint8)
    return drawn[:count].reshape(shape)
