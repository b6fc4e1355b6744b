"""Every strategy, scenario and partition of this project has all that a researcher needs of it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from fedcl import registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", registry.KINDS)
def test_everything_registered_is_complete(kind):
    problems = []
    mine = [entry for entry in registry.entries(kind) if entry.origin == "fedcl-sim"]
    assert mine
    for entry in mine:
        if entry.cls is None:
            problems.append(f"{entry.name}: {entry.problem}")
            continue
        if not (entry.cls.__dict__.get("__doc__") or "").strip():
            problems.append(f"{entry.name}: no docstring")
        path = Path(inspect.getfile(entry.cls)).resolve()
        test = ROOT / "tests" / path.relative_to(ROOT).parent / f"test_{path.name}"
        # The partitions are small and share their properties, so they share their tests.
        shared = path.parent.parent / f"test_{path.parent.name}.py"
        if not test.is_file() and not (ROOT / "tests" / shared.relative_to(ROOT)).is_file():
            problems.append(f"{entry.name}: no {test.relative_to(ROOT)}")
        if kind == "strategies":
            if not getattr(entry.cls, "card", None) or not entry.cls.card.title:
                problems.append(f"{entry.name}: no card")
            elif entry.cls.family != "bound" and not entry.cls.card.bibtex.strip().startswith("@"):
                problems.append(f"{entry.name}: the card has no BibTeX")
            options = getattr(entry.cls, "Options", None)
            for field in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
                if not field.metadata.get("help"):
                    problems.append(f"{entry.name}: option {field.name} has no help text")
    assert problems == []


def test_aliases_are_unique():
    for kind in registry.KINDS:
        names = [name for entry in registry.entries(kind) for name in (entry.name, *getattr(entry.cls, "aliases", ()))]
        assert len(names) == len(set(names))
