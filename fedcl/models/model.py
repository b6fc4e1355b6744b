"""The model: an encoder, a projector that may be absent, and a head; used as a function of its arrays.

The module is a skeleton. What is trained, averaged and stored is a dictionary ``arrays`` of parameters and
buffers by name (``encoder.*``, ``projector.*``, ``head.*``), see :mod:`fedcl.models.arrays`; :func:`run`
calls the skeleton with it, one client at a time or under ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedcl import random
from fedcl.config import Model
from fedcl.errors import UsageError
from fedcl.models import catalog
from fedcl.models.external import build_external, load_checkpoint
from fedcl.models.heads import Head, build_head
from fedcl.models.layers import Dropout, replace_dropout, step_seed
from fedcl.models.norms import Kind, replace_norms
from fedcl.models.zoo import Shape, build_encoder


class Tap(NamedTuple):
    """What went into a named submodule (its first argument) and what came out, in its last call."""

    input: Tensor
    output: Tensor


class Output(NamedTuple):
    """What a forward pass gives, for a batch of B images.

    Shapes: features (B, d), embeddings (B, p) or None without a projector, logits (B, C).
    """

    features: Tensor
    embeddings: Tensor | None
    logits: Tensor
    taps: dict[str, Tap]


class FedModel(nn.Module):
    """Encoder, projector and head in one skeleton.

    Args:
        encoder: (B, C, H, W) -> (B, feature_dim).
        projector: (B, feature_dim) -> (B, p), or None.
        head: (B, feature_dim) -> (B, classes).
        dropout: probability of dropping a feature on its way to the head, in training.

    Attributes:
        image_shape: (channels, height, width) of the images that it was built for.
        extra: modules that strategies added, by strategy and name; :meth:`forward` does not use them.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module | None, head: Head, feature_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.head = head
        self.dropout = Dropout(dropout, random.fold("dropout", "features"))
        self.extra = nn.ModuleDict()
        self.image_shape: Shape = (0, 0, 0)
        self._feature_dim = feature_dim

    @property
    def feature_dim(self) -> int:
        """Length d of a feature vector."""
        return self._feature_dim

    @cached_property
    def array_names(self) -> frozenset[str]:
        """Names of all parameters and buffers; the skeleton's structure is fixed once it is built."""
        return frozenset(self.state_dict(keep_vars=True))

    def forward(self, x: Tensor, taps: Sequence[str] = (), seed: Tensor | None = None) -> Output:
        """Features, embeddings and logits of images (B, C, H, W).

        Args:
            taps: names of submodules whose input and output are wanted, for example ``encoder.layer1``.
            seed: int64 scalar, needed in training by networks with dropout. Two passes of one step that shall
                draw different masks need different seeds.

        Raises:
            AttributeError: a tap that is no submodule.
        """
        caught: dict[str, Tap] = {}
        with step_seed(seed), _tapped(self, taps, caught):
            features = self.encoder(x)
            embeddings = None if self.projector is None else self.projector(features)
            logits = self.head(self.dropout(features))
        return Output(features, embeddings, logits, caught)


