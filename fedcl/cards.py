"""Cards of strategies, scenarios and partitions: sources, options, what leaves a client."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType


class Leaves(NamedTuple):
    """One array that a client uploads.

    Attributes:
        name: as in the strategy's ``reductions``.
        shape: in words, for example ``(classes, features)``.
        reduction: how the server joins the clients' arrays, for example ``sum``.
        when: ``round``, ``task`` or in words.
    """

    name: str
    shape: str
    reduction: str
    when: str


@dataclass(frozen=True)
class Card:
    """What a researcher must know before using a method.

    Attributes:
        title: of the paper, or what it is when there is none.
        authors, venue, year, bibtex: of the paper; empty when there is none.
        certainty: which parts of the specification are certain and which are not.
        leaves_client: every array that leaves a client beside the shared model.
        client_state, server_state: what each side keeps between rounds, in words.
        cost: computation and communication beside plain federated averaging.
        notes: what a user should watch.
        deviations: where this implementation differs from the paper on purpose.
    """

    title: str
    authors: str = ""
    venue: str = ""
    year: int | None = None
    bibtex: str = ""
    certainty: str = ""
    leaves_client: tuple[Leaves | tuple[str, str, str, str], ...] = ()
    client_state: str = "none"
    server_state: str = "none"
    cost: str = "none"
    notes: str = ""
    deviations: str = ""

    def __post_init__(self) -> None:
        rows = tuple(row if isinstance(row, Leaves) else Leaves(*row) for row in self.leaves_client)
        object.__setattr__(self, "leaves_client", rows)

    @property
    def paper(self) -> str:
        """The reference in one line.

        >>> Card("Learning without Forgetting", "Li and Hoiem", "ECCV", 2016).paper
        'Li and Hoiem: Learning without Forgetting. ECCV 2016'
        """
        place = " ".join(str(part) for part in (self.venue, self.year) if part)
        return (f"{self.authors}: " if self.authors else "") + self.title + (f". {place}" if place else "")


class OptionRow(NamedTuple):
    """One option of a strategy, as text."""

    name: str
    type: str
    default: Any
    description: str


def option(default: Any, help: str, *, unit: str = "") -> Any:
    """A field of an ``Options`` dataclass with its description.

    Args:
        default: as published; lists are given as tuples.
        help: one line, what it does and which symbol of the paper it is.
        unit: for example ``bytes``.

    >>> @dataclass(frozen=True)
    ... class Options:
    ...     weight: float = option(1.0, "lambda of equation 3")
    >>> options_of(Options)
    [OptionRow(name='weight', type='float', default=1.0, description='lambda of equation 3')]
    """
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit})


def options_of(cls: type | None) -> list[OptionRow]:
    """The options of an ``Options`` dataclass in the order of its fields; empty when there is none."""
    if cls is None or not dataclasses.is_dataclass(cls):
        return []
    hints = typing.get_type_hints(cls)
    rows = []
    for item in dataclasses.fields(cls):
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        unit = item.metadata.get("unit")
        text = item.metadata.get("help", "") + (f" [{unit}]" if unit else "")
        shown = None if default is dataclasses.MISSING else default
        rows.append(OptionRow(item.name, type_text(hints[item.name]), shown, text))
    return rows


def type_text(hint: Any) -> str:
    """A type as users read it.

    >>> type_text(Literal["mean", "sum"]), type_text(float | None), type_text(tuple[int, ...])
    ('mean | sum', 'float | null', 'list of int')
    """
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return " | ".join("null" if value is None else str(value) for value in arguments)
    if origin in (tuple, list):
        inner = [type_text(value) for value in arguments if value is not Ellipsis]
        same = len(set(inner)) == 1 and (origin is list or Ellipsis in arguments)
        return f"list of {inner[0]}" if same else f"list ({', '.join(inner)})"
    if arguments and origin is not dict:
        return " | ".join(type_text(value) for value in arguments)
    return getattr(hint, "__name__", str(hint))


def summary_of(cls: type) -> str:
    """The first line of a class's own docstring, or ''."""
    text = (getattr(cls, "summary", "") or cls.__dict__.get("__doc__") or "").strip()
    return str(text).split("\n")[0].strip()


def card_object(cls: type[Any]) -> dict[str, Any]:
    """The card of a strategy, scenario or partition class as one JSON object."""
    card: Card = getattr(cls, "card", None) or Card("")
    return {
        "name": cls.name,
        "aliases": list(getattr(cls, "aliases", ())),
        "family": getattr(cls, "family", ""),
        "summary": summary_of(cls),
        "paper": card.paper or getattr(cls, "paper", ""),
        "bibtex": _dedent(card.bibtex),
        "options": [_plain(row._asdict()) for row in options_of(getattr(cls, "Options", None))],
        "leaves_client": [Leaves(*row)._asdict() for row in card.leaves_client],
        "client_state": card.client_state,
        "server_state": card.server_state,
        "cost": card.cost,
        "common_clock": getattr(cls, "common_clock", ""),
        "certainty": card.certainty,
        "notes": card.notes or getattr(cls, "notes", ""),
        "deviations": card.deviations,
    }


def render_card(cls: type[Any]) -> RenderableType:
    """The card for a terminal. Texts of the card are shown as they are, never read as markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from .strategy import Strategy
    from .stream import Scenario

    data = card_object(cls)
    aliases = f" (also {', '.join(data['aliases'])})" if data["aliases"] else ""
    of_strategy = issubclass(cls, Strategy)
    kind = "strategy" if of_strategy else "scenario" if issubclass(cls, Scenario) else "partition"
    title = Text(f"{kind} {data['name']}{aliases}", style="bold")
    parts: list[RenderableType] = [title]
    if data["summary"]:
        parts.append(Text(data["summary"]))
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in _facts(data):
        if of_strategy or value != "none":
            facts.add_row(Text(key), Text(value))
    parts += [Text(""), facts]
    if of_strategy:
        parts += [Text(""), Text("Options", style="bold")]
        prefix = f"options.{data['name']}."
        parts.append(_table(("key", "type", "default", "what it does"), _option_rows(data, prefix), "none"))
        parts += [Text(""), Text("Leaves a client, beside the shared model", style="bold")]
        rows = [list(row.values()) for row in data["leaves_client"]]
        parts.append(_table(("name", "shape", "reduced by", "when"), rows, "nothing"))
    if data["bibtex"]:
        parts += [Text(""), Text(data["bibtex"])]
    return Group(*parts)


def _facts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    labels = {"client_state": "client state", "server_state": "server state", "common_clock": "needs time.order=common"}
    for key in (
        "family",
        "paper",
        "client_state",
        "server_state",
        "cost",
        "common_clock",
        "certainty",
        "deviations",
        "notes",
    ):
        if data[key]:
            yield labels.get(key, key), re.sub(r"\s+", " ", data[key]).strip()


def _option_rows(data: dict[str, Any], prefix: str) -> list[list[str]]:
    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return "null" if value is None else str(value)

    return [[prefix + row["name"], row["type"], shown(row["default"]), row["description"]] for row in data["options"]]


def _table(columns: tuple[str, ...], rows: list[list[str]], empty: str) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return Text(empty)
    table = Table(box=None, pad_edge=False, header_style="italic")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _dedent(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    inner = (line if line.startswith(("@", "}")) else f"  {line}" for line in lines)
    return "\n".join(inner) if lines else ""
