"""Finds strategies, scenarios and partitions by entry points, built-in ones too, and in plugin files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import UsageError
from .settings.values import one_line

Kind = Literal["strategies", "scenarios", "partitions"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BASES: dict[Kind, tuple[str, str]] = {
    "strategies": ("fedcl.strategy", "Strategy"),
    "scenarios": ("fedcl.stream", "Scenario"),
    "partitions": ("fedcl.partitioning", "Partition"),
}
_KEYS: dict[Kind, str] = {
    "strategies": "strategy",
    "scenarios": "scenario.name",
    "partitions": "partition.name",
}


@dataclass(frozen=True)
class Plugin:
    """A plugin file that was loaded.

    Attributes:
        path: absolute.
        module: name it was imported under.
        sha256: of the file, hex.
        classes: (kind, name) of what it registers.
    """

    path: Path
    module: str
    sha256: str
    classes: tuple[tuple[Kind, str], ...]


@dataclass(frozen=True)
class Entry:
    """One line of a listing.

    Attributes:
        name: as in the configuration.
        origin: the distribution or the plugin file it comes from.
        cls: the class, or None when it cannot be imported.
        problem: why it cannot be imported, or ''.
    """

    name: str
    origin: str
    cls: type[Any] | None
    problem: str = ""


@dataclass
class Registry:
    """Entry points of the groups ``fedcl.<kind>`` and classes of plugin files."""

    _plugins: dict[Path, Plugin] = field(default_factory=dict)
    _classes: dict[tuple[Kind, str], tuple[type[Any], Path]] = field(default_factory=dict)

    def names(self, kind: Kind) -> list[str]:
        """All names, sorted; nothing is imported. Broken ones are among them."""
        own = {name for k, name in self._classes if k == kind}
        return sorted(own | {point.name for point in _points(kind)})

    def load(self, kind: Kind, name: str, key: str | None = None) -> type[Any]:
        """The class that ``name`` or one of its aliases means.

        Args:
            kind: what is looked for.
            name: as the user wrote it.
            key: the setting to blame, by default the one of ``kind``.

        Raises:
            UsageError: no such name, two of that name, or a module that fails to import.
        """
        key = key or _KEYS[kind]
        if name in self.names(kind):
            entry = self._entry(kind, name)
            if entry.cls is None:
                raise UsageError(key, name, entry.problem)
            return entry.cls
        entries = self.entries(kind)
        # A broken entry has no known aliases: it may be the one that was meant, so it is named below.
        meant = [entry for entry in entries if entry.cls and name in getattr(entry.cls, "aliases", ())]
        if len(meant) > 1:
            both = " and ".join(entry.name for entry in meant)
            raise UsageError(key, name, f"is an alias of {both}; use one of these names")
        if meant:
            return meant[0].cls  # type: ignore[return-value]
        names = [name for entry in entries for name in (entry.name, *getattr(entry.cls, "aliases", ()))]
        broken = "".join(f"; {entry.problem}" for entry in entries if entry.cls is None)
        raise UsageError(key, name, f"there is no such {kind_text(kind)}; see 'fedcl list {kind}'{broken}", names)

    def entries(self, kind: Kind) -> list[Entry]:
        """All entries by name; broken ones have a problem instead of a class."""
        return [self._entry(kind, name) for name in self.names(kind)]

    def in_stack(self, name: str, stack: Sequence[str]) -> bool:
        """Whether a strategy name or alias means one that a stack names."""
        if name in stack:
            return True
        try:
            cls = self.load("strategies", name)
            return any(self.load("strategies", other) is cls for other in stack)
        except UsageError:
            return False

    def add_plugin(self, file: str | Path) -> Plugin:
        """Loads a plugin file and registers its strategies, scenarios and partitions.

        Loading the same file, or a copy of it, again does nothing.

        Raises:
            UsageError: no such file, it fails (type, message and line are named), it defines nothing, or a
                name is taken.
        """
        path = Path(file).expanduser().resolve()
        if not path.is_file():
            raise UsageError("--plugin", str(file), "there is no such file; it must be a Python file")
        if path in self._plugins:
            return self._plugins[path]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        # A run folder holds a copy of each plugin: resuming in the process that ran it loads nothing anew.
        same = next((p for p in self._plugins.values() if (p.sha256, p.path.name) == (sha256, path.name)), None)
        if same is not None:
            return same
        # Two plugins may have the same file name in different folders.
        place = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        name = f"fedcl_plugin_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{place}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UsageError("--plugin", str(file), "must be a Python file with the ending .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            found = dict(self._classes_in(module, str(file)))
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            if isinstance(error, UsageError):
                raise
            raise UsageError("--plugin", str(file), f"fails to import: {failure(error, path)}") from error
        self._classes |= {key: (cls, path) for key, cls in found.items()}
        self._plugins[path] = Plugin(path, name, sha256, tuple(found))
        return self._plugins[path]

    @contextmanager
    def standing_in(self, kind: Kind, cls: type[Any]) -> Iterator[None]:
        """Meanwhile the name of a class means that very class, whatever was registered under it."""
        key = (kind, str(cls.name))
        before = self._classes.get(key)
        self._classes[key] = (cls, Path(cls.__module__))
        try:
            yield
        finally:
            del self._classes[key]
            if before is not None:
                self._classes[key] = before

    def plugins(self) -> list[Plugin]:
        """The plugin files loaded so far."""
        return list(self._plugins.values())

    def _classes_in(self, module: Any, shown: str) -> Iterator[tuple[tuple[Kind, str], type[Any]]]:
        seen: dict[tuple[Kind, str], str] = {}
        for cls in [value for value in vars(module).values() if isinstance(value, type)]:
            kind, name = _kind_of(cls), str(getattr(cls, "name", ""))
            if kind is None or cls.__module__ != module.__name__ or not name:
                continue
            if seen.setdefault((kind, name), cls.__name__) != cls.__name__:
                allowed = f"{seen[kind, name]} and {cls.__name__} both have the name {name!r}"
                raise UsageError("--plugin", shown, allowed)
            other = self._origin(kind, name)
            if other is not None:
                allowed = f"{cls.__name__} has the name {name!r}, which is taken by {other}"
                raise UsageError("--plugin", shown, allowed)
            yield (kind, name), cls
        if not seen:
            allowed = "defines no subclass of fedcl.Strategy, fedcl.stream.Scenario or fedcl.partitioning.Partition"
            raise UsageError("--plugin", shown, f"{allowed} with a name of its own")

    def _origin(self, kind: Kind, name: str) -> str | None:
        if (kind, name) in self._classes:
            return f"the plugin {self._classes[kind, name][1]}"
        points = [point for point in _points(kind) if point.name == name]
        return f"the entry point {points[0].value} of {_distribution(points[0])}" if points else None

    def _entry(self, kind: Kind, name: str) -> Entry:
        if (kind, name) in self._classes:
            cls, path = self._classes[kind, name]
            return Entry(name, str(path), cls)
        points = [point for point in _points(kind) if point.name == name]
        origin = _distribution(points[0])
        if len(points) > 1:
            both = " and ".join(f"{point.value} ({_distribution(point)})" for point in points)
            return Entry(name, origin, None, f"two entry points have the name {name}: {both}")
        text = f"the entry point {name} = {points[0].value} of {origin}"
        try:
            cls = points[0].load()
        except (Exception, SystemExit) as error:
            return Entry(name, origin, None, f"{text} fails to import: {failure(error)}")
        module, base = _BASES[kind]
        if not isinstance(cls, type) or not issubclass(cls, getattr(importlib.import_module(module), base)):
            return Entry(name, origin, None, f"{text} is no subclass of {module}.{base}")
        if getattr(cls, "name", "") != name:
            return Entry(name, origin, None, f"{text} names a class whose name is {getattr(cls, 'name', '')!r}")
        return Entry(name, origin, cls)


def kind_text(kind: Kind) -> str:
    """The singular, for messages.

    >>> kind_text("strategies")
    'strategy'
    """
    return "strategy" if kind == "strategies" else kind.removesuffix("s")


def failure(error: BaseException, file: Path | None = None) -> str:
    """Type, message and place of an import error in one line.

    Args:
        error: as caught.
        file: the line is looked for here; by default it is the innermost one.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is None or frame.filename == str(file)]
    place = ""
    if isinstance(error, SyntaxError) and error.lineno:
        place = f" ({Path(error.filename or '').name}, line {error.lineno})"
        return f"{type(error).__name__}: {error.msg}{place}"
    if own:
        place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    text = str(error).strip()
    return f"{type(error).__name__}" + (f": {one_line(error)}" if text else "") + place


def _points(kind: Kind) -> list[EntryPoint]:
    return list(_installed(kind, tuple(sys.path)))


@lru_cache(maxsize=16)
def _installed(kind: Kind, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Read once for a path: the metadata of all packages was half of the time that loading settings took. The same
    # point is seen twice when a checkout and its installation are both on the path.
    found = {(point.name, point.value): point for point in entry_points(group=f"fedcl.{kind}")}
    return tuple(found.values())


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _kind_of(cls: type) -> Kind | None:
    for kind, (module, base) in _BASES.items():
        # A class can only derive from a base whose module has been imported.
        parent = getattr(sys.modules.get(module), base, None)
        if parent is not None and cls is not parent and issubclass(cls, parent):
            return kind
    return None


_default = Registry()

names = _default.names
load = _default.load
entries = _default.entries
in_stack = _default.in_stack
add_plugin = _default.add_plugin
standing_in = _default.standing_in
plugins = _default.plugins
