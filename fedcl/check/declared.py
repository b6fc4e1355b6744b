"""Checks of what a class says about itself; nothing is run."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

from ..cards import Card, summary_of
from ..federation.reduction import RULES
from ..settings.resolve import misspelt
from ..strategy import Strategy
from .results import Failed, NotApplicable
from .watch import HOOKS, methods_of

NAME = re.compile(r"[a-z][a-z0-9_]{0,49}")


def check_card(cls: type[Strategy]) -> str:
    """Name, docstring, paper, BibTeX and what leaves a client are on the card."""
    problems = list(card_problems(cls))
    if problems:
        raise Failed("; ".join(problems))
    card = cls.card
    assert card is not None
    return card.paper


def card_problems(cls: type[Strategy]) -> Iterator[str]:
    """What is missing on a card, each with what to do."""
    if not NAME.fullmatch(cls.name):
        yield f"name = {cls.name!r} must be lower case with underscores, as on the command line"
    if not summary_of(cls):
        yield "the class has no docstring; its first line is what `fedcl list strategies` shows"
    card = cls.card
    if not isinstance(card, Card):
        yield "card = None; give it a fedcl.cards.Card"
        return
    if not card.title.strip():
        yield "the card has no title"
    if cls.family != "bound":
        if not card.bibtex.strip().startswith("@"):
            yield "the card's bibtex must be an entry such as @inproceedings{...}"
        if not card.authors.strip() or not card.year:
            yield "the card has no authors or no year"
    if not card.certainty.strip():
        yield "the card's certainty must say what is sure about the specification and what is not"
    told = {row[0].rstrip("/"): row[2] for row in card.leaves_client}
    declared = {name.rstrip("/"): rule for name, rule in cls.reductions.items()}
    for name in sorted(declared.keys() - told.keys()):
        yield f"reductions has {name!r}, the card's leaves_client has not"
    for name in sorted(told.keys() - declared.keys()):
        if cls.model_reduction == "weighted_mean":
            yield f"the card's leaves_client has {name!r}, reductions has not"
    for name in sorted(told.keys() & declared.keys()):
        if told[name] != declared[name]:
            yield f"{name!r} is reduced by {declared[name]!r} in reductions and by {told[name]!r} on the card"


def check_options(cls: type[Strategy]) -> str:
    """Options is a frozen dataclass, each with a type, a default and a description."""
    options = cls.Options
    if not dataclasses.is_dataclass(options):
        raise Failed("Options must be declared as @dataclass(frozen=True)")
    parameters: Any = options
    if not parameters.__dataclass_params__.frozen:
        raise Failed("Options can be changed while it runs; declare it as @dataclass(frozen=True)")
    fields = dataclasses.fields(options)
    hints = typing.get_type_hints(options)
    for item in fields:
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise Failed(f"option {item.name!r} has no default; give it the published one")
        if not item.metadata.get("help"):
            raise Failed(f'option {item.name!r} is not described; write option(DEFAULT, "what it is") as its value')
        if hints[item.name] is Any:
            raise Failed(f"option {item.name!r} has no type that its values could be checked against")
    cls(options())
    return ", ".join(item.name for item in fields) or "no options"


def check_hooks(cls: type[Strategy]) -> str:
    """Every hook has the arguments of the base class, and no method is named almost like one."""
    found = misspelt([cls(cls.Options())])
    if found:
        raise Failed("; ".join(found))
    own = [name for name in methods_of(cls) if name in HOOKS]
    for name in own:
        wanted = list(inspect.signature(getattr(Strategy, name)).parameters)
        given = inspect.signature(getattr(cls, name)).parameters
        required = [n for n, p in given.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        fits = any(p.kind is p.VAR_POSITIONAL for p in given.values())
        if not fits and (len(required) > len(wanted) or len(given) < len(wanted)):
            raise Failed(f"{name}({', '.join(given)}) is called as {name}({', '.join(wanted)})")
    for name, rule in {**cls.reductions, "model_reduction": cls.model_reduction}.items():
        if rule not in RULES:
            raise Failed(f"{name!r} has the reduction {rule!r}; allowed are {', '.join(RULES)}")
    return ", ".join(own) or "none, all neutral"


def choices(cls: type[Strategy]) -> dict[str, list[Any]]:
    """The values other than the default of each option that has a fixed set of them."""
    hints = typing.get_type_hints(cls.Options)
    found: dict[str, list[Any]] = {}
    for item in dataclasses.fields(cls.Options):
        hint = hints[item.name]
        values = [False, True] if hint is bool else list(typing.get_args(hint))
        if hint is bool or typing.get_origin(hint) is Literal:
            found[item.name] = [value for value in values if value != item.default]
    return found


def neutral_of(cls: type[Strategy]) -> dict[str, Any]:
    """The options with which the class says that it changes nothing.

    Raises:
        NotApplicable: it does not say.
        Failed: it names an option that does not exist.
    """
    names = [item.name for item in dataclasses.fields(cls.Options)]
    declared = cls.neutral
    if declared is None:
        weights = [name for name in names if re.search(r"weight|lambda|^mu$|strength|coef", name)]
        hint = f"; neutral = {{{weights[0]!r}: 0.0}} would have it checked" if weights else ""
        raise NotApplicable(f"no `neutral` options are declared{hint}")
    unknown = [name for name in declared if name not in names]
    if unknown:
        raise Failed(f"neutral names the option {unknown[0]!r}; there are {', '.join(names) or 'none'}")
    return dict(declared)
