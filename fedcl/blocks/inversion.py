"""Data-free inversion: a generator learns to make images that a trained model takes for its classes.

A copy of the generator is adapted to each batch, and the generator follows by a meta step (Fang et al. 2022, AAAI).
Nothing here needs an image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import random as counter
from ..cards import option
from ..errors import RunFailed
from ..models.arrays import grow_head, initial_arrays, parameter_names
from ..models.model import FedModel, Output, run
from ..strategy import Arrays
from .generators import Generator, Moments, disagreement, moments, norm_layers, smoothed, statistics_distance
from .losses import cross_entropy, tempered_kl

REPTILE = 67.0
"""Factor on the Reptile gradient in the released code of TARGET."""


@dataclass(frozen=True)
class Recipe:
    """How images are made; the options of a strategy that makes some.

    Raises:
        ValueError: one is out of its range.
    """

    rounds: int = option(40, "batches of images that are made, each by an adapted copy of the generator")
    warmup: int = option(20, "of these, those before the disagreement with the student counts")
    batch: int = option(256, "images a batch", unit="images")
    steps: int = option(10, "steps of Adam on the copy and its latent vectors for each batch")
    meta: Literal["fomaml", "reptile"] = option("fomaml", "how the generator moves: by the copy's gradients or its way")
    lr: float = option(2e-3, "learning rate of the copy; the generator's is this times steps")
    lr_latent: float = option(1e-2, "learning rate of the latent vectors")
    latent: int = option(256, "entries of a latent vector")
    width: int = option(64, "channels of the generator's last hidden layer; the others have twice as many")
    batch_norm: float = option(10.0, "weight of the distance to the model's BatchNorm statistics")
    one_hot: float = option(0.5, "weight of the cross entropy with the drawn classes")
    adversarial: float = option(1.0, "weight of the disagreement with the student; 0: no student")
    momentum: float = option(0.9, "share of earlier batches in a batch's statistics")
    student_steps: int = option(400, "steps of the student after each batch behind the warm-up")
    student_lr: float = option(0.2, "learning rate of the student, cosine over the batches behind the warm-up")
    student_temperature: float = option(20.0, "temperature of the student's distillation")

    def __post_init__(self) -> None:
        for name in ("rounds", "batch", "steps", "latent", "width", "student_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch < 2:
            raise ValueError(f"batch must be at least 2, as the generator has BatchNorm, not {self.batch}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, not {self.warmup}")
        for name in ("batch_norm", "one_hot", "adversarial"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("lr", "lr_latent", "student_lr", "student_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")


@dataclass(frozen=True)
class Teacher:
    """A trained model with all that is needed to make images for it.

    Attributes:
        model, arrays: the skeleton and its parameters and buffers.
        mean, std: (C, 1, 1), by which pixels in [0, 1] are normalised.
        shape: (C, H, W) of an image.
        classes: (K,) bool over the logits, those that images are made of; at least one.
    """

    model: FedModel
    arrays: Arrays
    mean: Tensor
    std: Tensor
    shape: tuple[int, int, int]
    classes: Tensor

    def forward(self, pixels: Tensor, arrays: Arrays | None = None, taps: Iterable[str] = ()) -> Output:
        """Eval mode, of pixels (B, C, H, W) in [0, 1]; of other arrays of the same model where they are given."""
        own = self.arrays if arrays is None else arrays
        return run(self.model, own, self.normalised(pixels), train=False, taps=tuple(taps))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as the model wants them."""
        return (pixels - self.mean) / self.std


class Synthesis(NamedTuple):
    """Images (N, C, H, W) uint8 and the classes (N,) int64 that they were made for."""

    images: Tensor
    targets: Tensor


def fresh(model: FedModel, like: Arrays, width: int, seed: int) -> Arrays:
    """Arrays of the model as if it were newly made, with ``width`` classes, of the types and places of ``like``.

    Drawn on the CPU; parameters that a module cannot draw anew stay those of the skeleton.
    """
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    arrays = grow_head(initial_arrays(made), made, range(width), seed)
    return {n: a.to(like[n]) for n, a in arrays.items()}


def invert(teacher: Teacher, recipe: Recipe, seed: int) -> Synthesis:
    """Images of a teacher's classes, ``recipe.batch`` in each of ``recipe.rounds`` rounds.

    The same arguments give the same images, bit for bit on one machine: all draws are made on the CPU.

    Raises:
        RunFailed: the generator's loss is not finite.
    """
    like = teacher.mean
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(counter.fold(seed, "generator"))
        generator = Generator(teacher.shape, recipe.latent, recipe.width).to(like)
    draw = torch.Generator().manual_seed(counter.fold(seed, "latent"))
    ahead = torch.optim.Adam(generator.parameters(), lr=recipe.lr * recipe.steps, betas=(0.5, 0.999))
    student = Student(teacher, recipe, counter.fold(seed, "student")) if recipe.adversarial else None
    pool: list[Synthesis] = []
    statistics: dict[str, Moments] = {}
    positions = torch.nonzero(teacher.classes.cpu()).flatten()
    for turn in range(recipe.rounds):
        z = torch.randn(recipe.batch, recipe.latent, generator=draw).to(like)
        targets = positions[torch.randint(len(positions), (recipe.batch,), generator=draw)].to(like.device)
        rival = student if turn >= recipe.warmup else None
        images, statistics = one_batch(teacher, recipe, generator, ahead, z, targets, rival, statistics)
        pool.append(Synthesis(images, targets))
        if rival is not None:
            rival.learn(torch.cat([made.images for made in pool]), turn)
    return Synthesis(torch.cat([made.images for made in pool]), torch.cat([made.targets for made in pool]))


