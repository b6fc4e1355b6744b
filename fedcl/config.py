"""The settings of a run: one structured schema, YAML presets that compose, ``key=value`` overrides.

Every wrong key, type or value ends in one :class:`fedcl.errors.UsageError` that names the key, the value and
what is allowed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import UsageError
from .settings import presets, protocols
from .settings.merging import COMMAND_LINE, pair
from .settings.presets import Layer
from .settings.schema import (
    Checkpoint,
    Config,
    Data,
    Engine,
    Evaluate,
    Federation,
    Labels,
    Model,
    Optimiser,
    Output,
    Partition,
    Protocol,
    Scenario,
    Time,
)
from .settings.validation import validate
from .settings.values import parse_options

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Engine",
    "Evaluate",
    "Federation",
    "Labels",
    "Model",
    "Optimiser",
    "Output",
    "Partition",
    "Protocol",
    "Scenario",
    "Time",
    "config_hash",
    "load_config",
    "parse_options",
    "to_yaml",
    "validate",
]

DEFAULT_PRESET = "default"


def load_config(
    source: str | Path | Mapping[str, Any] | Config | None = None,
    overrides: Sequence[str | tuple[str, Any]] | Mapping[str, Any] = (),
    *,
    search: Sequence[Path] = (),
) -> Config:
    """The settings of a run: schema defaults, then presets, then ``source``, then ``overrides``.

    A layer that sets ``strategy`` drops the options that lower layers gave to strategies it leaves out; a
    layer that sets one of ``federation.epochs`` and ``federation.steps`` unsets the other; one that changes
    ``model.name`` unsets the width and depth of the network that it replaces. With neither epochs nor steps, one epoch
    a round is trained.

    Args:
        source: a YAML file, the name of a preset, settings as a mapping, or None for the default preset.
        overrides: ``key=value`` texts with YAML values, where ``preset=NAME`` and ``protocol=NAME`` merge a
            file; or pairs, or a mapping, of (dotted) keys and values.
        search: more folders with presets, looked at first.

    Raises:
        UsageError: naming the key, its value and what is allowed.
    """
    stack: list[Layer] = []
    if isinstance(source, Config):
        stack.append(Layer(asdict(source), "settings"))
    elif isinstance(source, Mapping):
        stack += presets.below(dict(source), Path.cwd(), search, (), "settings")
    elif source is not None:
        stack += presets.layers(presets.find(source, "CONFIG", search), search)
    above = list(_override_layers(overrides, search))
    # A protocol says all that matters: what the default stack adds would not be the protocol's.
    if source is None and not any(layer.protocol for layer in above):
        stack += presets.layers(presets.find(DEFAULT_PRESET, "CONFIG", search), search)
    config = protocols.merged(Config, [*stack, *above])
    if config.federation.epochs is None and config.federation.steps is None:
        config.federation.epochs = 1
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """All settings as YAML; loading it gives an equal configuration."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_hash(config: Config) -> str:
    """SHA-256 (hex) of what decides a run's numbers: no name, output, engine or protocol; plugins by content."""
    data = asdict(config)
    for section in ("name", "output", "engine", "protocol"):
        del data[section]
    files = [Path(plugin) for plugin in config.plugins]
    data["plugins"] = [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(file) for file in files]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _override_layers(
    overrides: Sequence[str | tuple[str, Any]] | Mapping[str, Any], search: Sequence[Path]
) -> Iterable[Layer]:
    values: dict[str, Any] = {}
    pairs: Iterable[tuple[str, Any]]
    if isinstance(overrides, Mapping):
        pairs = overrides.items()
    else:
        pairs = [pair(Config, item) if isinstance(item, str) else item for item in overrides]
    given: set[str] = set()
    for key, value in pairs:
        if key in ("preset", "protocol") and not isinstance(value, Mapping):  # a mapping is a run's own record
            path = presets.find(str(value), key, search)
            yield from presets.layers(path, search, protocol=path.stem if key == "protocol" else "")
            continue
        if key.startswith("protocol."):
            raise UsageError(key, value, "is written by fedcl; follow a protocol with protocol=NAME", ["protocol"])
        if key in given:
            raise UsageError(key, value, "is given twice")
        given.add(key)
        *parents, last = key.split(".")
        place = values
        for part in parents:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(key, value, f"the section {part} is given as a whole too")
        if last in place:
            raise UsageError(key, value, "its section is given in parts too")
        place[last] = copy.deepcopy(value)
    yield from presets.below(values, Path.cwd(), search, (), COMMAND_LINE)
