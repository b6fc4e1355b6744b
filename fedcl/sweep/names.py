"""Folder names of a sweep's variants: readable, unique, and safe on every file system."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 100
"""Characters of a name; what is longer is cut, and told apart by a short hash."""

BARE = ("strategy", "preset", "protocol", "name")
"""Keys whose value needs no ``key=`` to be understood."""


def slug(value: Any) -> str:
    """A value as part of a folder's name.

    >>> slug(["fedlwf", "supcon"]), slug(0.05), slug(None), slug("holdout(0.2)"), slug([])
    ('fedlwf+supcon', '0.05', 'null', 'holdout-0.2', 'none')
    """
    if isinstance(value, list | tuple):
        return "+".join(slug(item) for item in value) or "none"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return re.sub(r"[^A-Za-z0-9_.+=@-]+", "-", text).strip("-.") or "-"


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key by as few of its last parts as tell it from the others; ``data.name`` is ``data``.

    >>> short_keys(["optimiser.lr", "options.a.mu", "options.b.mu", "model.name"])
    {'optimiser.lr': 'lr', 'options.a.mu': 'a.mu', 'options.b.mu': 'b.mu', 'model.name': 'model'}
    """
    trimmed = {key: key.removesuffix(".name") for key in keys}
    found = {}
    for key, text in trimmed.items():
        parts = text.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [other for name, other in trimmed.items() if name != key]
        alone = (t for t in tails if not any(other == t or other.endswith(f".{t}") for other in others))
        found[key] = next(alone, key)
    return found


def name_variants(settings: Sequence[Mapping[str, Any]], plain: str) -> list[str]:
    """A name for each variant, from its settings in their order, or its own ``name`` in place of what that stands for.

    Args:
        settings: of each variant by dotted key; no two are equal.
        plain: the name of a variant without settings.

    >>> name_variants([{"strategy": ["finetune"], "optimiser.lr": 0.1}, {"strategy": ["finetune"]}], "base")
    ['finetune,lr=0.1', 'finetune']
    """
    keys = short_keys(list(dict.fromkeys(key for variant in settings for key in variant)))
    names: list[str] = []
    taken: set[str] = set()
    for variant in settings:
        parts = [slug(v) if k in BARE else f"{slug(keys[k])}={slug(v)}" for k, v in variant.items()]
        name = ",".join(parts) or slug(plain)
        if name.startswith(("-", ".")):
            name = f"_{name}"
        # Two names that differ in case alone are one folder on some systems.
        if len(name) > LONGEST or name.casefold() in taken:
            digest = hashlib.sha256(json.dumps(variant, sort_keys=True, default=str).encode()).hexdigest()[:8]
            name = f"{name[:LONGEST]}~{digest}"
        taken.add(name.casefold())
        names.append(name)
    return names
