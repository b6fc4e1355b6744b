"""From what a sweep varies to its points: a run's settings, its folder, and what is to be done there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config, config_hash, load_config
from ..errors import UsageError
from ..settings import presets
from ..settings.resolve import anchored, resolve
from .grid import VARIES, Axis, Combination, Section, Settings, parse_section, same
from .names import name_variants
from .states import State, finished, state_of

PRIVATE = ".sweep"
"""Folder beside the variants for the lock and what workers print."""

_PLACE = ("name", "seed", "output.dir")


@dataclass(frozen=True)
class Loader:
    """Settings as the command line gives them.

    Attributes:
        source: a YAML file, a preset, or None.
        fixed: ``key=value`` texts.
        pairs: keys and values that come from options such as ``--device``.
        plugins: files of ``--plugin``.
    """

    source: str | None
    fixed: tuple[str, ...] = ()
    pairs: tuple[tuple[str, Any], ...] = ()
    plugins: tuple[str, ...] = ()

    def load(self, settings: Mapping[str, Any], place: Mapping[str, Any], leave_out: frozenset[str]) -> Config:
        """One run's settings.

        Args:
            settings: over the fixed ones, by dotted key.
            place: name, seed and output.dir, in place of any fixed ones.
            leave_out: strategies whose options are not taken.

        Raises:
            UsageError: they are wrong.
        """
        fixed = [text for text in self.fixed if not self._hidden(text.partition("=")[0], place, leave_out)]
        pairs = [(k, v) for k, v in (*self.pairs, *settings.items()) if not self._hidden(k, place, leave_out)]
        config = load_config(self.source, [*fixed, *pairs, *place.items()])
        config.plugins += [path for path in self.plugins if path not in config.plugins]
        return config

    @staticmethod
    def _hidden(key: str, place: Mapping[str, Any], leave_out: frozenset[str]) -> bool:
        return key in place or owner_of(key) in leave_out

    def section(self) -> Section:
        """The ``sweep`` section of the file; an empty one without."""
        if self.source is None:
            return Section()
        values = presets.read(presets.find(self.source, "CONFIG"))
        return parse_section(values.get("sweep") or {})

    def own_name(self) -> str | None:
        """The ``name`` in the file itself, not in what it builds on."""
        return None if self.source is None else presets.read(presets.find(self.source, "CONFIG")).get("name")

    def option_owners(self) -> set[str]:
        """Strategies that the fixed settings give options to."""
        return {owner for text in self.fixed if (owner := owner_of(text.partition("=")[0]))}


@dataclass(frozen=True)
class Variant:
    """Settings that are run with several seeds.

    Attributes:
        name: of its folder.
        settings: what tells it from other variants, by dotted key.
        leave_out: strategies that are not in its stack, whose options are not its own.
    """

    name: str
    settings: Settings
    leave_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        variant: the name of its variant.
        settings: of the variant, by dotted key.
        config: all settings.
        folder: of the run; of an equal one elsewhere in the sweep's folder where that is done.
        state: what is there: nothing, a run to go on with, or a finished one.
    """

    variant: str
    settings: Settings
    config: Config
    folder: Path
    state: State

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.config.seed

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.variant} seed {self.seed}"


def named_root(loader: Loader, base: Config, varied: Sequence[str]) -> tuple[str, Path]:
    """Name and folder of a sweep: ``output.dir/name``."""
    given = {key: value for key, _, value in (text.partition("=") for text in loader.fixed)}
    name = given.get("name", base.name)
    if "name" not in given and base.protocol.name and name == "-".join([base.protocol.name, *base.strategy]):
        name = base.protocol.name
    if "name" not in given and {"preset", "protocol"} & set(varied):
        name = loader.own_name() or "sweep"
    return name, Path(base.output.dir) / name


