"""Optimisers as pure functions of named arrays, and norm clipping; schedules are in :mod:`fedcl.local.rates`.

Everything is elementwise, so the same function trains one client, a stack of clients (K, ...) with a rate
and a step count for each, and a client inside ``torch.func.vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedcl.config import Optimiser
from fedcl.local.rates import check, schedule

__all__ = ["SGD", "Adam", "Group", "PureOptimiser", "clip_by_norm", "global_norm", "make_optimiser", "schedule"]

Arrays = dict[str, Tensor]
Scalar = float | list[Tensor]


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    Args:
        names: which parameters, by name.
        lr_scale: factor on the learning rate.
        weight_decay: None: the optimiser's.
    """

    names: Callable[[str], bool]
    lr_scale: float = 1.0
    weight_decay: float | None = None


class PureOptimiser(Protocol):
    """State in, state out; arguments are not written to unless they are given away."""

    groups: tuple[Group, ...]

    def init(self, params: Mapping[str, Tensor]) -> Arrays:
        """The state before the first step: ``step`` (int64 scalar) and arrays named ``moment/parameter``."""
        ...

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        lr: float | Tensor,
        owned: bool = False,
    ) -> tuple[Arrays, Arrays]:
        """One step. Parameters without a gradient, and their state, come back as they are.

        Args:
            lr: a number, a scalar tensor, or (K,) for parameters and state stacked over K clients.
            owned: the caller gives ``params`` and ``state`` away, so that their memory may be used again.

        Raises:
            KeyError: a gradient of an unknown parameter.
        """
        ...


