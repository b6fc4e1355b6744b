"""Writes the reference pages of ``docs/`` from cards and protocol files: ``python -m fedcl.experiments.reference``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcl import registry
from fedcl.cards import card_object
from fedcl.settings import presets, protocols

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITTEN = "*Written by `python -m fedcl.experiments.reference`; edit {}, not this page.*"
FAMILIES = {
    "federated": "Federated optimisation and aggregation",
    "continual": "Continual learning",
    "prototype": "Prototypes",
    "contrastive": "Contrastive and self-supervised",
    "calibration": "Calibration",
    "bound": "Bounds: no methods, but what a method could reach",
}
"""In the order of the page; a family that is not here follows under its own name."""


def pages() -> dict[str, str]:
    """File name -> text of every page that is written from cards."""
    return {
        "reference-strategies.md": _ended(_strategies()),
        "reference-scenarios.md": _ended(_scenarios()),
        "reference-protocols.md": _ended(_protocols()),
    }


def builtin(kind: registry.Kind) -> list[dict[str, Any]]:
    """The cards of what comes with fedcl, by name; plugins that are installed beside it are not of it."""
    classes = [registry.load(kind, name, kind) for name in registry.names(kind)]
    return [card_object(cls) for cls in classes if cls.__module__.startswith("fedcl.")]


def _strategies() -> Iterator[str]:
    cards = builtin("strategies")
    yield "# Strategies\n"
    yield WRITTEN.format("the cards in `strategies/`")
    yield (
        "\nStrategies stack: `strategy=[fedlwf,supcon]`. `fedcl show NAME` prints the same card with the paper's "
        "BibTeX, `options.NAME.KEY=VALUE` sets an option. What each adds over its ablation is measured in "
        "[effects.md](../experiments/results/effects.md). *Certainty* says which parts were read in the paper or in "
        "released code, and which were not.\n"
    )
    families = list(dict.fromkeys([*FAMILIES, *(card["family"] for card in cards)]))
    grouped = {family: [card for card in cards if card["family"] == family] for family in families}
    grouped = {family: found for family, found in grouped.items() if found}
    for family, found in grouped.items():
        yield f"**{FAMILIES.get(family, family)}**\n"
        rows = [(f"[`{card['name']}`](#{card['name']})", card["summary"]) for card in found]
        yield from _table(("name", "in one line"), rows)
    for found in grouped.values():
        for card in found:
            yield from _strategy(card)


def _strategy(card: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {card['name']}\n"
    yield _sentence(card["summary"]) + _also(card) + "\n"
    yield from _facts(
        card,
        ("paper", "certainty", "deviations", "notes", "cost", "client_state", "server_state", "common_clock"),
        {"client_state": "client keeps", "server_state": "server keeps", "common_clock": "needs one common clock"},
    )
    if card["options"]:
        rows = [
            (f"`{row['name']}`", row["type"], _value(row["default"]), row["description"]) for row in card["options"]
        ]
        yield from _table(("option", "type", "default", "what it does"), rows)
    if card["leaves_client"]:
        yield "Leaves a client beside the shared model:\n"
        rows = [(f"`{r['name']}`", r["shape"], r["reduction"], r["when"]) for r in card["leaves_client"]]
        yield from _table(("array", "shape", "joined by", "when"), rows)


def _scenarios() -> Iterator[str]:
    yield "# Scenarios and partitions\n"
    yield WRITTEN.format("the cards in `scenarios/`")
    yield (
        "\nA scenario (`scenario.name`) turns a data set into a stream of tasks, a partition (`partition.name`) deals "
        "each task's training images to the clients. [scenarios.md](scenarios.md) compares them and says what else "
        "changes a stream; the default of every key is in [`fedcl/settings/schema.py`](../fedcl/settings/schema.py).\n"
    )
    sections: tuple[tuple[str, registry.Kind], ...] = (("Scenarios", "scenarios"), ("Partitions", "partitions"))
    for title, kind in sections:
        cards = builtin(kind)
        yield f"## {title}\n"
        yield from _table(
            ("name", "in one line"),
            [(f"[`{card['name']}`](#{_anchor(card, kind)})", card["summary"]) for card in cards],
        )
        for card in cards:
            yield f"### {_heading(card, kind)}\n"
            yield _sentence(card["summary"]) + _also(card) + "\n"
            yield from _facts(card, ("paper", "certainty", "deviations", "notes"), {})


def _heading(card: Mapping[str, Any], kind: str) -> str:
    return str(card["name"]) + (" (partition)" if kind == "partitions" else "")


def _anchor(card: Mapping[str, Any], kind: str) -> str:
    return str(card["name"]) + ("-partition" if kind == "partitions" else "")


def _protocols() -> Iterator[str]:
    found = [protocol for p in presets.presets(kind="protocols") if (protocol := protocols.find(p.name)) is not None]
    twins = {protocol.name for protocol in found if protocol.card and protocol.card.cut}
    yield "# Reproducing published protocols\n"
    yield WRITTEN.format("the files in `experiments/protocols/`")
    yield (
        "\nWhat a protocol is, and how to write one: [protocols.md](protocols.md). The command of the table runs the "
        "seeds that the source reports, with one method as an example: put others in its place, "
        "`strategy=finetune,fedlwf` for several. `--dry-run` says what would run. The data must be under "
        "`--data-root` ([data.md](data.md)). `-small` is the same setting cut to minutes on two cores, whose numbers "
        "are comparable among themselves only.\n"
    )
    rows = []
    for protocol in found:
        if protocol.name in twins:
            continue
        twin = f"`{protocol.name}-small`" if f"{protocol.name}-small" in twins else "none"
        command = f"`fedcl sweep protocol={protocol.name} strategy=finetune`"
        rows.append((f"[{protocol.name}](#{protocol.name})", command, _data(protocol), twin))
    yield from _table(("protocol", "command", "data", "twin"), rows)
    for protocol in found:
        if protocol.name not in twins:
            yield from _protocol(protocol, next((p for p in found if p.name == f"{protocol.name}-small"), None))


def _data(protocol: protocols.Protocol) -> str:
    config = protocol.config
    return ", ".join(f"`{name}`" for name in (config.data.name, *config.scenario.datasets))


def _protocol(protocol: protocols.Protocol, twin: protocols.Protocol | None) -> Iterator[str]:
    card = protocol.card
    yield f"## {protocol.name}\n"
    if card is None:
        yield _plain(protocol.summary) + "\n"
        return
    facts = {
        "paper": card.paper,
        "seeds": ", ".join(map(str, card.seeds)),
        "memory": card.buffer,
        "paper's metric": card.metric,
        "certain": card.certain,
        "guessed": card.guessed,
        "cannot be set": card.missing or "nothing that is known of",
        "the source compares": "; ".join(
            f"`{key}` {', '.join(map(_value, values))}" for key, values in card.varies.items()
        ),
        "cut in the twin": twin.card.cut if twin and twin.card else "",
    }
    yield _sentence(card.title) + "\n"
    yield from (f"- **{name}:** {_plain(text)}" for name, text in facts.items() if text)
    yield ""
    for table in card.tables:
        yield f"Published, {_plain(table.source)} ({_plain(table.unit)}):\n"
        numbers = [(method, *("-" if n is None else str(n) for n in row)) for method, row in table.rows.items()]
        yield from _table(("method", *table.columns), numbers)


def _facts(card: Mapping[str, Any], keys: Sequence[str], names: Mapping[str, str]) -> Iterator[str]:
    said = [(names.get(key, key), card[key]) for key in keys if card[key] and card[key] != "none"]
    yield from (f"- **{name}:** {_plain(text)}" for name, text in said)
    if said:
        yield ""


def _also(card: Mapping[str, Any]) -> str:
    return f" Also called {', '.join(f'`{alias}`' for alias in card['aliases'])}." if card["aliases"] else ""


def _sentence(text: str) -> str:
    return _plain(text[:1].upper() + text[1:]).rstrip(".") + "."


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(_cell, columns))} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(map(_cell, row))} |" for row in rows)
    yield ""


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """A card's text as Markdown that shows it as it is; what is in backquotes stays code.

    >>> _plain("at  <b> * 2, `a<b`")
    'at &lt;b> \\\\* 2, `a<b`'
    """
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;").replace("*", "\\*") for p in parts)


def _ended(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fedcl.experiments.reference", description=__doc__)
    parser.add_argument("--dir", type=Path, default=DOCS, help="where to (default: docs of the checkout)")
    folder: Path = parser.parse_args().dir
    if not folder.is_dir():
        parser.error(f"--dir: there is no folder {folder}")
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
