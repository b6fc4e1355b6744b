"""``fedcl check``: the checks of a class, told one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import Config, load_config
from ..errors import UsageError
from ..settings.merging import pair
from . import check_strategy
from .lab import BASE
from .results import Report, Result
from .spread import check_spread
from .target import ALLOWED, find_target, kind_of


def check_target(target: str, overrides: Sequence[str], only: Sequence[str], tell: Callable[[Result], None]) -> Report:
    """Finds a class and checks it.

    Args:
        target: see :func:`fedcl.check.target.find_target`.
        overrides: ``key=value`` for the settings of the checks.
        only: names of checks; empty: all.
        tell: told of each check when it is done.

    Raises:
        UsageError: no class there, one that is no plugin, or wrong settings.
    """
    cls = find_target(target)
    kind = kind_of(cls)
    settings = dict(pair(Config, text) for text in overrides)
    if kind == "strategies":
        try:
            load_config({}, {**BASE, **cls.tried_with, **settings})
        except UsageError as error:
            # What the user gave wrong is no failure of the strategy.
            if error.key in settings:
                raise
        return check_strategy(cls, settings, only, tell)
    if kind is None:
        raise UsageError("TARGET", target, f"{cls.__name__} is no strategy, scenario or partition; {ALLOWED}")
    return check_spread(cls, kind, settings, only, tell)
