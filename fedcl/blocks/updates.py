"""Named arrays of a whole model as one vector: differences, sums and inner products of updates and control variates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..strategy import Arrays


def under(arrays: Mapping[str, Tensor], name: str) -> Arrays:
    """The arrays ``NAME/parameter`` by parameter.

    >>> under({"variate/w": torch.tensor(1.0), "steps": torch.tensor(3)}, "variate")
    {'w': tensor(1.)}
    """
    prefix = f"{name}/"
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def named(arrays: Mapping[str, Tensor], name: str) -> Arrays:
    """The inverse of :func:`under`."""
    return {f"{name}/{n}": a for n, a in arrays.items()}


def kept(state: Mapping[str, Tensor], name: str, like: Mapping[str, Tensor]) -> Arrays:
    """What a state holds as ``NAME/parameter``, one for each array of ``like``: zeros where it has none yet.

    >>> kept({"variate/w": torch.tensor(1.0)}, "variate", {"w": torch.tensor(5.0), "b": torch.tensor(7.0)})
    {'w': tensor(1.), 'b': tensor(0.)}
    """
    found = under(state, name)
    return {n: found[n].to(a) if n in found else torch.zeros_like(a) for n, a in like.items()}


def change(after: Mapping[str, Tensor], before: Mapping[str, Tensor], names: Iterable[str]) -> Arrays:
    """``after - before`` for some names.

    >>> change({"w": torch.tensor(3.0)}, {"w": torch.tensor(1.0)}, ["w"])
    {'w': tensor(2.)}
    """
    return {n: after[n] - before[n] for n in names}


def plus(arrays: Mapping[str, Tensor], others: Mapping[str, Tensor], factor: float | Tensor = 1.0) -> Arrays:
    """``arrays + factor others``; arrays without another one as they are.

    >>> plus({"w": torch.tensor(3.0), "b": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}, 2.0)
    {'w': tensor(5.), 'b': tensor(0.)}
    """
    return {n: a + (factor * others[n]).to(a.dtype) if n in others else a for n, a in arrays.items()}


def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """The inner product over the names of both, 0 without any.

    >>> inner({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([5.0])})
    tensor(11.)
    """
    terms = [(a * other[n]).sum() for n, a in one.items() if n in other]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def flat(arrays: Mapping[str, Tensor]) -> Tensor:
    """All arrays as one vector, in their order.

    Sums of gradients are carried in this form: a parameter without influence has nothing but rounding errors there.
    """
    return torch.cat([a.flatten() for a in arrays.values()]) if arrays else torch.zeros(0)


def shaped(vector: Tensor, like: Mapping[str, Tensor]) -> Arrays:
    """The inverse of :func:`flat`, for arrays of these names and shapes.

    >>> shaped(torch.tensor([1.0, 2.0]), {"w": torch.zeros(1, 1), "b": torch.zeros(1)})
    {'w': tensor([[1.]]), 'b': tensor([2.])}
    """
    parts = torch.split(vector, [a.numel() for a in like.values()])
    return {n: part.reshape(a.shape) for (n, a), part in zip(like.items(), parts, strict=True)}
