"""Objects that a user names by module: ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from .errors import UsageError
from .registry import failure


def find_object(text: str, key: str, allowed: str) -> Any:
    """What a dotted name means; a module in the working directory is found too.

    Args:
        text: ``package.module:name``; the name may have dots.
        key: the setting or argument to blame.
        allowed: what should stand there, in words.

    Raises:
        UsageError: no such module, one that fails to import, or no such name in it.
    """
    place, colon, name = text.partition(":")
    if not (place and colon and name):
        raise UsageError(key, text, allowed)
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise UsageError(key, text, f"{place} fails to import: {failure(error)}") from error
        raise UsageError(key, text, f"there is no module {error.name}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(key, text, f"{place} fails to import: {failure(error)}") from error
    for part in name.split("."):
        names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
        if not hasattr(found, part):
            raise UsageError(key, text, f"{place} has no {name!r}", [f"{place}:{n}" for n in names])
        found = getattr(found, part)
    return found
