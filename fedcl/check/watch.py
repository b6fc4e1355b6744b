"""A strategy that is watched: which hook draws from a global generator, returns no tensor, or keeps something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..records.hashing import model_sha256
from ..strategy import Strategy
from . import generators

HOOKS = (
    "check", "arrange", "share", "modules", "groups", "begin_round", "phases", "sources", "prepare", "task_loss",
    "loss", "rate", "edit_gradients", "after_step", "carry", "upload", "weight", "end_round", "begin_task", "broadcast",
    "round", "aggregate", "after_aggregate", "finish_task", "personal", "newcomer", "predict",
)  # fmt: skip
"""Everything that the engine calls, in the order in which it does."""


class Watch:
    """What was seen of the instances of one class.

    Attributes:
        draws: by generator, the hooks in which it was drawn from.
        kept: names of attributes of an instance that were set or changed after it was made.
        shared: names of attributes of the class that were changed.
        called: hooks and methods that were called.
        written: by hook, what it was given to read and wrote to.
        states: by hook, what it returned as a state, where that is no mapping of names to tensors.
    """

    def __init__(self, cls: type[Strategy]) -> None:
        self.draws: dict[str, set[str]] = {}
        self.called: set[str] = set()
        self.written: dict[str, set[str]] = {}
        self.states: dict[str, str] = {}
        self.instances: list[tuple[Strategy, dict[str, str]]] = []
        self._cls = cls
        self._before = dict(class_values(cls))

    @property
    def kept(self) -> list[str]:
        """See the class."""
        found: set[str] = set()
        for instance, before in self.instances:
            now = {name: fingerprint(value) for name, value in vars(instance).items()}
            found |= {name for name in {*before, *now} if before.get(name) != now.get(name)}
        return sorted(found)

    @property
    def shared(self) -> list[str]:
        """See the class."""
        now = dict(class_values(self._cls))
        return sorted(name for name in {*now, *self._before} if now.get(name) != self._before.get(name))

    def watched(self) -> type[Strategy]:
        """A subclass of the same name whose own hooks and methods are watched; the others stay the base's."""
        cls, watch = self._cls, self

        def made(instance: Strategy, options: Any = None) -> None:
            cls.__init__(instance, options)
            watch.instances.append((instance, {n: fingerprint(v) for n, v in vars(instance).items()}))

        body: dict[str, Any] = {"__init__": made, "__doc__": cls.__doc__, "__module__": cls.__module__}
        for name in methods_of(cls):
            body[name] = self._around(name, getattr(cls, name))
        watched: type[Strategy] = type(cls.__name__, (cls,), body)
        return watched

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def _call(*arguments: Any, **named: Any) -> Any:
            self.called.add(name)
            before, given = generators.states(), list(readable(arguments))
            answer = function(*arguments, **named)
            for what, tensor, version in given:
                if tensor._version != version:
                    self.written.setdefault(name, set()).add(what)
            for generator, old, new in zip(generators.NAMES, before, generators.states(), strict=True):
                # Modules draw their initial values from the generator, which is seeded for them and put back.
                if old != new and name != "modules":
                    self.draws.setdefault(generator, set()).add(name)
            problem = wrong_state(name, answer)
            if problem:
                self.states.setdefault(name, problem)
            return answer

        _call.__name__ = name
        return _call


def readable(arguments: tuple[Any, ...]) -> Iterator[tuple[str, Tensor, int]]:
    """(name, tensor, its version) of the model, broadcasts and states that a hook is given."""
    for argument in arguments[1:]:
        for part in ("arrays", "received", "down", "state", "carried"):
            arrays = getattr(argument, part, None)
            if isinstance(arrays, Mapping):
                yield from ((f"{part}[{n!r}]", a, a._version) for n, a in arrays.items() if isinstance(a, Tensor))


def methods_of(cls: type[Strategy]) -> list[str]:
    """Names of the plain methods that a class and its bases below Strategy define, those with a leading _ left out."""
    names: list[str] = []
    for base in cls.__mro__:
        if base is Strategy:
            break
        for name, value in vars(base).items():
            if callable(value) and not isinstance(value, type) and not name.startswith("_") and name not in names:
                names.append(name)
    return names


def class_values(cls: type[Strategy]) -> Iterator[tuple[str, str]]:
    """(name, fingerprint) of what a class and its bases below Strategy hold beside functions and classes."""
    for base in cls.__mro__:
        if base is Strategy:
            return
        for name, value in vars(base).items():
            if not name.startswith("__") and not callable(value) and not isinstance(value, property | classmethod):
                yield f"{base.__name__}.{name}", fingerprint(value)


def fingerprint(value: object, depth: int = 4) -> str:
    """A text that changes with the content of a value: tensors by their bytes, containers by their items."""
    if isinstance(value, Tensor):
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return "a tensor of a stacked step"
        return model_sha256({"": value})
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{value.tobytes().hex()}"
    if isinstance(value, Mapping):
        return repr([(repr(key), fingerprint(item, depth - 1)) for key, item in value.items()])
    if isinstance(value, list | tuple | set | frozenset):
        items = [fingerprint(item, depth - 1) for item in value]
        return repr(sorted(items) if isinstance(value, set | frozenset) else items)
    inner = getattr(value, "__dict__", None)
    if depth and inner and not isinstance(value, type) and not callable(value):
        return type(value).__name__ + fingerprint(dict(inner), depth - 1)
    return repr(value)


def wrong_state(hook: str, answer: object) -> str:
    """What is wrong with the arrays that a hook returned, in words; '' where nothing is."""
    parts: dict[str, object] = {}
    if hook in ("begin_task",):
        parts["state"] = answer
    elif hook in ("begin_round", "carry", "upload", "personal", "newcomer"):
        parts["mapping"] = answer
    elif hook in ("end_round", "round", "aggregate", "after_aggregate", "finish_task"):
        if not isinstance(answer, tuple) or len(answer) != 2:
            return f"{hook} returns {type(answer).__name__}, not a pair"
        parts["state"] = answer[1]
        if hook == "end_round":
            parts["upload"] = answer[0]
    for what, arrays in parts.items():
        where = f"the {what} that {hook} returns"
        if not isinstance(arrays, Mapping):
            return f"{where} is {type(arrays).__name__}, not a mapping of names to tensors"
        for name, array in arrays.items():
            if not isinstance(name, str):
                return f"{where} has the name {name!r}, which is no text"
            if not isinstance(array, Tensor):
                kind = type(array).__name__
                return f"{name!r} in {where} is {kind}, not a tensor: it must be what a checkpoint can hold"
            if array.requires_grad:
                return f"{name!r} in {where} still has its gradient; detach it"
            if array.is_sparse or array.is_quantized or array.is_complex():
                return f"{name!r} in {where} is no dense tensor of real numbers"
    return ""
