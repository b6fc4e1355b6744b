"""From the command line of a sweep to what is to be run, checked before anything runs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UsageError
from ..records.runfolder import check_name
from .grid import VARIES, Request, combinations, parse_request, parse_seeds
from .plan import Loader, Point, Variant, make_points, make_variants, named_root, settle_varies

SCHEDULERS = ("local", "ray")
METHODS = ("strategy", "preset", "protocol")
"""Lists of these are methods, each with a search of its own; lists of other keys are searched."""


@dataclass(frozen=True)
class Asked:
    """The command line of a sweep.

    Attributes:
        source: a YAML file, a preset, or None.
        overrides: ``key=value`` texts, where a value may list alternatives or be an interval.
        options: keys and values that options such as ``--device`` stand for.
        plugins: files of ``--plugin``.
        seeds: as typed, or None.
        workers: runs at a time, or None.
        scheduler: ``local`` or ``ray``.
        search: trials for each method, or None.
        tune_on: what a search may see, as typed.
        quiet: whether nothing is told on stderr.
    """

    source: str | None = None
    overrides: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    plugins: tuple[str, ...] = ()
    seeds: str | None = None
    workers: int | None = None
    scheduler: str = "local"
    search: int | None = None
    tune_on: str | None = None
    quiet: bool = False

    @property
    def command(self) -> str:
        """A command line that asks for the same."""
        words = ["fedcl", "sweep", *([self.source] if self.source else []), *self.overrides]
        words += [f"{key}={value}" for key, value in self.options]
        named = {"--seeds": self.seeds, "--workers": self.workers, "--search": self.search, "--tune-on": self.tune_on}
        for option, value in named.items():
            words += [option, str(value)] if value is not None else []
        words += ["--scheduler", self.scheduler] if self.scheduler != "local" else []
        for file in self.plugins:
            words += ["--plugin", file]
        return shlex.join(words)


@dataclass(frozen=True)
class Prepared:
    """A sweep that is checked and ready.

    Attributes:
        name, root: of the sweep.
        loader, request: what is fixed and what is varied.
        variants: all of them; of a search its methods.
        seeds: of the final runs.
        base: the settings of the first variant and seed.
    """

    name: str
    root: Path
    loader: Loader
    request: Request
    variants: list[Variant]
    seeds: list[int]
    base: Config

    def points(self) -> list[Point]:
        """All runs; raises as :func:`fedcl.sweep.plan.make_points`."""
        return make_points(self.loader, self.variants, self.seeds, self.root)


def prepare(asked: Asked) -> Prepared:
    """Checks all that can be checked before anything runs.

    Raises:
        UsageError: wrong arguments, or settings that do not fit.
    """
    if asked.scheduler not in SCHEDULERS:
        raise UsageError("--scheduler", asked.scheduler, f"must be one of {', '.join(SCHEDULERS)}", SCHEDULERS)
    if asked.workers is not None and asked.workers < 1:
        raise UsageError("--workers", asked.workers, "must be at least 1")
    if asked.search is not None and find_spec("optuna") is None:
        allowed = "optuna is not installed; it comes with the extra: pip install 'fedcl-sim[search]'"
        raise UsageError("--search", asked.search, allowed)
    bare = Loader(asked.source)
    section = bare.section()
    request = parse_request(asked.overrides, section)
    loader = Loader(asked.source, request.fixed, asked.options, asked.plugins)
    first = {key: value for key, value in request.runs[0].items() if key != "name"}
    first |= {axis.key: axis.values[0] for axis in request.axes if axis.values != (VARIES,)}
    base = loader.load(first, {}, frozenset())
    name, root = named_root(loader, base, [axis.key for axis in request.axes])
    check_name(name)
    request = replace(request, axes=tuple(settle_varies(request.axes, base)))
    if base.engine.runtime == "deploy" or (asked.scheduler == "ray" and base.engine.runtime != "local"):
        allowed = f"must be local{' or ray' * (asked.scheduler == 'local')} in a sweep of --scheduler {asked.scheduler}"
        raise UsageError("engine.runtime", base.engine.runtime, allowed)
    if asked.search is None and request.ranges:
        interval = request.ranges[0]
        raise UsageError(interval.key, f"{interval.low:g}..{interval.high:g}", "is an interval, which needs --search N")
    if asked.search is None and asked.tune_on is not None:
        raise UsageError("--tune-on", asked.tune_on, "is only read with --search N")
    axes = request.axes
    if asked.search is not None:
        axes = tuple(axis for axis in axes if axis.key in METHODS)
    variants = make_variants(loader, combinations(request.runs, axes))
    given = asked.seeds if asked.seeds is not None else section.seeds
    fixed_seed = any(text.startswith("seed=") for text in request.fixed)
    if given is not None and fixed_seed:
        raise UsageError("seed", base.seed, "is given by --seeds too")
    seeds = parse_seeds(given) if given is not None else protocol_seeds(base) if not fixed_seed else [base.seed]
    return Prepared(name, root, loader, request, variants, seeds, base)


def protocol_seeds(base: Config) -> list[int]:
    """The seeds that a followed protocol asks for, else the one of the settings."""
    from ..settings import protocols

    found = protocols.find(base.protocol.name) if base.protocol.name else None
    return list(found.card.seeds) if found is not None and found.card is not None else [base.seed]
