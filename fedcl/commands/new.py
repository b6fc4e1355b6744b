"""``fedcl new``: a working skeleton of a strategy with its test."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from .. import registry
from ..errors import UsageError
from ..records.files import write_atomic, writing

KINDS = ("strategy",)
_FILES = {"strategy.py.txt": "{}.py", "test_strategy.py.txt": "test_{}.py", "README.md.txt": "README.md"}


def new_strategy(name: str, folder: Path) -> list[Path]:
    """Writes the file of a strategy, its test, and how to run both; returns their paths.

    Args:
        name: as on the command line, lower case with underscores.
        folder: made if missing; other files in it stay.

    Raises:
        UsageError: a name that cannot be one, or one of the files exists.
        RunFailed: they could not be written.
    """
    check_name(name)
    values = {"name": name, "class_name": class_name(name)}
    targets = {template: folder / target.format(name) for template, target in _FILES.items()}
    taken = [path for path in targets.values() if path.exists()]
    if taken:
        allowed = f"{taken[0].name} is there already and is not overwritten; use another folder"
        raise UsageError("--dir", str(folder), allowed)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    templates = files("fedcl") / "templates"
    for template, path in targets.items():
        text = Template((templates / template).read_text(encoding="utf-8")).substitute(values)
        write_atomic(path, text.encode())
    return list(targets.values())


def check_name(name: str) -> None:
    """Refuses what cannot be the name of a strategy and of its file.

    Raises:
        UsageError: saying why.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > 50 or keyword.iskeyword(name):
        allowed = "must be lower case with underscores, as in my_method, of at most 50 characters and no word of Python"
        raise UsageError("NAME", name, allowed)
    for entry in registry.entries("strategies"):
        if name in (entry.name, *getattr(entry.cls, "aliases", ())):
            raise UsageError("NAME", name, f"is the name of a strategy of {entry.origin} already")
    if importlib.util.find_spec(name) is not None:
        raise UsageError("NAME", name, f"is a Python module here, which the file {name}.py would hide")


def class_name(name: str) -> str:
    """The class of a strategy's name.

    >>> class_name("my_method2")
    'MyMethod2'
    """
    return "".join(part[0].upper() + part[1:] for part in name.split("_"))
