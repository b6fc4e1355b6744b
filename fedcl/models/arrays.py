"""The arrays of a model, and the growth of the head and of everything shaped like parameters.

Averaging is the engine's: buffers such as ``num_batches_tracked`` are int64, so a mean of them is rounded
down, and arrays of :func:`frozen_names` are equal everywhere and are not averaged at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedcl.errors import UsageError
from fedcl.models.heads import ClassArrays

Arrays = dict[str, Tensor]


def parameter_names(model: nn.Module) -> list[str]:
    """Names of the arrays that gradients train, in the model's order."""
    return [name for name, _ in model.named_parameters()]


def buffer_names(model: nn.Module) -> list[str]:
    """Names of the arrays that are not parameters; constants that are never saved are not among them."""
    parameters = set(parameter_names(model))
    return [name for name in model.state_dict(keep_vars=True) if name not in parameters]


def initial_arrays(model: nn.Module, dtype: torch.dtype = torch.float32) -> Arrays:
    """Copies of the skeleton's parameters and buffers; floating point arrays are cast to ``dtype``.

    Arrays of the head have no classes until :func:`grow_head`.
    """
    return {
        name: tensor.detach().clone().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def own_buffers(model: nn.Module, arrays: Mapping[str, Tensor]) -> Arrays:
    """The same arrays with buffers copied: parameters stay shared, BatchNorm may write into the copies."""
    buffers = set(buffer_names(model))
    return {name: tensor.clone() if name in buffers else tensor for name, tensor in arrays.items()}


def _owners(model: nn.Module) -> dict[str, tuple[ClassArrays, str]]:
    known = model.state_dict(keep_vars=True)
    owners: dict[str, tuple[ClassArrays, str]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ClassArrays):
            for array in module.class_axis:
                name = f"{prefix}.{array}" if prefix else array
                if name in known:
                    owners[name] = (module, array)
    return owners


def class_axes(model: nn.Module) -> dict[str, int]:
    """Names of the arrays that have an axis of classes, and which axis (``{"head.weight": 0, ...}``)."""
    return {name: module.class_axis[array] for name, (module, array) in _owners(model).items()}


def last_class_axes(model: nn.Module) -> dict[str, int]:
    """As :func:`class_axes`, counted from the last axis (-1): right for arrays with axes before the parameter's own."""
    known = model.state_dict(keep_vars=True)
    return {name: axis - known[name].dim() for name, axis in class_axes(model).items()}


def frozen_names(model: nn.Module) -> set[str]:
    """Arrays that never change once allocated, such as a simplex head."""
    return {name for name, (module, _) in _owners(model).items() if module.fixed}


def grow_head(arrays: Mapping[str, Tensor], model: nn.Module, class_ids: Sequence[int], seed: int) -> Arrays:
    """The arrays with room for more classes, appended in the order of ``class_ids``.

    Args:
        class_ids: original ids of the new classes; they alone, and ``seed``, decide the initial values.

    Raises:
        UsageError: a fixed head that already has classes, or too few features for it.
    """
    grown = dict(arrays)
    for name, (module, _) in _owners(model).items():
        axis = module.class_axis[name.rpartition(".")[2]]
        if module.fixed and arrays[name].shape[axis] and len(class_ids):
            raise UsageError("model.head_allocate", "grow", "'all': a fixed head cannot grow")
        grown[name] = grow_like(arrays[name], name, model, class_ids, fill="initial", seed=seed)
    return grown


def grow_like(
    array: Tensor,
    name: str,
    model: nn.Module,
    class_ids: Sequence[int],
    *,
    fill: float | Literal["initial"] = 0.0,
    seed: int = 0,
) -> Tensor:
    """An array shaped like the parameter ``name``, with entries for more classes.

    Optimiser moments, control variates, Fisher information, masks and previous models are such arrays. One
    whose parameter has no axis of classes comes back as it is.

    Args:
        array: shaped like the parameter, with any axes before its own (a stack of clients).
        name: the parameter's name, possibly after a prefix that ends in ``/`` (``momentum/head.weight``).
        class_ids: original ids of the new classes, in the order in which they are appended.
        fill: the value of new entries; ``initial`` draws what :func:`grow_head` gives new classes.
        seed: the run's seed, for ``initial``.
    """
    parameter = name.rpartition("/")[2]
    owner = _owners(model).get(parameter)
    if owner is None or not class_ids:
        return array
    module, short = owner
    stacked = array.dim() - model.state_dict(keep_vars=True)[parameter].dim()
    axis = stacked + module.class_axis[short]
    if fill == "initial":
        rows = module.initial_rows(short, class_ids, seed).to(array)
        rows = rows.expand(*array.shape[:stacked], *rows.shape)
    else:
        shape = list(array.shape)
        shape[axis] = len(class_ids)
        rows = array.new_full(shape, fill)
    return torch.cat([array, rows], dim=axis)
