"""What the checks found: one line a check, as text and as JSON."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import FedclError
from ..tell.quiet import quiet_libraries

Outcome = Literal["pass", "fail", "skip"]
_WORDS: dict[Outcome, str] = {"pass": "ok", "fail": "FAIL", "skip": "-"}


@dataclass(frozen=True)
class Result:
    """One check.

    Attributes:
        name: of the check.
        outcome: ``skip`` where the check does not apply.
        text: what was found; of a failed check also what to do.
    """

    name: str
    outcome: Outcome
    text: str

    def line(self) -> str:
        """The check for a terminal."""
        return f"  {_WORDS[self.outcome]:<4}  {self.name:<16}  {self.text}"


@dataclass(frozen=True)
class Report:
    """All checks of one class.

    Attributes:
        name: of the strategy, scenario or partition.
        target: module and class.
        results: in the order of the checks.
        seconds: all of them together.
    """

    name: str
    target: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> list[Result]:
        """The checks that failed."""
        return [result for result in self.results if result.outcome == "fail"]

    def as_object(self) -> dict[str, Any]:
        """The report as one JSON object."""
        checks = [{"name": r.name, "outcome": r.outcome, "text": r.text} for r in self.results]
        return {
            "name": self.name, "target": self.target, "ok": self.ok, "seconds": round(self.seconds, 1),
            "checks": checks,
        }  # fmt: skip

    def text(self) -> str:
        """The report for a terminal."""
        return "\n".join([*(result.line() for result in self.results), self.verdict()])

    def verdict(self) -> str:
        """How many checks ended in which way."""
        count = {kind: sum(r.outcome == kind for r in self.results) for kind in _WORDS}
        return (
            f"{self.name} ({self.target}): {count['pass']} passed, {count['fail']} failed, "
            f"{count['skip']} not applicable, {self.seconds:.0f} s"
        )


class Failed(Exception):
    """Raised by a check; the text says what is wrong and what to do, in one line."""


class NotApplicable(Exception):
    """Raised by a check; the text says why it does not apply."""


def outcome(name: str, check: Callable[[], str]) -> Result:
    """The result of one check; whatever it raises is a failure in one line."""
    try:
        return Result(name, "pass", check())
    except NotApplicable as reason:
        return Result(name, "skip", one_line(reason))
    except (Failed, FedclError) as error:
        return Result(name, "fail", one_line(error))
    except Exception as error:
        return Result(name, "fail", f"{type(error).__name__}: {one_line(error)}")


def one_line(error: Exception) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What libraries and fedcl say during many small runs is nothing for the user of the checks."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with quiet_libraries(lambda record: None):
            yield
    finally:
        logging.disable(before)
