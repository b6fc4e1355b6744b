"""The settings of a run beside their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..compare.groups import shown
from ..errors import UsageError
from ..records.runs import Run, flat


@dataclass(frozen=True)
class Setting:
    """One setting; ``default`` is "" where there is none, ``changed`` says whether it differs from it."""

    key: str
    value: str
    default: str
    changed: bool


@dataclass(frozen=True)
class Section:
    """The settings of one section."""

    name: str
    settings: tuple[Setting, ...]

    @property
    def changed(self) -> int:
        """How many differ from their defaults."""
        return sum(setting.changed for setting in self.settings)


def sections_of(run: Run) -> tuple[Section, ...]:
    """All settings of a run, by section in the order of the schema; keys without a section are ``general``."""
    defaults = _defaults(run)
    found: dict[str, list[Setting]] = {}
    for key, value in {**defaults, **run.settings}.items():
        given, default = _plain(run.settings.get(key, value)), _plain(defaults.get(key))
        section = key.partition(".")[0] if "." in key or key == "protocol" else "general"
        known = key in defaults
        row = Setting(key, _text(given), _text(default) if known else "", not known or given != default)
        found.setdefault(section, []).append(row)
    return tuple(Section(name, tuple(rows)) for name, rows in found.items())


def _defaults(run: Run) -> dict[str, Any]:
    from .. import registry
    from ..cards import options_of
    from ..config import Config

    found = flat(asdict(Config()))
    for name in run.strategy:
        try:
            rows = options_of(registry.load("strategies", name).Options)
        except UsageError:  # of a plugin that is not loaded: no default is known
            continue
        found |= {f"options.{name}.{row.name}": row.default for row in rows}
    return found


def _plain(value: Any) -> Any:
    """Numbers and sequences so that what YAML holds of a default equals it."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    return "none" if value is None or value == [] or value == "" else shown(value)