@contextmanager
def _tapped(model: nn.Module, names: Sequence[str], caught: dict[str, Tap]) -> Iterator[None]:
    def catch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            caught[name] = Tap(inputs[0], output)

        return hook

    modules = [model.get_submodule(name) for name in names]
    handles = [module.register_forward_hook(catch(name)) for name, module in zip(names, modules, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _mode(model: nn.Module, train: bool, batch_norm: str) -> Iterator[None]:
    before = model.training
    frozen = []
    if before != train:
        model.train(train)
    if train and batch_norm == "eval":
        frozen = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for module in frozen:
            module.training = False
    try:
        yield
    finally:
        if before != train:
            model.train(before)
        elif frozen:
            for module in frozen:
                module.training = before


def run(
    model: FedModel,
    arrays: Mapping[str, Tensor],
    x: Tensor,
    *,
    train: bool,
    seed: Tensor | None = None,
    taps: Sequence[str] = (),
    batch_norm: Literal["same", "eval"] = "same",
) -> Output:
    """Calls ``model`` with ``arrays`` in place of its own parameters and buffers.

    In training, BatchNorm writes the new running statistics into the buffers **in** ``arrays``, in place:
    give every client its own (:func:`fedcl.models.arrays.own_buffers`). In eval mode nothing is written. The
    skeleton is left in the mode it was in.

    Args:
        arrays: a tensor for each name of :func:`fedcl.models.arrays.initial_arrays`; the head of any width.
        x: (B, C, H, W) images, of the arrays' type and device.
        batch_norm: ``eval`` keeps BatchNorm on its running statistics in training as well.

    Raises:
        KeyError: arrays that are missing or that the model does not have.
    """
    expected = model.array_names
    if expected != arrays.keys():
        missing, unknown = sorted(expected - arrays.keys()), sorted(arrays.keys() - expected)
        raise KeyError(f"arrays do not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
    with _mode(model, train, batch_norm):
        out = functional_call(model, dict(arrays), (x,), {"taps": tuple(taps), "seed": seed})
    return cast(Output, out)


def run_module(
    model: FedModel,
    name: str,
    arrays: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
    *,
    train: bool,
    seed: Tensor | None = None,
    batch_norm: Literal["same", "eval"] = "same",
) -> Any:
    """Calls one submodule of ``model``; see :func:`run`.

    Args:
        name: dotted, for example ``extra.simsiam.predictor``.
        arrays: of the whole model, by their whole names; others than the submodule's are not read.

    Raises:
        AttributeError: no such submodule.
    """
    module = model.get_submodule(name)
    prefix = f"{name}."
    own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    with _mode(model, train, batch_norm), step_seed(seed):
        return functional_call(module, own, inputs)


def add_modules(model: FedModel, strategy: str, seed: int, made: Callable[[], Mapping[str, nn.Module]]) -> None:
    """Adds the modules of a strategy to the model, drawn on the CPU in float32 from a stream named by ``seed``.

    Raises:
        UsageError: one of them has parameters that are not to be drawn yet (lazy modules).
    """
    with _seeded(seed, "init", "extra", strategy):
        modules = dict(made())
    for name, module in modules.items():
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            raise UsageError("strategy", strategy, f"modules that know their shapes; {name!r} is lazy")
        replace_dropout(module, f"{strategy}.{name}")
    if modules:
        model.extra[strategy] = nn.ModuleDict(modules)


@contextmanager
def _seeded(*name: object) -> Iterator[None]:
    # Only the CPU generator is set: torch.manual_seed would also reset the accelerators' generators.
    generator, dtype = torch.default_generator, torch.get_default_dtype()
    state = generator.get_state()
    generator.manual_seed(random.key(*name) & (2**63 - 1))
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        generator.set_state(state)
        torch.set_default_dtype(dtype)


def _projector(config: Model, feature_dim: int, wanted: bool) -> nn.Module | None:
    kind = config.projector
    if kind not in catalog.PROJECTORS:
        allowed = f"one of {', '.join(catalog.PROJECTORS)}"
        raise UsageError("model.projector", kind, allowed, catalog.PROJECTORS)
    if kind == "none" or (kind == "auto" and not wanted):
        return None
    if config.projector_dim < 1:
        raise UsageError("model.projector_dim", config.projector_dim, "a whole number above 0")
    last = nn.Linear(feature_dim, config.projector_dim)
    if kind == "linear":
        return last
    return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), last)


def build_model(config: Model, in_shape: Shape, *, projector: bool, seed: int) -> FedModel:
    """The skeleton that ``config`` describes, with initial parameters but no classes yet.

    Drawn on the CPU in float32 from streams named by ``seed``; the global generators are left as they were,
    and encoder, projector and head do not depend on one another.

    Args:
        in_shape: (channels, height, width) of the images.
        projector: whether a strategy asks for one; decides when ``config.projector`` is ``auto``.

    Raises:
        UsageError: anything in the section ``model`` that cannot be built, or a checkpoint that does not fit.
    """
    if config.norm not in catalog.NORMS:
        raise UsageError("model.norm", config.norm, f"one of {', '.join(catalog.NORMS)}", catalog.NORMS)
    if not 0.0 <= config.dropout < 1.0:
        raise UsageError("model.dropout", config.dropout, "a probability of at least 0 and below 1")
    external = config.name.startswith(("torchvision:", "timm:"))
    with _seeded(seed, "init", "encoder"):
        if external:
            encoder, feature_dim, drop = build_external(config, in_shape)
        else:
            encoder, feature_dim = build_encoder(config, in_shape)
            drop = ()
        if config.checkpoint is not None:
            load_checkpoint(encoder, config.checkpoint, drop)
        if external and config.norm != "default":
            replace_norms(encoder, cast(Kind, config.norm), config.name)
        replace_dropout(encoder, config.name)
    with _seeded(seed, "init", "projector"):
        projection = _projector(config, feature_dim, projector)
    model = FedModel(encoder, projection, build_head(config, feature_dim), feature_dim, config.dropout)
    model.image_shape = in_shape
    return model
