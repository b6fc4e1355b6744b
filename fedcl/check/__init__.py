"""Conformance tests of a plugin: does it do what the engine relies on, and what a paper's reader would expect?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..strategy import Strategy
from .behaviour import (
    Observed,
    check_choices,
    check_inputs,
    check_neutral,
    check_nodes,
    check_random,
    check_repeat,
    check_resume,
    check_runs,
    check_self,
    check_share,
    check_stacked,
    check_state,
    check_uploads,
)
from .declared import check_card, check_hooks, check_options
from .edges import EDGES, edge_check
from .lab import Lab
from .results import Report, Result, outcome, silence

__all__ = ["NAMES", "Report", "Result", "check_strategy"]


def check_strategy(
    cls: type[Strategy],
    settings: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
    tell: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Tries a strategy on tiny streams of noise, in less than a minute.

    Args:
        cls: the strategy; it need not be registered.
        settings: by dotted key, where the usual ones of the checks do not fit.
        only: names of the checks to be made, of :data:`NAMES`; empty: all.
        tell: told of each check when it is done.

    Raises:
        UsageError: no such check.

    >>> from fedcl.strategy import Strategy
    >>> class Nameless(Strategy):
    ...     "A strategy without a name."
    >>> report = check_strategy(Nameless)
    >>> report.ok, report.failed[0].name
    (False, 'card')
    """
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise UsageError("--only", unknown[0], f"must be one of {', '.join(NAMES)}", NAMES)
    started = time.monotonic()
    results: list[Result] = []

    def good(checks: Mapping[str, Callable[[], str]]) -> bool:
        first = len(results)
        for name, check in checks.items():
            if not only or name in only:
                results.append(outcome(name, check))
                tell(results[-1])
        return all(result.outcome != "fail" for result in results[first:])

    # A class without a name cannot be run, nor can one whose options cannot be made.
    if good({name: partial(check, cls) for name, check in DECLARED.items()}) or (cls.name and makeable(cls)):
        with tempfile.TemporaryDirectory(prefix="fedcl-check-") as place, silence():
            lab = Lab(cls, {**cls.tried_with, **(settings or {})}, Path(place))
            seen = Observed(lab)
            if good({"runs": partial(check_runs, seen)}):
                good({name: partial(check, seen) for name, check in BEHAVIOUR.items()})
                good({edge.name: partial(edge_check(edge), lab) for edge in EDGES})
    return Report(cls.name, f"{cls.__module__}:{cls.__qualname__}", tuple(results), time.monotonic() - started)


def makeable(cls: type[Strategy]) -> bool:
    """Whether a strategy can be made without options."""
    try:
        cls(cls.Options())
    except Exception:
        return False
    return True


DECLARED: dict[str, Callable[[type[Strategy]], str]] = {
    "card": check_card,
    "options": check_options,
    "hooks": check_hooks,
}
BEHAVIOUR: dict[str, Callable[[Observed], str]] = {
    "share": check_share,
    "uploads": check_uploads,
    "state": check_state,
    "inputs": check_inputs,
    "self": check_self,
    "random": check_random,
    "repeat": check_repeat,
    "resume": check_resume,
    "two nodes": check_nodes,
    "stacked": check_stacked,
    "neutral": check_neutral,
    "choices": check_choices,
}
NAMES = (*DECLARED, "runs", *BEHAVIOUR, *(edge.name for edge in EDGES))
"""All checks of a strategy in their order."""
