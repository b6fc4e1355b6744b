"""From the names in a configuration to classes and their options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import FedclError, RunFailed, UsageError
from .values import parse_options

if TYPE_CHECKING:
    from ..config import Config
    from ..partitioning import Partition
    from ..strategy import Strategy
    from ..stream import Scenario


@dataclass(frozen=True)
class Resolved:
    """What a configuration names.

    Attributes:
        strategies: instances with their options, in the order of the stack.
        scenario, partition: classes.
        plugins: the plugin files it uses.
    """

    strategies: tuple[Strategy, ...]
    scenario: type[Scenario]
    partition: type[Partition]
    plugins: tuple[registry.Plugin, ...]


def resolve(config: Config) -> Resolved:
    """Loads the plugins of a configuration, its classes, and checks all strategy options.

    Raises:
        UsageError: a plugin fails, a name does not exist, or an option is wrong.
        RunFailed: a strategy cannot be made.
    """
    plugins = tuple(registry.add_plugin(file) for file in config.plugins)
    scenario = registry.load("scenarios", config.scenario.name)
    partition = registry.load("partitions", config.partition.name)
    return Resolved(_strategies(config), scenario, partition, plugins)


def anchored(config: Config) -> Config:
    """The same settings with absolute paths, so that a run folder means the same from any working directory."""
    data, model, init = config.data, config.model, config.init
    if data.root is not None:
        data = replace(data, root=_absolute(data.root))
    # As images are looked for: below the root first, then from here.
    below = Path(data.root or "data") / data.name
    if Path(data.name).suffix == ".npz" and Path(data.name).is_file() and not below.exists():
        data = replace(data, name=_absolute(data.name))
    if model.checkpoint is not None:
        model = replace(model, checkpoint=_absolute(model.checkpoint))
    if init is not None:
        init = _absolute(init)
    return replace(config, data=data, model=model, init=init)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _strategies(config: Config) -> tuple[Strategy, ...]:
    classes: dict[str, type[Any]] = {}
    written: dict[str, str] = {}
    for name in config.strategy:
        cls = registry.load("strategies", name)
        if cls.name in classes:
            raise UsageError("strategy", config.strategy, f"{written[cls.name]} and {name} are the same strategy")
        classes[cls.name], written[cls.name] = cls, name
    given: dict[str, dict[str, Any]] = {}
    prefixes: dict[str, str] = {}
    for name, options in config.options.items():
        owner = next((c.name for c in classes.values() if name in (c.name, *c.aliases)), None)
        key = f"options.{name}"
        if owner is None:
            stack = ", ".join(config.strategy)
            allowed = f"{name} is not in the stack strategy=[{stack}]"
            near = difflib.get_close_matches(name, [*config.strategy], n=1, cutoff=0.5)
            hint = f"; did you mean 'options.{near[0]}'?" if near else ""
            raise UsageError(key, options, allowed + hint)
        if owner in given:
            raise UsageError(key, options, f"{prefixes[owner]} gives options to the same strategy")
        given[owner], prefixes[owner] = options, key
    return tuple(
        _made(cls, parse_options(cls.Options, given.get(name, {}), prefixes.get(name, f"options.{name}")))
        for name, cls in classes.items()
    )


def _made(cls: type[Any], options: Any) -> Strategy:
    try:
        strategy: Strategy = cls(options)
    except FedclError:
        raise
    except Exception as error:
        raise RunFailed(f"strategy {cls.name!r} failed in __init__: {type(error).__name__}: {error}") from error
    return strategy


def misspelt(strategies: Iterable[Strategy]) -> list[str]:
    """One line for each method of a strategy that nobody calls but that is named almost like a hook."""
    from ..strategy import Strategy as Base

    hooks = [n for n, v in vars(Base).items() if callable(v) and not n.startswith("_")]
    found = []
    for strategy in strategies:
        for name, value in vars(type(strategy)).items():
            if callable(value) and not name.startswith("_") and name not in hooks and name != "Options":
                found += [
                    f"strategy {strategy.name!r} has a method {name!r}, which is no hook: {near!r} is one"
                    for near in get_close_matches(name, hooks, n=1, cutoff=0.85)
                ]
    return found
