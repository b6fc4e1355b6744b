"""From what a user writes after ``fedcl check`` to a class."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .. import registry
from ..dotted import find_object
from ..errors import UsageError

ALLOWED = "must be a registered name, MODULE:CLASS, FILE.py or FILE.py:CLASS"


def find_target(text: str) -> type[Any]:
    """The strategy, scenario or partition class that a text means.

    Args:
        text: ``MODULE:CLASS``, ``FILE.py``, ``FILE.py:CLASS``, or a registered name or alias.

    Raises:
        UsageError: nothing there, it fails to import, or it is none of the three.
    """
    place, _, name = text.rpartition(":") if ":" in text else (text, "", "")
    if place.endswith(".py"):
        return _in_file(text, place, name)
    if name:
        return _a_class(text, find_object(text, "TARGET", ALLOWED))
    return _registered(text)


def kind_of(cls: type[Any]) -> registry.Kind | None:
    """What a class is, or None."""
    from ..partitioning import Partition
    from ..strategy import Strategy
    from ..stream import Scenario

    bases: dict[registry.Kind, type] = {"strategies": Strategy, "scenarios": Scenario, "partitions": Partition}
    return next((kind for kind, base in bases.items() if issubclass(cls, base)), None)


def _in_file(text: str, place: str, name: str) -> type[Any]:
    try:
        plugin = registry.add_plugin(place)
    except UsageError as error:
        raise UsageError("TARGET", text, error.allowed) from error
    found = {registry.load(kind, own).__name__: registry.load(kind, own) for kind, own in plugin.classes}
    if not name and len(found) == 1:
        return next(iter(found.values()))
    if name in found:
        return found[name]
    if name:
        return _a_class(text, getattr(sys.modules[plugin.module], name, None), list(found))
    raise UsageError("TARGET", text, f"has several classes, name one: {', '.join(f'{place}:{n}' for n in found)}")


def _a_class(text: str, found: object, names: Sequence[str] = ()) -> type[Any]:
    if not isinstance(found, type):
        raise UsageError("TARGET", text, "names no class", [text.rpartition(":")[0] + f":{name}" for name in names])
    return found


def _registered(text: str) -> type[Any]:
    for kind in registry.KINDS:
        names = [name for e in registry.entries(kind) for name in (e.name, *getattr(e.cls, "aliases", ()))]
        if text in names:
            return registry.load(kind, text, key="TARGET")
    known = [name for kind in registry.KINDS for name in registry.names(kind)]
    raise UsageError("TARGET", text, ALLOWED, known)
