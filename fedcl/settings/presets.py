"""Finds YAML settings by path or by preset name and reads them as layers, lowest first."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from ..errors import UsageError
from .protocols import ProtocolCard, parse_card
from .values import one_line

PACKAGE = "fedcl.experiments"
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Layer:
    """Settings from one place.

    Attributes:
        values: nested mapping, not yet checked, interpolations unresolved.
        where: for messages: a path, or ``command line``.
        protocol: name of the protocol that these settings belong to, or ''.
        card: the ``card`` section of a protocol's own file.
    """

    values: dict[str, Any]
    where: str
    protocol: str = ""
    card: ProtocolCard | None = None


@dataclass(frozen=True)
class Preset:
    """A named YAML file.

    Attributes:
        name: what ``presets:``, ``preset=`` and ``fedcl run`` take.
        summary: its first comment line.
        path: of the file.
    """

    name: str
    summary: str
    path: Path


def folders(search: Sequence[Path] = ()) -> list[Path]:
    """Where presets are looked for: ``search`` first, then the packaged ones."""
    try:
        packaged = [Path(str(resources.files(PACKAGE)))]
    except (ModuleNotFoundError, TypeError):
        packaged = []
    return [*search, *packaged]


def presets(search: Sequence[Path] = (), kind: str = "presets") -> list[Preset]:
    """All presets, or with ``kind="protocols"`` those of the folder ``protocols``, by name."""
    found: dict[str, Preset] = {}
    for folder in folders(search):
        place = folder / "protocols" if kind == "protocols" else folder
        for path in sorted(p for p in place.glob("*") if p.suffix in SUFFIXES) if place.is_dir() else ():
            found.setdefault(path.stem, Preset(path.stem, _first_comment(path), path))
    return [found[name] for name in sorted(found)]


def find(source: str | Path, key: str, search: Sequence[Path] = ()) -> Path:
    """The file that ``source`` means: a path, or the name of a preset.

    Raises:
        UsageError: there is no such file and no such preset.
    """
    text, path = str(source), Path(source).expanduser()
    kind = "protocols" if text.startswith("protocols/") or key == "protocol" else "presets"
    known = {preset.name: preset.path for preset in presets(search, kind)}
    name = text.removeprefix("protocols/")
    # A preset's name never means a file or a folder that happens to lie in the current folder.
    if name in known:
        return known[name]
    if path.is_dir():
        resolved = path / "config.yaml"
        if resolved.is_file():
            raise UsageError(key, text, f"is a run folder; name {resolved} or use 'fedcl resume {text}'")
        raise UsageError(key, text, "is a folder; name a YAML file in it or a preset")
    if path.is_file():
        return path
    names = sorted(known)
    listed = f"; there is {', '.join(names)}" if names else "; no presets are installed"
    what = "protocol" if kind == "protocols" else "YAML file and no preset"
    raise UsageError(key, text, f"there is no such {what}{listed}", [*names, *(f"{n}.yaml" for n in names)])


def layers(
    path: Path, search: Sequence[Path] = (), chain: tuple[Path, ...] = (), protocol: str = ""
) -> Iterator[Layer]:
    """The layers of a YAML file: those of its ``presets`` in order, of its ``protocol``, then its own.

    A file with a ``card``, or from a folder ``protocols``, is a protocol: with all that it builds on.

    Args:
        protocol: the protocol that builds on this file, or ''.

    Raises:
        UsageError: a file that cannot be read or parsed, or presets that name each other in a circle.
    """
    path = path.resolve()
    if path in chain:
        circle = " -> ".join(step.name for step in (*chain[chain.index(path) :], path))
        raise UsageError("presets", path.name, f"presets name each other in a circle: {circle}")
    values = read(path)
    values.pop("sweep", None)  # what `fedcl sweep` varies; a single run is of the settings around it
    if not protocol and ("card" in values or path.parent.name == "protocols"):
        protocol = path.stem
    yield from below(values, path.parent, search, (*chain, path), str(path), protocol)


def below(
    values: dict[str, Any],
    folder: Path,
    search: Sequence[Path],
    chain: tuple[Path, ...],
    where: str,
    protocol: str = "",
) -> Iterator[Layer]:
    """The layers of settings that may name ``presets`` and a ``protocol``; relative paths start at ``folder``."""
    card = parse_card(values.pop("card"), where) if "card" in values else None
    followed = values.pop("protocol") if isinstance(values.get("protocol"), str) else None
    names = values.pop("presets", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UsageError("presets", names, "must be a list of preset names or YAML paths")
    for name in names:
        beside = folder / Path(name).expanduser()
        target = beside if beside.suffix in SUFFIXES else None
        if target is not None and not target.is_file():
            known = [preset.name for preset in presets(search)]
            raise UsageError("presets", name, f"there is no such file beside {where}", known)
        yield from layers(target or _named(name, search), search, chain, protocol)
    if followed is not None:
        beside = folder / Path(followed).expanduser()
        named = beside if beside.suffix in SUFFIXES and beside.is_file() else find(followed, "protocol", search)
        yield from layers(named, search, chain, protocol or named.stem)
    yield Layer(_absolute_plugins(values, folder), where, protocol, card)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: it cannot be read, is no text, no YAML, empty, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError("CONFIG", str(path), "is no text file; settings are YAML in UTF-8") from None
    except OSError as error:
        raise UsageError("CONFIG", str(path), f"cannot be read: {error.strerror}") from error
    return parse(text, "CONFIG", str(path))


def parse(text: str, key: str, shown: str) -> dict[str, Any]:
    """The mapping that a YAML text stands for; numbers such as ``1e-3`` are numbers.

    Raises:
        UsageError: no YAML, empty, or no mapping; ``key`` and ``shown`` are named.
    """
    import yaml  # type: ignore[import-untyped]  # ships no types
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(io.StringIO(text))
        if isinstance(loaded, DictConfig) and not loaded:
            raise UsageError(key, shown, "is empty; it must be a YAML mapping of settings")
        plain = OmegaConf.to_container(loaded)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(key, shown, f"is no valid YAML{at}: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, RecursionError, ValueError) as error:
        raise UsageError(key, shown, f"is no YAML mapping of settings: {one_line(error)}") from error
    if not isinstance(plain, Mapping):
        raise UsageError(key, shown, "holds a list; it must be a YAML mapping of settings")
    return cast(dict[str, Any], plain)


def _named(name: str, search: Sequence[Path]) -> Path:
    kind = "protocols" if name.startswith("protocols/") else "presets"
    known = {preset.name: preset.path for preset in presets(search, kind)}
    if name.removeprefix("protocols/") not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise UsageError("presets", name, f"there is no such preset; there is {listed}", known)
    return known[name.removeprefix("protocols/")]


def _absolute_plugins(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    plugins = values.get("plugins")
    given = [plugins] if isinstance(plugins, str) else plugins
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        return values
    return {**values, "plugins": [str((folder / Path(item).expanduser()).resolve()) for item in given]}


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next(lines, "")
    return first.lstrip("# ").strip() if first.startswith("#") else ""
