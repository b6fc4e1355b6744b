"""Augmentation of whole batches on the device, each sample by its own counter-based draws.

A transform works on float pixels (B, C, H, W) in [0, 1], before they are standardised, C = 1 or 3. What
happens to row i depends only on the seed, the view, the place of the transform in the list, and i: never on
the other rows or on how many there are. There is no data-dependent control flow, so ``torch.func.vmap`` over
clients gives what each client alone would get.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from fedcl import random
from fedcl.errors import UsageError


class Draws:
    """Uniform numbers of one transform: row i of ``uniform(name)`` belongs to sample i."""

    def __init__(self, seed: Tensor, place: str, images: Tensor) -> None:
        self._seed, self._place, self._count = seed, place, images.shape[0]
        self._dtype = torch.float64 if images.dtype == torch.float64 else torch.float32

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B,) in (low, high)."""
        tag = random.fold("augment", self._place, name)
        return low + (high - low) * random.counter_uniform(self._seed, tag, (self._count,), self._dtype)

    def integers(self, name: str, bound: int) -> Tensor:
        """(B,) int64 of ``range(bound)``."""
        tag = random.fold("augment", self._place, name)
        return random.counter_integers(self._seed, tag, bound, (self._count,))

    def happens(self, probability: float) -> Tensor:
        """(B, 1, 1, 1) bool."""
        return (self.uniform("happens") < probability)[:, None, None, None]


Values = tuple[float, ...]
Transform = Callable[[Tensor, Draws, Values], Tensor]


