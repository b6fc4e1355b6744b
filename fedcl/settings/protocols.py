"""Protocols: the settings of a published comparison, with a card that says where they come from.

A protocol is a YAML file of settings with a section ``card`` (:class:`ProtocolCard`). Every setting in it is *fixed*,
but for those that a user of any protocol chooses (:data:`FREE`). A run that changes a fixed one goes on, and says so:
``NAME (modified: KEYS)``. Options that a protocol gives to a strategy count where the strategy is in the stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .values import parse_options

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from ..config import Config
    from .presets import Layer

FREE = (
    "name", "seed", "strategy", "options", "engine", "output", "evaluate", "checkpoint", "init", "plugins", "protocol",
    "data.root", "data.download", "data.memory_map",
)  # fmt: skip
"""Sections and keys that no protocol fixes."""


@dataclass(frozen=True)
class Table:
    """Published numbers.

    Attributes:
        source: whose table, and how sure it is.
        unit: what the numbers are.
        columns: what each number of a row belongs to.
        rows: method -> one number or text a column; null where the source has none.
    """

    source: str
    unit: str
    columns: list[str]
    rows: dict[str, list[Any]]

    def __post_init__(self) -> None:
        for method, numbers in self.rows.items():
            if len(numbers) != len(self.columns):
                raise ValueError(f"row {method} has {len(numbers)} numbers for {len(self.columns)} columns")


@dataclass(frozen=True)
class ProtocolCard:
    """What the settings of a protocol cannot say.

    Attributes:
        title: what it is, in one line.
        paper: whose protocol.
        metric: which number of ``summary.json`` stands for the paper's.
        certain: which settings are certain, and from where.
        guessed: which are not said by the source, and what was taken.
        seeds: to run, for a mean and a deviation.
        buffer: memory that methods may use, in words; as settings under ``options`` where a strategy has it.
        missing: what of the source's protocol cannot be set.
        cut: of a scaled-down twin, what was cut; its numbers are not the paper's.
        varies: dotted key -> values that the source itself compares: choosing one modifies nothing.
        numbers: published results.
    """

    title: str
    paper: str
    metric: str
    certain: str
    guessed: str
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    buffer: str = "none"
    missing: str = ""
    cut: str = ""
    varies: dict[str, Any] = field(default_factory=dict)
    numbers: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, values in self.varies.items():
            if not isinstance(values, list):
                raise ValueError(f"varies.{key} must be a list of values")

    @property
    def tables(self) -> list[Table]:
        """The published numbers as tables."""
        return [parse_options(Table, table, f"card.numbers[{i}]") for i, table in enumerate(self.numbers)]


def parse_card(given: Any, where: str) -> ProtocolCard:
    """The card of a protocol file.

    Raises:
        UsageError: an unknown or missing key, or a value of another type; the file is named.
    """
    try:
        card = parse_options(ProtocolCard, given, "card")
        _ = card.tables
    except UsageError as error:
        error.args = (f"{str(error).rstrip('.')} (in {where}).",)
        raise
    return card


def merged(schema: type[Config], stack: Sequence[Layer]) -> Config:
    """The settings that the layers give, and the record of the protocol they follow.

    A run of a protocol is named after it and its strategies where no other layer names it.

    Raises:
        UsageError: two protocols, a key of ``varies`` that there is not, or wrong settings.
    """
    from .merging import merge

    names = list(dict.fromkeys(layer.protocol for layer in stack if layer.protocol))
    if not names:
        return merge(schema, stack)
    if len(names) > 1:
        raise UsageError("protocol", names[1], f"is the second protocol: {names[0]} is followed already")
    strategies = merge(schema, [_offering(layer, None) for layer in stack]).strategy
    config = merge(schema, [_offering(layer, strategies) for layer in stack])
    own = [_offering(layer, strategies) for layer in stack if layer.protocol]
    card = next((layer.card for layer in reversed(own) if layer.card), None)
    alone = _flat(asdict(merge(schema, own)))
    given = dict.fromkeys(key for layer in own for key in _keys(layer.values, ""))
    fixed = {key: alone[key] for key in given if key in alone and not _is_free(key)}
    varies = dict(card.varies) if card else {}
    known = {key for layer in stack if layer.protocol for key in _keys(layer.values, "")}
    for key in varies:
        if key not in known:
            raise UsageError(f"card.varies.{key}", varies[key], f"must be a setting that protocol {names[0]} fixes")
    config.protocol = replace(config.protocol, name=names[0], fixed=fixed, varies=varies)
    if not any("name" in layer.values for layer in stack if not layer.protocol):
        config.name = "-".join([names[0], *config.strategy])
    return config


def label(config: Config) -> str | None:
    """The protocol that settings follow, with what was chosen and what was changed; None without one.

    >>> from fedcl.config import Config, Protocol
    >>> label(Config(protocol=Protocol("p", {"federation.rounds": 9, "seed": 1}, {"seed": [0]})))
    'p (seed=0; modified: federation.rounds)'
    """
    protocol = config.protocol
    if not protocol.name:
        return None
    flat = _flat(asdict(config))
    other = {key: flat.get(key) for key, value in protocol.fixed.items() if flat.get(key) != value}
    chosen = [f"{key}={value}" for key, value in other.items() if value in protocol.varies.get(key, [])]
    modified = [key for key, value in other.items() if value not in protocol.varies.get(key, [])]
    parts = [", ".join(chosen)] * bool(chosen) + [f"modified: {', '.join(modified)}"] * bool(modified)
    return protocol.name + (f" ({'; '.join(parts)})" if parts else "")


def _offering(layer: Layer, strategies: list[str] | None) -> Layer:
    """The layer, of a protocol only with the options of strategies in the stack, or with none."""
    options = layer.values.get("options")
    if not layer.protocol or not isinstance(options, Mapping):
        return layer
    from .. import registry

    kept = {name: given for name, given in options.items() if strategies and registry.in_stack(name, strategies)}
    return replace(layer, values={**layer.values, "options": kept})


def _keys(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value, f"{key}.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != "scenario.arguments":
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_free(key: str) -> bool:
    if key.startswith("options."):
        return False
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


@dataclass(frozen=True)
class Protocol:
    """A protocol to look at.

    Attributes:
        name: as in ``protocol=NAME``.
        summary: the first comment of its file.
        card: None where the file has none.
        config: its settings, over the defaults.
    """

    name: str
    summary: str
    card: ProtocolCard | None
    config: Config

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        settings = dict(self.config.protocol.fixed)
        card = asdict(self.card) if self.card else None
        return {"name": self.name, "summary": self.summary, "settings": settings, "card": card}


def find(name: str, search: Sequence[Path] = ()) -> Protocol | None:
    """The protocol of that name, or None.

    Raises:
        UsageError: its file is wrong.
    """
    from ..config import load_config
    from . import presets

    preset = next((p for p in presets.presets(search, "protocols") if p.name == name), None)
    if preset is None:
        return None
    values = presets.read(preset.path)
    card = parse_card(values["card"], str(preset.path)) if "card" in values else None
    return Protocol(name, preset.summary, card, load_config({}, [("protocol", name)], search=search))


def render(protocol: Protocol) -> RenderableType:
    """The protocol for a terminal; its texts are shown as they are, never read as markup."""
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    facts = Grid(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in (*_setting_rows(protocol.config), *_card_rows(protocol.card)):
        facts.add_row(Text(key), Text(" ".join(value.split())))
    title = protocol.card.title if protocol.card else protocol.summary
    parts: list[RenderableType] = [Text(protocol.name, style="bold"), Text(title), Text(""), facts]
    for table in protocol.card.tables if protocol.card else []:
        grid = Grid(box=None, pad_edge=False, header_style="italic")
        for column in ("method", *table.columns):
            grid.add_column(column, overflow="fold")
        for method, numbers in table.rows.items():
            grid.add_row(Text(method), *(Text("-" if n is None else str(n)) for n in numbers))
        parts += [Text(""), Text(f"{table.source}: {table.unit}", style="bold"), grid]
    parts += [Text(""), Text(f"fedcl run protocol={protocol.name} strategy=NAME --seed N")]
    return Group(*parts)


def _setting_rows(config: Config) -> Iterator[tuple[str, str]]:
    sections: dict[str, list[str]] = {}
    for key, value in config.protocol.fixed.items():
        section, _, name = key.partition(".")
        shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
        also = [str(v) for v in config.protocol.varies.get(key, []) if v != value]
        text = f"{name} {shown}" + (f" (also {', '.join(also)})" if also else "")
        sections.setdefault(section, []).append(text.removeprefix("name "))
    for section, texts in sections.items():
        yield section, ", ".join(texts)


def _card_rows(card: ProtocolCard | None) -> Iterator[tuple[str, str]]:
    if card is None:
        return
    yield "seeds", ", ".join(map(str, card.seeds))
    for key in ("buffer", "metric", "paper", "certain", "guessed", "missing", "cut"):
        if text := getattr(card, key):
            yield key, text
