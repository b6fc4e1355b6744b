"""Merges layers of settings into the schema, with errors that name key, value and what is allowed."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import presets
from .presets import Layer
from .values import coerce, one_line, unknown_key

if TYPE_CHECKING:
    from ..config import Config

COMMAND_LINE = "command line"
_MERGED = "the merged settings"


def pair(schema: type[Config], text: str) -> tuple[str, Any]:
    """Key and value of a ``key=value`` text; the value is YAML, but paths and names are taken as typed.

    Raises:
        UsageError: no ``=``, no key, no value, or no valid YAML.
    """
    key, equals, raw = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", key):
        raise UsageError("override", text, "must be key=value, for example federation.clients=10")
    kind = hint(schema, key)
    if key in ("preset", "protocol") or (kind in (str, str | None) and not raw.startswith(("'", '"'))):
        # YAML would read 007 as a number and cut "a #b".
        return key, None if kind == str | None and raw in ("null", "~") else raw
    if not raw.strip():
        raise UsageError(key, raw, "has no value; write null for none and [] for an empty list")
    return key, presets.parse(f"value: {raw}", key, raw).get("value")


def hint(schema: type[Config], key: str) -> Any:
    """The type of a dotted key of the schema; Any of a key that it does not know."""
    cls: Any = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(cls):
            return Any
        cls = typing.get_type_hints(cls).get(part, Any)
    return cls


def merge(schema: type[Config], stack: Sequence[Layer]) -> Config:
    """The settings that the layers give, lowest first, over the defaults of the schema.

    Raises:
        UsageError: an unknown key, or a value of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(schema)
    where = COMMAND_LINE
    try:
        for layer in stack:
            where = layer.where
            values = _checked(schema, layer.values, "")
            _displace(merged, values)
            merged = OmegaConf.merge(merged, values)
        where = _MERGED
        config = OmegaConf.to_object(merged)
        assert isinstance(config, schema)
        config.options = {name: given for name, given in config.options.items() if given is not None}
        _checked(schema, dataclasses.asdict(config), "")
    except UsageError as error:
        if where not in (COMMAND_LINE, _MERGED):
            error.args = (f"{str(error).rstrip('.')} (in {where}).",)
        raise
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "CONFIG")
        reason = one_line(ValueError(str(error).split("\n")[0]))
        source = merged if where == _MERGED else layer.values
        raise UsageError(key, _at(source, key), f"{reason} (in {where})") from error
    return config


def _checked(cls: type, values: Any, section: str) -> dict[str, Any]:
    """``values`` with the types of ``cls``; interpolations are left for OmegaConf."""
    if not isinstance(values, Mapping):
        raise UsageError(section, values, f"must be a mapping of {section} settings")
    hints = typing.get_type_hints(cls)
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise unknown_key(section, str(name), value, list(hints))
        key = f"{section}.{name}" if section else str(name)
        if dataclasses.is_dataclass(hints[name]) and isinstance(hints[name], type):
            result[name] = _checked(hints[name], value, key)
        elif value == "???":
            raise UsageError(key, value, "must be given")
        elif isinstance(value, str) and "${" in value:
            result[name] = value
        else:
            result[name] = coerce(hints[name], value, key)
    for name, given in result.get("options", {}).items() if not section else ():
        if given is not None and not isinstance(given, dict):
            raise UsageError(f"options.{name}", given, "must be a mapping of option names to values, or null")
    return result


def _displace(merged: Any, values: dict[str, Any]) -> None:
    """Takes out of ``merged`` what a higher layer replaces as a whole."""
    stack = values.get("strategy")
    if isinstance(stack, list):
        for name in [name for name in merged.options if name not in stack]:
            from .. import registry

            if not registry.in_stack(name, stack):
                del merged.options[name]
    federation = values.get("federation", {})
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if federation.get(one) is not None and federation.get(other) is None:
            merged.federation[other] = None
    if federation.get("cohort") and "participation" not in federation:
        merged.federation.participation = 1.0
    if "participation" in federation and not federation.get("cohort"):
        merged.federation.cohort = 0
    network = values.get("model", {})
    if network.get("name") not in (None, merged.model.name):
        for size in ("width", "depth"):  # of the network that was replaced: another means something else by them
            merged.model[size] = None


def _at(values: Any, key: str) -> Any:
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(values) if OmegaConf.is_config(values) else values
    for part in key.split("."):
        plain = plain.get(part) if isinstance(plain, dict) else None
    return plain
