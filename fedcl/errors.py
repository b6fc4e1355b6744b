"""Errors that a user can act on: one line each, with the exit code the command line returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedclError(Exception):
    """Base of all errors that are shown as one line, without a traceback."""

    exit_code = 1


class RunFailed(FedclError):
    """The run could not go on. The first cause is the message."""


class UsageError(FedclError):
    """Wrong use or wrong configuration: names the key, its value and what is allowed.

    Args:
        key: dotted name of what is wrong, for example ``federation.clients``.
        value: the value that was given.
        allowed: what may stand there, in words.
        names: valid names; the nearest one to ``value`` is suggested.
    """

    exit_code = 2

    def __init__(self, key: str, value: object, allowed: str, names: Iterable[str] = ()) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        close = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.6)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        end = "" if allowed.endswith("?") else "."
        super().__init__(f"{key}={value!r}: {allowed.rstrip('.')}{end}{hint}")


class Stopped(FedclError):
    """A callback asked to stop; a checkpoint was saved."""

    exit_code = 0


class Interrupted(FedclError):
    """The user asked to stop; a checkpoint was saved."""

    exit_code = 130
