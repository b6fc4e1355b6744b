"""Checks single values against the types of a dataclass, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from ..cards import type_text
from ..errors import UsageError

OptionsT = TypeVar("OptionsT")

_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def coerce(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the type ``hint``, or an error that names ``key``.

    Whole numbers become floats where a float is asked for, lists become tuples where a tuple is, and a single
    value becomes a list of one. Nothing else is converted: ``"3"`` is no number, 1 is no ``true``.

    Raises:
        UsageError: the value has another type, or is NaN or infinite.

    >>> coerce(float, 3, "lr"), coerce(list[str], "crop", "augment"), coerce(int | None, None, "size")
    (3.0, ['crop'], None)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value, key)
    if origin is Literal:
        return _literal(arguments, value, key)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, key)
    if origin in (list, tuple):
        return _sequence(origin, arguments, value, key)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise UsageError(key, value, "must be a mapping of names to values")
        for name in value:
            if not isinstance(name, str):
                raise UsageError(key, name, "names in a mapping must be text")
        inner = arguments[1] if arguments else Any
        return {name: coerce(inner, item, f"{key}.{name}") for name, item in value.items()}
    if hint is type(None):
        if value is None:
            return None
        raise UsageError(key, value, "must be null")
    return _scalar(hint, value, key)


def parse_options(cls: type[OptionsT], given: Mapping[str, Any], prefix: str) -> OptionsT:
    """An ``Options`` dataclass from the settings a user gave for it.

    A ``ValueError`` that its ``__post_init__`` raises is reported under ``prefix``.

    Args:
        cls: frozen dataclass; types may be int, float, bool, str, Literal, tuples, lists and unions of these.
        given: names and values from the configuration.
        prefix: for example ``options.fedlwf``.

    Raises:
        UsageError: an unknown name, a value of another type, a missing or a refused value.
    """
    if not dataclasses.is_dataclass(cls):
        raise UsageError(prefix, cls.__qualname__, "must be declared as @dataclass(frozen=True)")
    if not isinstance(given, Mapping):
        raise UsageError(prefix, given, "must be a mapping of option names to values")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls) if item.init]
    for name in given:
        if name not in names:
            raise unknown_key(prefix, str(name), given[name], names)
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.init and item.name not in given:
            raise UsageError(f"{prefix}.{item.name}", None, f"must be given: {type_text(hints[item.name])}")
    values = {name: coerce(hints[name], value, f"{prefix}.{name}") for name, value in given.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(prefix, dict(given), one_line(error)) from error


def unknown_key(section: str, name: str, value: Any, names: list[str]) -> UsageError:
    """The error for a key that does not exist in ``section`` ('' for the top level)."""
    key = f"{section}.{name}" if section else name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f", did you mean {f'{section}.{close[0]}'.lstrip('.')!r}?" if close else ";"
    listed = f"allowed is one of {', '.join(names)}" if names else "there are no settings here"
    return UsageError(key, value, f"no such key{hint} {listed}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error without line breaks, cut to ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if hint not in _WORDS:
        raise TypeError(f"{key}: settings of type {hint!r} are not supported")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    elif type(value) is hint:
        return value
    quote = "; put it in quotes" if hint is str and isinstance(value, bool | int | float) else ""
    raise UsageError(key, value, f"must be {_WORDS[hint]}{quote}")


def _literal(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    names = ["null" if choice is None else str(choice) for choice in choices]
    raise UsageError(key, value, f"must be one of {', '.join(names)}", names)


def _union(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    or_null = ", or null" if len(others) < len(choices) else ""
    refused: list[UsageError] = []
    # An exact match goes first, so that 3 stays an int under ``float | int``.
    for choice in sorted(others, key=lambda one: type(value) is not one):
        try:
            return coerce(choice, value, key)
        except UsageError as error:
            refused.append(error)
    if len(refused) == 1:
        raise UsageError(refused[0].key, refused[0].value, refused[0].allowed + or_null) from None
    words = " or ".join(_WORDS.get(choice, type_text(choice)) for choice in others)
    raise UsageError(key, value, f"must be {words}{or_null}")


def _sequence(origin: type, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None or isinstance(value, Mapping):
        raise UsageError(key, value, "must be a list, for example [] or [a, b]")
    items = list(value) if isinstance(value, list | tuple) else [value]
    inner = [argument for argument in arguments if argument is not Ellipsis]
    if origin is tuple and Ellipsis not in arguments:
        if len(items) != len(inner):
            raise UsageError(key, value, f"must be a list of {len(inner)} values")
    else:
        inner = inner * len(items)
    return origin(coerce(hint, item, f"{key}[{i}]") for i, (hint, item) in enumerate(zip(inner, items, strict=True)))


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return coerce(dict[str, Any], value, key)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return coerce(float, value, key)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise UsageError(key, value, "must be a number, text, true, false, null, a list or a mapping")