def _grey(images: Tensor) -> Tensor:
    """Luminance (B, 1, H, W), ITU-R BT.601; of one channel: itself."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def crop(images: Tensor, draws: Draws, values: Values) -> Tensor:
    """Pads each side by black pixels and cuts the original size out at a uniform place."""
    height, width = images.shape[-2:]
    pad = int(values[0]) if values[0] else max(1, min(height, width) // 8)
    if pad >= min(height, width):
        raise UsageError("data.augment", f"crop({pad})", f"images are {height}x{width}: pad by less")
    padded = functional.pad(images, (pad, pad, pad, pad))
    device = images.device
    rows = draws.integers("down", 2 * pad + 1)[:, None] + torch.arange(height, device=device)
    columns = draws.integers("right", 2 * pad + 1)[:, None] + torch.arange(width, device=device)
    batch, channels = images.shape[:2]
    kept = padded.gather(2, rows[:, None, :, None].expand(batch, channels, height, width + 2 * pad))
    return kept.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))


def flip(images: Tensor, draws: Draws, values: Values) -> Tensor:
    """Mirrors left and right with a probability."""
    return torch.where(draws.happens(values[0]), images.flip(-1), images)


def jitter(images: Tensor, draws: Draws, values: Values) -> Tensor:
    """Brightness, contrast and saturation, in this order, each by a factor of U(1 - strength, 1 + strength).

    Grey images have no saturation to change. Results are clamped to [0, 1] after each.
    """
    strength, probability = values

    def factor(name: str) -> Tensor:
        return draws.uniform(name, 1.0 - strength, 1.0 + strength).to(images.dtype)[:, None, None, None]

    out = (images * factor("brightness")).clamp(0.0, 1.0)
    level = _grey(out).mean((1, 2, 3), keepdim=True)
    out = (level + (out - level) * factor("contrast")).clamp(0.0, 1.0)
    if images.shape[1] == 3:
        grey = _grey(out)
        out = (grey + (out - grey) * factor("saturation")).clamp(0.0, 1.0)
    return torch.where(draws.happens(probability), out, images)


def grayscale(images: Tensor, draws: Draws, values: Values) -> Tensor:
    """All channels become the luminance, with a probability; leaves grey images as they are."""
    return torch.where(draws.happens(values[0]), _grey(images).expand_as(images), images)


def blur(images: Tensor, draws: Draws, values: Values) -> Tensor:
    """Gaussian blur of sigma U(0.1, largest) pixels with a probability; edges are reflected."""
    largest, probability = values
    radius = math.ceil(2.0 * largest)
    height, width = images.shape[-2:]
    if radius >= min(height, width):
        allowed = f"images are {height}x{width}: twice sigma, rounded up, must be below {min(height, width)}"
        raise UsageError("data.augment", f"blur({largest:g})", allowed)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    sigma = draws.uniform("sigma", 0.1, largest).to(images.dtype)[:, None]
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    out = images
    for axis, length in ((2, height), (3, width)):
        shifted = torch.zeros_like(images)
        for tap, offset in enumerate(range(-radius, radius + 1)):
            places = (torch.arange(length, device=images.device) + offset).abs()
            mirrored = (length - 1) - ((length - 1) - places).abs()
            shifted = shifted + weights[:, tap, None, None, None] * out.index_select(axis, mirrored)
        out = shifted
    return torch.where(draws.happens(probability), out, images)


Row = tuple[Tensor, Tensor, Tensor]


def _resample(images: Tensor, across: Row, down: Row) -> Tensor:
    """Bilinear samples of (B, C, H, W) at an affine image of each pixel's place; black outside.

    Output place (x, y), in [-1, 1] over the image, shows the input at (a x + b y + c, d x + e y + f) with
    (a, b, c) = ``across`` and (d, e, f) = ``down``, each (B,).
    """
    height, width = images.shape[-2:]
    exact = across[0].dtype
    x = (2.0 * torch.arange(width, device=images.device, dtype=exact) + 1.0) / width - 1.0
    y = ((2.0 * torch.arange(height, device=images.device, dtype=exact) + 1.0) / height - 1.0)[:, None]
    rows = [[entry[:, None, None] for entry in row] for row in (across, down)]
    # no matrix product: its rounding would depend on how many samples there are
    grid = torch.stack([a * x + b * y + c for a, b, c in rows], -1)
    return functional.grid_sample(images.to(exact), grid, align_corners=False).to(images.dtype)


def rotation(images: Tensor, draws: Draws, values: Values) -> Tensor:
    """Turns each image about its centre by U(-degrees, degrees); bilinear, black outside."""
    angle = draws.uniform("angle", -math.radians(values[0]), math.radians(values[0]))
    height, width = images.shape[-2:]
    cosine, sine, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    across, down = (cosine, -sine * (height / width), zero), (sine * (width / height), cosine, zero)
    return _resample(images, across, down)


def resized_crop(images: Tensor, draws: Draws, values: Values) -> Tensor:
    """Cuts a box of U(smallest, 1) of the area and aspect e^U(log 3/4, log 4/3), stretched to the full size.

    A side longer than the image is shortened to it.
    """
    area = draws.uniform("area", values[0], 1.0)
    aspect = torch.exp(0.5 * draws.uniform("aspect", math.log(3 / 4), math.log(4 / 3)))
    wide = (area.sqrt() * aspect).clamp(max=1.0)
    high = (area.sqrt() / aspect).clamp(max=1.0)
    right = (1.0 - wide) * draws.uniform("right", -1.0, 1.0)
    down = (1.0 - high) * draws.uniform("down", -1.0, 1.0)
    zero = torch.zeros_like(area)
    return _resample(images, (wide, zero, right), (zero, high, down))


@dataclass(frozen=True)
class Parameter:
    """One number of a transform: its default and the range it may have."""

    name: str
    default: float
    low: float
    high: float
    whole: bool = False


_PROBABILITY = Parameter("probability", 1.0, 0.0, 1.0)
_HALF = Parameter("probability", 0.5, 0.0, 1.0)
TRANSFORMS: dict[str, tuple[Transform, tuple[Parameter, ...]]] = {
    "crop": (crop, (Parameter("pixels of padding, 0 for an eighth of the side", 0, 0, 4096, whole=True),)),
    "flip": (flip, (_HALF,)),
    "jitter": (jitter, (Parameter("strength", 0.4, 0.0, 1.0), _PROBABILITY)),
    "grayscale": (grayscale, (Parameter("probability", 0.2, 0.0, 1.0),)),
    "blur": (blur, (Parameter("largest sigma in pixels", 1.0, 0.1, 100.0), _HALF)),
    "rotation": (rotation, (Parameter("degrees", 15.0, 0.0, 180.0),)),
    "resized_crop": (resized_crop, (Parameter("smallest share of the area", 0.2, 0.01, 1.0),)),
}
POLICIES: dict[str, tuple[str, ...]] = {
    "standard": ("crop", "flip"),
    # the recipe of Chen et al. 2020 (SimCLR, appendix B.9, without hue and, as there for small images, blur)
    "simclr": ("resized_crop(0.08)", "flip", "jitter(0.4 0.8)", "grayscale(0.2)"),
}


@dataclass(frozen=True)
class Augmentation:
    """A transform of the list ``data.augment`` with all of its numbers."""

    name: str
    values: Values


_CALL = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


def parse_augmentations(texts: Sequence[str]) -> tuple[Augmentation, ...]:
    """Transforms and policies by name, numbers in brackets: ``crop(4)``, ``jitter(0.4 0.8)``, ``standard``.

    Numbers are separated by spaces or commas; those left out have their defaults.

    Raises:
        UsageError: an unknown name, or numbers that are too many, malformed or out of range.

    >>> parse_augmentations(["crop(4)", "flip"])
    (Augmentation(name='crop', values=(4.0,)), Augmentation(name='flip', values=(0.5,)))
    """
    return tuple(found for text in texts for found in _parse(text))


def _parse(text: str) -> tuple[Augmentation, ...]:
    names = [*TRANSFORMS, *POLICIES]
    match = _CALL.fullmatch(text)
    if match is None:
        raise UsageError("data.augment", text, "needs NAME or NAME(NUMBER ...); separate numbers by spaces")
    name, inside = match[1], match[2]
    if name in POLICIES:
        if inside is not None:
            raise UsageError("data.augment", text, f"the policy {name} takes no numbers")
        return parse_augmentations(POLICIES[name])
    if name not in TRANSFORMS:
        raise UsageError("data.augment", text, f"one of {', '.join(names)}", names)
    parameters = TRANSFORMS[name][1]
    given = re.split(r"\s*,\s*|\s+", inside.strip()) if inside and inside.strip() else []
    if len(given) > len(parameters):
        takes = ", ".join(p.name for p in parameters)
        raise UsageError("data.augment", text, f"{name} takes at most {len(parameters)} numbers ({takes})")
    values = [p.default for p in parameters]
    for place, (number, parameter) in enumerate(zip(given, parameters, strict=False)):
        kind = "a whole number" if parameter.whole else "a number"
        allowed = f"{parameter.name} must be {kind} from {parameter.low:g} to {parameter.high:g}"
        try:
            values[place] = float(number)
        except ValueError:
            raise UsageError("data.augment", text, allowed) from None
        whole = not parameter.whole or values[place].is_integer()
        if not (parameter.low <= values[place] <= parameter.high and whole):
            raise UsageError("data.augment", text, allowed)
    return (Augmentation(name, tuple(values)),)


def augment(images: Tensor, specs: Sequence[Augmentation], seed: Tensor, view: int = 0) -> Tensor:
    """Applies the transforms in order to each image.

    Args:
        images: (B, C, H, W) float pixels in [0, 1], C = 1 or 3.
        specs: of :func:`parse_augmentations`.
        seed: int64 scalar tensor on the images' device, see :func:`fedcl.random.step_seed`.
        view: number of the view, for methods that contrast several views of a batch.

    Returns:
        (B, C, H, W), same dtype, in [0, 1].

    Raises:
        UsageError: a transform that is larger than the images.
    """
    for place, spec in enumerate(specs):
        transform = TRANSFORMS[spec.name][0]
        images = transform(images, Draws(seed, f"{view}:{place}:{spec.name}", images), spec.values)
    return images
