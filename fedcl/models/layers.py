"""Layers that draw random numbers in training, counter-based.

The seed of a step reaches them through a context variable for the length of one forward call. It may be a
plain int64 scalar or, under ``torch.func.vmap``, one a client: the masks are the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fedcl import random
from fedcl.errors import UsageError

_SEED: ContextVar[Tensor | None] = ContextVar("fedcl_step_seed", default=None)


@contextmanager
def step_seed(seed: Tensor | None) -> Iterator[None]:
    """Gives every random layer called inside the block the int64 scalar ``seed``."""
    token = _SEED.set(seed)
    try:
        yield
    finally:
        _SEED.reset(token)


class Dropout(nn.Module):
    """Dropout whose mask is a hash of (step seed, layer, position); the identity in eval mode.

    Args:
        p: probability of a zero, in [0, 1).
        tag: the layer's own number, see :func:`fedcl.random.fold`.
        drawn: leading axes with draws of their own, None for all (1: whole samples, 2: whole channels).
        scale: whether what is kept is divided by 1 - p.

    Raises:
        RuntimeError: in training with p > 0 and no seed.
    """

    def __init__(self, p: float, tag: int, drawn: int | None = None, scale: bool = True) -> None:
        super().__init__()
        self.p, self.tag, self.drawn, self.scale = p, tag, drawn, scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) in and out."""
        if not self.training or self.p == 0.0:
            return x
        seed = _SEED.get()
        if seed is None:
            raise RuntimeError("a network with dropout needs the step's seed in training: pass seed=")
        drawn = x.dim() if self.drawn is None else self.drawn
        shape = tuple(x.shape[:drawn]) + (1,) * (x.dim() - drawn)
        keep = random.counter_keep(seed, self.tag, shape, self.p).to(x.dtype)
        return x * (keep.mul_(1.0 / (1.0 - self.p)) if self.scale else keep)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"p={self.p}, drawn={self.drawn}"


_DRAWN_AXES: dict[type[nn.Module], int | None] = {
    nn.Dropout: None,
    nn.Dropout1d: 2,
    nn.Dropout2d: 2,
    nn.Dropout3d: 2,
}


def _counterpart(module: Any, name: str, model_name: str) -> nn.Module | None:
    tag = random.fold("dropout", name)
    kind = type(module)
    if kind in _DRAWN_AXES:
        return Dropout(float(module.p), tag, _DRAWN_AXES[kind])
    # Matched by name so that neither library has to be imported for the other's models.
    if kind.__name__ == "StochasticDepth":
        if module.mode != "row":
            raise UsageError("model.name", model_name, "stochastic depth over whole batches is not supported")
        return Dropout(float(module.p), tag, drawn=1)
    if kind.__name__ == "DropPath":
        return Dropout(float(module.drop_prob or 0.0), tag, drawn=1, scale=bool(module.scale_by_keep))
    if isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout):
        raise UsageError("model.name", model_name, f"{kind.__name__} has no counter-based form here")
    return None


def replace_dropout(root: nn.Module, model_name: str) -> None:
    """Puts counter-based layers in place of dropout and stochastic depth in ``root``, in place.

    Raises:
        UsageError: for a random layer without a counter-based form.
    """
    for name, module in list(root.named_modules()):
        if name and (new := _counterpart(module, name, model_name)) is not None:
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, new)
