"""Encoders of torchvision and timm by name, and weights from a local file. Nothing is ever downloaded."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedcl.config import Model
from fedcl.errors import UsageError

_AUXILIARY = ("aux", "AuxLogits")  # side classifiers of GoogLeNet and Inception
_HEADS = ("fc", "classifier", "heads", "head")


def _expand_channel(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].expand(-1, 3, -1, -1), *inputs[1:])


def _strip_head(net: nn.Module, name: str) -> str:
    for head in _HEADS:
        root = getattr(net, head, None)
        if not isinstance(root, nn.Module):
            continue
        layers = [
            (f"{head}.{inner}".rstrip("."), module)
            for inner, module in root.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        if layers:
            path = layers[-1][0]
            parent, _, child = path.rpartition(".")
            setattr(net.get_submodule(parent), child, nn.Identity())
            return path
    raise UsageError("model.name", name, "a torchvision classification model with one linear head")


def _torchvision(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    wanted = name.removeprefix("torchvision:")
    if wanted not in names:
        known = [f"torchvision:{known}" for known in names]
        raise UsageError("model.name", name, "a classification model of torchvision", known)
    options: dict[str, Any] = {"weights": None}
    if wanted in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    net: nn.Module = torchvision.models.get_model(wanted, **options)
    return net, (_strip_head(net, name), *_AUXILIARY)


def _timm(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        import timm
    except ImportError:
        raise UsageError("model.name", name, "timm is not installed: pip install 'fedcl-sim[timm]'") from None
    wanted = name.removeprefix("timm:")
    if not timm.is_model(wanted):
        known = [f"timm:{known}" for known in timm.list_models()]
        raise UsageError("model.name", name, "a model of timm", known)
    net: nn.Module = timm.create_model(wanted, pretrained=False, num_classes=0)
    heads: Any = getattr(net, "default_cfg", {}).get("classifier", "head")
    return net, (heads,) if isinstance(heads, str) else tuple(heads)


def build_external(config: Model, shape: tuple[int, int, int]) -> tuple[nn.Module, int, tuple[str, ...]]:
    """The model ``torchvision:NAME`` or ``timm:NAME`` without its head.

    Images with one channel are repeated to the three that these models take.

    Returns:
        The encoder, its feature dimension, and the prefixes of the checkpoint keys that belong to stripped
        heads.

    Raises:
        UsageError: unknown name, no timm, a width or depth, or images the model does not take.
    """
    for field, value in (("width", config.width), ("depth", config.depth)):
        if value is not None:
            raise UsageError(f"model.{field}", value, f"{config.name} has no {field} to choose; leave it out")
    if shape[0] not in (1, 3):
        raise UsageError("model.name", config.name, f"takes images of 1 or 3 channels, these have {shape[0]}")
    net, heads = (_timm if config.name.startswith("timm:") else _torchvision)(config.name)
    if shape[0] == 1:
        net.register_forward_pre_hook(_expand_channel)
    try:
        with torch.no_grad():
            out = net.eval()(torch.zeros(2, *shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        allowed = f"does not take {shape[1]}x{shape[2]} images ({reason}); set data.size"
        raise UsageError("model.name", config.name, allowed) from None
    if not isinstance(out, Tensor) or out.dim() != 2:
        raise UsageError("model.name", config.name, "a model that gives one feature vector an image")
    net.train()
    return net, int(out.shape[1]), heads


def _read(path: Path, key: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(key, str(path), "a local .pt, .pth or .safetensors file; there is none here")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise UsageError(key, str(path), f"a readable file of weights only ({reason})") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UsageError(key, str(path), f"a readable safetensors file ({error})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UsageError(key, str(path), "a file with a dictionary of named tensors")
    return content


def load_checkpoint(encoder: nn.Module, file: str, heads: Iterable[str] = (), key: str = "model.checkpoint") -> None:
    """Copies the encoder's weights from ``file`` into ``encoder``, in place.

    The names may carry the prefix ``module.``; of a file that fedcl wrote, only ``encoder.*`` is read.

    Args:
        heads: prefixes of names that belong to stripped classification heads and are left out.
        key: the setting that named the file.

    Raises:
        UsageError: no such file, not readable without executing code, or names or shapes that do not fit.
    """
    found = {name.removeprefix("module."): tensor for name, tensor in _read(Path(file), key).items()}
    if any(name.startswith("encoder.") for name in found):
        found = {n.removeprefix("encoder."): t for n, t in found.items() if n.startswith("encoder.")}
    own = encoder.state_dict()
    prefixes = tuple(heads)
    found = {n: t for n, t in found.items() if n in own or not n.startswith(prefixes or ("\0",))}
    missing, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & found.keys() if own[n].shape != found[n].shape)
    if missing or unknown or shapes:
        facts = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
        told = "; ".join(f"{len(names)} {what}, first {names[0]}" for what, names in facts if names)
        raise UsageError(key, file, f"weights of this encoder: {told}")
    encoder.load_state_dict(found)