def settle_varies(axes: Sequence[Axis], base: Config) -> list[Axis]:
    """The axes with ``varies`` replaced by the values that the followed protocol lists.

    Raises:
        UsageError: no protocol is followed, or it lists none for the key.
    """
    found = []
    for axis in axes:
        if VARIES in axis.values:
            listed = base.protocol.varies
            if axis.key not in listed:
                what = f"protocol {base.protocol.name} varies {', '.join(listed) or 'nothing'}"
                allowed = what if base.protocol.name else "needs a protocol: protocol=NAME"
                raise UsageError(axis.key, VARIES, allowed, listed)
            axis = Axis(axis.key, tuple(listed[axis.key]))
        found.append(axis)
    return found


def make_variants(loader: Loader, found: Sequence[Combination]) -> list[Variant]:
    """Names for combinations of settings. Options count only for stacks that hold their strategy.

    Raises:
        UsageError: settings that are wrong.
    """
    owners = loader.option_owners() | {owner for c in found for key in c.settings if (owner := owner_of(key))}
    left_out = [_foreign(loader, c.settings, owners) for c in found]
    # A strategy that is in no stack at all is a mistake, which the check of the settings names.
    nowhere = frozenset(owners).intersection(*left_out) if left_out else frozenset()
    kept: list[Settings] = []
    called: list[Settings] = []
    leave: list[frozenset[str]] = []
    for combination, foreign in zip(found, left_out, strict=True):
        foreign -= nowhere
        own = {key: value for key, value in combination.settings.items() if owner_of(key) not in foreign}
        if not any(same(own, earlier) for earlier in kept):
            shown = combination.called
            called.append(own if shown is None else {k: v for k, v in shown.items() if owner_of(k) not in foreign})
            kept.append(own)
            leave.append(foreign)
    plain = "+".join(loader.load({}, {}, frozenset(owners)).strategy) if {} in called else ""
    names = name_variants(called, plain)
    return [Variant(*parts) for parts in zip(names, kept, leave, strict=True)]


def make_points(loader: Loader, variants: Sequence[Variant], seeds: Sequence[int], root: Path) -> list[Point]:
    """All runs of a sweep; every name, option and plugin is checked.

    Raises:
        UsageError: settings that are wrong, or a folder that holds a run with other settings.
        RunFailed: a strategy cannot be made.
    """
    points = []
    for variant in variants:
        for config in _with_seeds(loader, variant, seeds, root):
            folder = root / variant.name / f"seed-{config.seed}"
            points.append(Point(variant.name, variant.settings, config, folder, state_of(folder, config)))
        resolve(points[-1].config)
    # What the engine computes with is no part of a run's hash, so runs that differ in it alone are told by their place.
    if any(key.startswith("engine") for variant in variants for key in variant.settings):
        return points
    missing = [point for point in points if point.state == "new"]
    elsewhere = finished(root, {p.folder for p in points}, missing[0].config) if missing else {}
    return [
        replace(p, folder=elsewhere[config_hash(p.config)], state="done")
        if p.state == "new" and config_hash(p.config) in elsewhere
        else p
        for p in points
    ]


def _with_seeds(loader: Loader, variant: Variant, seeds: Sequence[int], root: Path) -> list[Config]:
    def load(seed: int) -> Config:
        place = dict(zip(_PLACE, (variant.name, seed, str(root)), strict=True))
        return anchored(loader.load(variant.settings, place, variant.leave_out))

    first = load(seeds[0])
    # Loading takes a while; with an interpolation the seed may be in other settings too, which a second one tells.
    if len(seeds) < 2 or replace(first, seed=seeds[-1]) == load(seeds[-1]):
        return [replace(first, seed=seed) for seed in seeds]
    return [load(seed) for seed in seeds]


def owner_of(key: str) -> str | None:
    """The strategy that a key gives an option to; None of other keys."""
    parts = key.split(".")
    return parts[1] if parts[0] == "options" and len(parts) > 1 else None


def _foreign(loader: Loader, settings: Settings, owners: set[str]) -> frozenset[str]:
    if not owners:
        return frozenset()
    from .. import registry

    stack = loader.load(settings, {}, frozenset(owners)).strategy
    return frozenset(owner for owner in owners if not registry.in_stack(owner, stack))
