"""Which options of Flower's strategies are the user's to set, and in which range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from fedcl.errors import UsageError

# The adapter sets these itself, or they do nothing on the server (eta_l is only logged).
_RESERVED: Final = frozenset(
    {
        "fraction_train",
        "fraction_evaluate",
        "min_train_nodes",
        "min_evaluate_nodes",
        "min_available_nodes",
        "weighted_by_key",
        "train_loss_key",
        "arrayrecord_key",
        "configrecord_key",
        "train_metrics_aggr_fn",
        "evaluate_metrics_aggr_fn",
        "selection_rule",
        "eta_l",
        "strategy",
        "num_sampled_clients",
        "accountant",
    }
)
_ABOVE: Final = (lambda v: v > 0, "a number above 0")
_SHARE: Final = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
_RANGES: Final[Mapping[str, tuple[Callable[[float], bool], str]]] = {
    "eta": _ABOVE,
    "tau": _ABOVE,
    "beta_1": _SHARE,
    "beta_2": _SHARE,
    "server_learning_rate": _ABOVE,
    "server_momentum": _SHARE,
    "beta": (lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5"),
    "num_malicious_nodes": (lambda v: v >= 0, "a whole number, 0 or more"),
    "num_nodes_to_select": (lambda v: v >= 1, "a whole number, 1 or more"),
    "client_learning_rate": _ABOVE,
    # (1e-10)^q, which Flower divides by where all losses are 0, must stay a number.
    "q": (lambda v: 0 <= v <= 30, "a number from 0 to 30"),
    "proximal_mu": (lambda v: v >= 0, "a number, 0 or more"),
    "noise_multiplier": (lambda v: v >= 0, "a number, 0 or more"),
    "clipping_norm": _ABOVE,
}


def settable(strategy: type[Any]) -> dict[str, inspect.Parameter]:
    """The options of a strategy's constructor that are the user's to set."""
    return {
        name: parameter
        for name, parameter in inspect.signature(strategy.__init__).parameters.items()
        if name != "self"
        and name not in _RESERVED
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def checked(strategy: type[Any], options: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A copy of ``options`` that the constructor of ``strategy`` takes.

    Raises:
        UsageError: an unknown option, one that is missing, or a value out of range; named after ``prefix``.
    """
    known = settable(strategy)
    for name, value in options.items():
        if name not in known:
            allowed = f"{strategy.__name__} has the options {', '.join(known)}" if known else "it has no options"
            raise UsageError(prefix, name, allowed, known)
        default = known[name].default
        whole = isinstance(default, int) and not isinstance(default, bool)
        fits, text = _RANGES.get(name, (lambda v: True, "a whole number" if whole else "a number"))
        if whole or isinstance(default, float) or (default is inspect.Parameter.empty and name in _RANGES):
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and fits(value)):
                raise UsageError(f"{prefix}.{name}", value, text)
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise UsageError(f"{prefix}.{name}", None, f"{strategy.__name__} needs a value")
    return dict(options)