def one_batch(
    teacher: Teacher,
    recipe: Recipe,
    generator: Generator,
    ahead: torch.optim.Optimizer,
    z: Tensor,
    targets: Tensor,
    student: Student | None,
    before: Mapping[str, Moments],
) -> tuple[Tensor, dict[str, Moments]]:
    """Adapts a copy of the generator to one batch and moves the generator by a meta step.

    Returns:
        The step's images of lowest loss, (B, C, H, W) uint8, and the smoothed statistics by layer.
    """
    adapted = copy.deepcopy(generator)
    z = z.requires_grad_()
    groups: list[dict[str, Any]] = [{"params": list(adapted.parameters())}, {"params": [z], "lr": recipe.lr_latent}]
    own = torch.optim.Adam(groups, lr=recipe.lr, betas=(0.5, 0.999))
    ahead.zero_grad()
    best, lowest, found = z, math.inf, dict(before)
    for _ in range(recipe.steps):
        pixels = adapted(z)
        loss, found = image_loss(teacher, recipe, pixels, targets, student, before)
        value = loss.item()
        if not math.isfinite(value):
            raise RunFailed("the loss of the image generator is not finite: lower its learning rates")
        if value < lowest:
            best, lowest = pixels.detach(), value
        own.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.meta == "fomaml":
            for parameter, moved in zip(generator.parameters(), adapted.parameters(), strict=True):
                assert moved.grad is not None
                parameter.grad = moved.grad.clone() if parameter.grad is None else parameter.grad + moved.grad
        own.step()
    if recipe.meta == "reptile":
        for parameter, moved in zip(generator.parameters(), adapted.parameters(), strict=True):
            parameter.grad = REPTILE * (parameter.detach() - moved.detach())
    ahead.step()
    return best.mul(255).round().to(torch.uint8), {n: (m.detach(), v.detach()) for n, (m, v) in found.items()}


def image_loss(
    teacher: Teacher,
    recipe: Recipe,
    pixels: Tensor,
    targets: Tensor,
    student: Student | None,
    before: Mapping[str, Moments],
) -> tuple[Tensor, dict[str, Moments]]:
    """The generator's loss for a batch of pixels in [0, 1], and the statistics of the batch, smoothed."""
    # Modules that strategies add are not part of the way from image to logits.
    layers = [n for n in norm_layers(teacher.model) if not n.startswith("extra.")] if recipe.batch_norm else []
    output = teacher.forward(pixels, taps=layers)
    loss = recipe.one_hot * cross_entropy(output.logits, targets, teacher.classes)
    found = {n: smoothed(moments(tap.input), before.get(n), recipe.momentum) for n, tap in output.taps.items()}
    if found:
        loss = loss + recipe.batch_norm * statistics_distance(found, teacher.arrays)
    if student is not None:
        answer = teacher.forward(pixels, student.arrays()).logits
        loss = loss + recipe.adversarial * disagreement(answer, output.logits, teacher.classes)
    return loss, found


class Student:
    """A newly drawn network that learns the teacher's answers on the images made so far."""

    def __init__(self, teacher: Teacher, recipe: Recipe, seed: int) -> None:
        self.teacher, self.recipe = teacher, recipe
        self.draw = torch.Generator().manual_seed(seed)
        self.seed = torch.tensor(seed, device=teacher.mean.device)
        arrays = fresh(teacher.model, teacher.arrays, len(teacher.classes), seed)
        names = set(parameter_names(teacher.model))
        self.params = {n: a.requires_grad_() for n, a in arrays.items() if n in names}
        self.buffers = {n: a for n, a in arrays.items() if n not in names}
        self.optimiser = torch.optim.SGD(
            list(self.params.values()), lr=recipe.student_lr, momentum=0.9, weight_decay=1e-4
        )

    def arrays(self) -> Arrays:
        """Its arrays, without gradients."""
        return {n: a.detach() for n, a in self.params.items()} | self.buffers

    def learn(self, images: Tensor, turn: int) -> None:
        """``recipe.student_steps`` steps on random batches of images (N, C, H, W) uint8, after round ``turn``."""
        recipe, teacher = self.recipe, self.teacher
        share = (turn - recipe.warmup) / (recipe.rounds - recipe.warmup)
        self.optimiser.param_groups[0]["lr"] = 0.5 * recipe.student_lr * (1 + math.cos(math.pi * share))
        for _ in range(recipe.student_steps):
            rows = torch.randperm(len(images), generator=self.draw)[: recipe.batch].to(images.device)
            pixels = images[rows].to(teacher.mean.dtype) / 255
            with torch.no_grad():
                answer = teacher.forward(pixels).logits
            self.seed = self.seed + 1
            x, arrays = teacher.normalised(pixels), {**self.params, **self.buffers}
            own = run(teacher.model, arrays, x, train=True, seed=self.seed).logits
            self.optimiser.zero_grad()
            loss = tempered_kl(own, answer, teacher.classes, recipe.student_temperature)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