class _Ops:
    """Arithmetic on lists of tensors: fused, or a loop inside ``vmap``, where fused calls have no rule.

    Args:
        owned: parameters and state may be written to, see :meth:`PureOptimiser.update`.
    """

    def __init__(self, owned: bool, *lists: list[Tensor]) -> None:
        self.owned = owned
        # torch has no public test for "inside a transform".
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        self.fused = not any(wrapped(tensor) for tensors in lists for tensor in tensors)

    def mul(self, xs: list[Tensor], factor: Scalar) -> list[Tensor]:
        if self.fused:
            return list(torch._foreach_mul(xs, factor))
        if isinstance(factor, list):
            return [x * f for x, f in zip(xs, factor, strict=True)]
        return [x * factor for x in xs]

    def add(self, xs: list[Tensor], ys: list[Tensor], factor: Scalar = 1.0) -> list[Tensor]:
        """xs + factor ys."""
        if isinstance(factor, list):
            ys, factor = self.mul(ys, factor), 1.0
        if self.fused:
            return list(torch._foreach_add(xs, ys, alpha=factor))
        return [torch.add(x, y, alpha=factor) for x, y in zip(xs, ys, strict=True)]

    def scaled(self, xs: list[Tensor], factor: float, ys: list[Tensor], other: Scalar = 1.0) -> list[Tensor]:
        """factor xs + other ys, in the memory of ``xs`` where that is owned: for parameters and moments."""
        if not self.owned or not self.fused:
            return self.add(xs if factor == 1.0 else self.mul(xs, factor), ys, other)
        if factor != 1.0:
            torch._foreach_mul_(xs, factor)
        if isinstance(other, list):
            ys, other = self.mul(ys, other), 1.0
        torch._foreach_add_(xs, ys, alpha=other)
        return xs

    def ratio(self, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        if self.fused:
            return list(torch._foreach_div(xs, ys))
        return [x / y for x, y in zip(xs, ys, strict=True)]

    def plus(self, xs: list[Tensor], number: float) -> list[Tensor]:
        return list(torch._foreach_add(xs, number)) if self.fused else [x + number for x in xs]

    def square(self, xs: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_mul(xs, xs)) if self.fused else [x * x for x in xs]

    def root(self, xs: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_sqrt(xs)) if self.fused else [x.sqrt() for x in xs]


def _like(value: Tensor, arrays: list[Tensor]) -> list[Tensor]:
    """A scalar or (K,) tensor, shaped and typed so that it multiplies each array (K, ...)."""
    value = value.to(arrays[0].device)
    return [value.reshape(value.shape + (1,) * (a.dim() - value.dim())).to(a) for a in arrays]


def _rate(lr: float | Tensor, scale: float, arrays: list[Tensor]) -> Scalar:
    return _like(lr * scale, arrays) if isinstance(lr, Tensor) else lr * scale


def _negative(rate: Scalar) -> Scalar:
    return [-value for value in rate] if isinstance(rate, list) else -rate


class _Base:
    """What all optimisers share: groups, and names in and out."""

    moments: tuple[str, ...] = ()

    def __init__(self, weight_decay: float, groups: Sequence[Group]) -> None:
        self.weight_decay = weight_decay
        self.groups = tuple(groups)

    def init(self, params: Mapping[str, Tensor]) -> Arrays:
        """See :class:`PureOptimiser`."""
        # On the CPU, as in torch.optim: reading it there does not wait for the device.
        state = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
        for moment in self.moments:
            state |= {f"{moment}/{name}": torch.zeros_like(tensor) for name, tensor in params.items()}
        return state

    def _grouped(self, names: Sequence[str]) -> list[tuple[list[str], float, float]]:
        """Names by group (first match), with the rate's factor and the weight decay."""
        rest = list(names)
        out = []
        for group in self.groups:
            mine = [name for name in rest if group.names(name)]
            rest = [name for name in rest if not group.names(name)]
            decay = self.weight_decay if group.weight_decay is None else group.weight_decay
            out.append((mine, group.lr_scale, decay))
        out.append((rest, 1.0, self.weight_decay))
        return [part for part in out if part[0]]

    def _move(
        self,
        ops: _Ops,
        p: list[Tensor],
        g: list[Tensor],
        moments: list[list[Tensor]],
        step: Tensor,
        lr: Scalar,
        decay: float,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        raise NotImplementedError

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        lr: float | Tensor,
        owned: bool = False,
    ) -> tuple[Arrays, Arrays]:
        """See :class:`PureOptimiser`."""
        new_params, new_state = dict(params), dict(state)
        step = new_state["step"] = state["step"] + 1
        for names, scale, decay in self._grouped(list(grads)):
            p, g = [params[n] for n in names], [grads[n] for n in names]
            moments = [[state[f"{m}/{n}"] for n in names] for m in self.moments]
            ops = _Ops(owned, p, g, *moments, [lr] if isinstance(lr, Tensor) else [], [step])
            p, moments = self._move(ops, p, g, moments, step, _rate(lr, scale, p), decay)
            new_params.update(zip(names, p, strict=True))
            for moment, values in zip(self.moments, moments, strict=True):
                new_state.update({f"{moment}/{n}": v for n, v in zip(names, values, strict=True)})
        return new_params, new_state


class SGD(_Base):
    """SGD with momentum as in ``torch.optim.SGD``: the first buffer is the gradient."""

    def __init__(
        self,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        groups: Sequence[Group] = (),
    ) -> None:
        super().__init__(weight_decay, groups)
        self.momentum, self.nesterov = momentum, nesterov
        self.moments = ("momentum",) if momentum else ()

    def _move(
        self,
        ops: _Ops,
        p: list[Tensor],
        g: list[Tensor],
        moments: list[list[Tensor]],
        step: Tensor,
        lr: Scalar,
        decay: float,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        if decay:
            g = ops.add(g, p, decay)
        if moments:
            buffer = ops.scaled(moments[0], self.momentum, g)
            g = ops.add(g, buffer, self.momentum) if self.nesterov else buffer
            moments = [buffer]
        return ops.scaled(p, 1.0, g, _negative(lr)), moments


class Adam(_Base):
    """Adam (Kingma and Ba 2015); ``decoupled`` is AdamW (Loshchilov and Hutter 2019)."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        groups: Sequence[Group] = (),
    ) -> None:
        super().__init__(weight_decay, groups)
        self.betas, self.eps, self.decoupled = betas, eps, decoupled

    def _move(
        self,
        ops: _Ops,
        p: list[Tensor],
        g: list[Tensor],
        moments: list[list[Tensor]],
        step: Tensor,
        lr: Scalar,
        decay: float,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        first, second = self.betas
        if decay and self.decoupled:
            p = ops.scaled(p, 1.0, ops.mul(p, decay), _negative(lr))
        elif decay:
            g = ops.add(g, p, decay)
        mean = ops.scaled(moments[0], first, g, 1.0 - first)
        square = ops.scaled(moments[1], second, ops.square(g), 1.0 - second)
        rate, unbias = self._corrections(ops, step, lr, p)
        root = ops.plus(ops.mul(ops.root(square), unbias), self.eps)
        return ops.scaled(p, 1.0, ops.ratio(mean, root), _negative(rate)), [mean, square]

    def _corrections(self, ops: _Ops, step: Tensor, lr: Scalar, p: list[Tensor]) -> tuple[Scalar, Scalar]:
        """lr / (1 - β₁ᵗ) and 1 / sqrt(1 - β₂ᵗ)."""
        first, second = self.betas
        # Numbers where they cost no wait for the device; a step count a client, or a traced one, stays a
        # tensor.
        if ops.fused and step.dim() == 0 and step.device.type == "cpu":
            count = int(step)
            bias, unbiased = 1.0 - first**count, 1.0 / math.sqrt(1.0 - second**count)
            return ([rate / bias for rate in lr] if isinstance(lr, list) else lr / bias), unbiased
        counts = step.to(torch.float64)
        unbias = _like((1.0 - second**counts).rsqrt(), p)
        scales = _like(1.0 / (1.0 - first**counts), p)
        if isinstance(lr, list):
            return [rate * scale for rate, scale in zip(lr, scales, strict=True)], unbias
        return [lr * scale for scale in scales], unbias


def make_optimiser(config: Optimiser, groups: Sequence[Group] = ()) -> PureOptimiser:
    """The optimiser that ``config`` describes.

    Args:
        groups: settings for some parameters; a parameter belongs to the first group that takes its name.

    Raises:
        UsageError: any value of the section ``optimiser`` that is not allowed.
    """
    check(config)
    if config.name == "sgd":
        return SGD(config.momentum, config.nesterov, config.weight_decay, groups)
    betas = (config.betas[0], config.betas[1])
    return Adam(betas, config.eps, config.weight_decay, config.name == "adamw", groups)


def global_norm(grads: Mapping[str, Tensor], batch_dims: int = 0) -> Tensor:
    """Euclidean norm over all arrays: a scalar, or (K,) for arrays stacked over clients, ``batch_dims=1``."""
    norms = [torch.linalg.vector_norm(g.reshape(*g.shape[:batch_dims], -1), dim=-1) for g in grads.values()]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms, dim=-1), dim=-1)
    return total


def clip_by_norm(grads: Mapping[str, Tensor], max_norm: float, batch_dims: int = 0) -> Arrays:
    """The gradients times min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``, but pure; the
    ``batch_dims`` leading axes are clients, each with a norm of its own.

    >>> clip_by_norm({"w": torch.tensor([3.0, 4.0])}, 1.0)["w"]
    tensor([0.6000, 0.8000])
    """
    factor = (max_norm / (global_norm(grads, batch_dims) + 1e-6)).clamp(max=1.0)
    arrays = list(grads.values())
    return {name: g * f for (name, g), f in zip(grads.items(), _like(factor, arrays), strict=True)}
