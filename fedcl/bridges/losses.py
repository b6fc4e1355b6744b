"""Losses of other libraries by dotted name: built from settings, tried out before a run, called by what they take.

Known to work are those of ``pytorch_metric_learning.losses`` and ``lightly.loss``, and any ``torch.nn.Module`` whose
``forward`` takes embeddings in one of the three ways of :data:`Takes`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..dotted import find_object
from ..errors import UsageError
from ..settings.values import one_line
from .avalanche_import import sealed

Takes = Literal["labels", "reference", "views"]
"""``forward(embeddings, labels)``, ``forward(embeddings, ref_emb=other)``, or ``forward(one, other)``."""

INSTALL = {
    "pytorch_metric_learning": "pip install 'fedcl-sim[losses]'",
    "lightly": "pip install --no-deps lightly (its losses need nothing else)",
}

ALLOWED = "must be the dotted name of a class, for example pytorch_metric_learning.losses.TripletMarginLoss"


def find_class(name: str, key: str) -> type[Any]:
    """The class that a dotted name means, ``package.module.Class``.

    Raises:
        UsageError: no such package (how to install it is said where it is known), module or class.
    """
    place, _, cls = name.replace(":", ".").rpartition(".")
    package = place.partition(".")[0]
    if package in INSTALL and importlib.util.find_spec(package) is None:
        raise UsageError(key, name, f"{package} is not installed: {INSTALL[package]}")
    with sealed():
        found = find_object(f"{place}:{cls}", key, ALLOWED)
    if not isinstance(found, type):
        raise UsageError(key, name, f"is no class; it {ALLOWED}")
    return found


def build(name: str, arguments: Mapping[str, Any], key: str) -> Any:
    """An object of a class by dotted name, from keyword arguments.

    An argument that is a mapping with ``class`` is itself such an object, its other items the arguments:
    ``{"distance": {"class": "pytorch_metric_learning.distances.LpDistance", "p": 1}}``. What is drawn comes from
    torch's global generator: seed it.

    Args:
        key: the setting to blame, for example ``options.metric_loss``.

    Raises:
        UsageError: no such class, or it refuses the arguments.
    """
    made = {}
    for argument, value in arguments.items():
        inner = f"{key}.{argument}"
        if isinstance(value, Mapping) and "class" in value:
            rest = {n: v for n, v in value.items() if n != "class"}
            value = build(str(value["class"]), rest, inner)
        made[argument] = value
    cls = find_class(name, key)
    try:
        return cls(**made)
    except Exception as error:
        takes = ", ".join(n for n in inspect.signature(cls).parameters if n != "kwargs")
        said = f"{cls.__name__} cannot be made of these arguments ({one_line(error, 160)}); it takes {takes}"
        raise UsageError(key, dict(arguments), said) from error


def takes(loss: object, key: str) -> Takes:
    """How a loss is called, by the names and types of what its ``forward`` takes.

    Raises:
        UsageError: it is no module, or takes something else.
    """
    name = type(loss).__name__
    if not isinstance(loss, nn.Module):
        raise UsageError(key, name, "is no torch.nn.Module, as a loss must be")
    parameters = list(inspect.signature(loss.forward).parameters.values())
    names = [p.name for p in parameters]
    free = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][:2]
    needed = {p.name for p in parameters if p.default is p.empty}
    if "ref_emb" in names and compares_references(loss):
        return "reference"
    tensors = all(p.annotation in (p.empty, Tensor, "Tensor", "torch.Tensor") for p in free)
    if len(free) == 2 and tensors and needed <= {p.name for p in free}:
        return "labels" if free[1].name == "labels" else "views"
    said = f"needs other inputs ({', '.join(names)}) than embeddings with labels, or those of two views"
    raise UsageError(key, name, said)


def compares_references(loss: nn.Module) -> bool:
    """Whether a loss with arguments ``labels`` and ``ref_emb`` takes the second alone; only a call shows that."""
    one, other = some_embeddings(8, 4).reshape(2, 4, 4)
    with sealed(0):
        try:
            loss(one, ref_emb=other)
        except Exception:
            return False
        try:
            loss(one, torch.arange(4))
        except Exception:
            return True
    return False


class OfLabels(nn.Module):
    """``loss(embeddings, labels)``, where a miner has chosen the pairs or triplets if there is one."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """A scalar, of embeddings (B, d) and labels (B,)."""
        chosen = () if self.miner is None else (self.miner(embeddings.detach(), labels),)
        found: Tensor = self.loss(embeddings, labels, *chosen)
        return found


class OfViews(nn.Module):
    """A loss of the embeddings of two views, however it is called; for one of labels they are the images' numbers."""

    def __init__(self, loss: nn.Module, how: Takes) -> None:
        super().__init__()
        self.loss, self.how = loss, how

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """A scalar, of embeddings (N, d) of both."""
        found: Tensor
        if self.how == "labels":
            found = self.loss(torch.cat([one, other]), torch.arange(len(one), device=one.device).repeat(2))
        elif self.how == "reference":
            found = self.loss(one, ref_emb=other)
        else:
            found = self.loss(one, other)
        return found


def try_out(loss: nn.Module, inputs: tuple[Tensor, ...], name: str, key: str) -> None:
    """Calls a loss twice on the same inputs.

    Args:
        name: of the loss, as the user gave it under ``key``.

    Raises:
        UsageError: it fails, does not give a finite scalar, draws from a global generator, or remembers a call.
    """
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    kept = {n: b.clone() for n, b in loss.named_buffers()}
    with sealed(0):
        before = torch.get_rng_state()
        try:
            values = [loss(*inputs) for _ in range(2)]
        except Exception as error:
            said = f"cannot be called with {' and '.join(str(tuple(i.shape)) for i in inputs)}: {one_line(error, 160)}"
            raise UsageError(key, name, f"{said} ({type(error).__name__})") from error
        drawn = not torch.equal(before, torch.get_rng_state())
    if any(not torch.equal(b, kept[n]) for n, b in loss.named_buffers()):
        raise UsageError(key, name, "keeps a memory of its own between steps, which no checkpoint would have")
    if not all(isinstance(value, Tensor) and value.ndim == 0 for value in values):
        raise UsageError(key, name, "must give one number, and gives something else")
    if not all(bool(torch.isfinite(value)) for value in values):
        raise UsageError(key, name, f"gives {float(values[0])} on normally distributed embeddings")
    if drawn:
        raise UsageError(key, name, "draws from torch's global generator: a run with it could not be repeated")
    if not torch.equal(values[0], values[1]):
        raise UsageError(key, name, "gives another value when it is called again: it remembers what no checkpoint has")


def some_embeddings(rows: int, width: int) -> Tensor:
    """(rows, width) normally distributed numbers, always the same, to try a loss out on."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
