"""What a sweep varies: ``key=a,b`` texts and a file's ``sweep`` section, as combinations of settings."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import Config, parse_options
from ..errors import UsageError
from ..records.runs import flat
from ..settings.merging import pair

Settings = dict[str, Any]

VARIES = "varies"
"""``key=varies`` stands for the values that the followed protocol's source compares."""

MOST_SEEDS = 10_000
_OWN_KEYS = {"seed": "--seeds", "name": "one name", "output.dir": "--out DIR"}
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_OPENING, _CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes in turn."""

    key: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if self.key in _OWN_KEYS:
            allowed = f"cannot be varied like other keys: use {_OWN_KEYS[self.key]}"
            raise UsageError(self.key, list(self.values), allowed)
        for earlier, value in itertools.combinations(self.values, 2):
            if same(earlier, value):
                raise UsageError(self.key, value, "is given twice")


@dataclass(frozen=True)
class Range:
    """A key and the interval that a search may take its value from, both ends included.

    Attributes:
        log: whether equal factors, not equal differences, are equally likely.
        whole: whether only whole numbers are meant.
    """

    key: str
    low: float
    high: float
    log: bool
    whole: bool

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UsageError(self.key, f"{self.low:g}..{self.high:g}", "must rise, as in 0.01..0.5")
        if self.log and self.low <= 0:
            raise UsageError(self.key, f"{self.low:g}..{self.high:g}:log", "must start above 0 with :log")


@dataclass(frozen=True)
class Section:
    """The ``sweep`` section of a YAML file.

    Attributes:
        seeds: as after ``--seeds``, or a list of numbers.
        grid: dotted key -> the values that it takes in turn.
        runs: variants with settings of their own, and a ``name`` where wanted; each is crossed with the grid.
    """

    seeds: str | int | list[int] | None = None
    grid: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What is asked for, as written.

    Attributes:
        fixed: ``key=value`` texts that hold for all runs.
        axes: keys with several values.
        ranges: keys with an interval, for a search.
        runs: settings by dotted key, of the variants that a file lists; [{}] without any.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    ranges: tuple[Range, ...]
    runs: tuple[Settings, ...]


@dataclass(frozen=True)
class Combination:
    """Settings of one variant by dotted key, and where it has a name of its own what it is called by."""

    settings: Settings
    called: Settings | None = None


def same(a: Any, b: Any) -> bool:
    """Whether two values are written alike: True is not 1.

    >>> same(0.1, 0.10), same(1, True), same([1], [1.0])
    (True, False, False)
    """
    return json.dumps(a, sort_keys=True, default=str) == json.dumps(b, sort_keys=True, default=str)


def alternatives(key: str, text: str) -> list[str]:
    """The texts between commas that are in no bracket and no quotes.

    >>> alternatives("strategy", "finetune,[fedlwf,supcon]"), alternatives("partition.test", "holdout(0.2)")
    (['finetune', '[fedlwf,supcon]'], ['holdout(0.2)'])

    Raises:
        UsageError: nothing between two commas, or a bracket or quote that is not closed.
    """
    parts, open_, quote = [""], "", ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and (parts[-1].strip() or "(")[-1] in "[{(,:":
            quote = sign
        elif sign in _OPENING:
            open_ += sign
        elif sign in _CLOSING:
            if not open_.endswith(_OPENING[_CLOSING.index(sign)]):
                raise UsageError(key, text, f"has a {sign} that nothing opens")
            open_ = open_[:-1]
        elif sign == "," and not open_:
            parts.append("")
            continue
        parts[-1] += sign
    if open_ or quote:
        raise UsageError(key, text, f"has a {quote or open_[-1]} that is not closed")
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise UsageError(key, text, "has nothing between two commas; write null for none and [] for an empty list")
    return [part.strip() for part in parts]


def parse_seeds(given: str | int | Sequence[int]) -> list[int]:
    """Seeds from ``0-4``, ``0,2,7``, ``0-2,9`` or a list, in the order given.

    >>> parse_seeds("0-2,9"), parse_seeds([3])
    ([0, 1, 2, 9], [3])

    Raises:
        UsageError: something else, an empty interval, or a seed twice.
    """
    allowed = "must be whole numbers of at least 0, as in 0-4 or 0,2,7"
    text = str(given) if isinstance(given, str | int) else ",".join(map(str, given))
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part.strip(), re.ASCII)
        if match is None:
            raise UsageError("--seeds", text, allowed)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError("--seeds", text, f"{part} is empty: the last seed comes before the first")
        if last - first >= MOST_SEEDS:
            raise UsageError("--seeds", text, f"must be at most {MOST_SEEDS} seeds")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError("--seeds", text, "names a seed twice")
    return seeds


def parse_request(overrides: Sequence[str], section: Section) -> Request:
    """Sorts what a command line and a file say into what is fixed, listed and searched.

    A key on the command line replaces the same key of the file's grid.

    Raises:
        UsageError: a text that is no ``key=value``, a value of no sense, or a key that is given in two ways.
    """
    fixed: list[str] = []
    axes: dict[str, Axis] = {key: _axis(key, values) for key, values in section.grid.items()}
    ranges: list[Range] = []
    given: set[str] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            pair(Config, text)  # says what an override looks like
        if key in given:
            raise UsageError(key, value, "is given twice")
        given.add(key)
        axes.pop(key, None)
        parts = alternatives(key, value)
        interval = _RANGE.fullmatch(value.strip())
        if interval is not None:
            whole = not re.search(r"[.eE]", interval[1] + interval[2])
            ranges.append(Range(key, float(interval[1]), float(interval[2]), interval[3] is not None, whole))
        elif len(parts) > 1 or value == VARIES:
            axes[key] = Axis(key, tuple(pair(Config, f"{key}={part}")[1] for part in parts))
        else:
            fixed.append(text)
    runs = [_run_settings(run, number) for number, run in enumerate(section.runs)]
    for key in (*given, *section.grid):
        if any(key in run for run in runs):
            raise UsageError(key, "...", "is set by an entry of sweep.runs too")
    return Request(tuple(fixed), tuple(axes.values()), tuple(ranges), tuple(runs) or ({},))


def parse_section(values: Any) -> Section:
    """The ``sweep`` section of a file.

    Raises:
        UsageError: an unknown key, or a value of another type.
    """
    return parse_options(Section, values, "sweep")


def combinations(runs: Sequence[Settings], axes: Sequence[Axis]) -> list[Combination]:
    """Each listed variant with each combination of the axes' values; the last axis changes fastest.

    >>> [c.settings for c in combinations([{}], [Axis("a", (1, 2)), Axis("b", (3,))])]
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    found = []
    for run, values in itertools.product(runs, itertools.product(*(axis.values for axis in axes))):
        chosen = dict(zip((axis.key for axis in axes), values, strict=True))
        own = {key: value for key, value in run.items() if key != "name"}
        found.append(Combination({**own, **chosen}, {"name": run["name"], **chosen} if "name" in run else None))
    return found


def _axis(key: str, values: Any) -> Axis:
    if values == VARIES:
        return Axis(key, (VARIES,))
    if not isinstance(values, list) or not values:
        raise UsageError(f"sweep.grid.{key}", values, "must be a list of the values that the key takes in turn")
    return Axis(key, tuple(values))


def _run_settings(run: Settings, number: int) -> Settings:
    for key in ("seed", "output", "output.dir"):
        if key in run:
            allowed = f"cannot be set for one variant: use {_OWN_KEYS.get(key, '--out DIR')}"
            raise UsageError(f"sweep.runs[{number}].{key}", run[key], allowed)
    nested = {key: value for key, value in run.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in run.items() if key not in nested}
    both = plain.keys() & flat(nested).keys()
    if both:
        raise UsageError(f"sweep.runs[{number}].{min(both)}", plain[min(both)], "is given twice")
    return {**plain, **flat(nested)}
