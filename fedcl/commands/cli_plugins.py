"""Commands for authors of plugins: ``fedcl check`` and ``fedcl new``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..check import Result


def check(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="TARGET [KEY=VALUE]...", help="NAME, MODULE:CLASS, FILE.py or FILE.py:CLASS."),
    ],
    only: Annotated[str | None, typer.Option(metavar="A,B", help="Make these checks only.")] = None,
    plugin: Annotated[list[str] | None, typer.Option("--plugin", metavar="FILE.py", help="More strategies.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON on standard output.")] = False,
) -> None:
    """Test a strategy, scenario or partition against what the engine relies on; exit code 1 if a check fails."""
    from ..check.command import check_target
    from ..registry import add_plugin

    for file in plugin or ():
        add_plugin(file)

    def tell(result: Result) -> None:
        if not as_json:
            typer.echo(result.line())

    names = [name.strip() for name in only.split(",")] if only else []
    report = check_target(arguments[0], arguments[1:], names, tell)
    typer.echo(json.dumps(report.as_object(), indent=2) if as_json else report.verdict())
    if not report.ok:
        raise typer.Exit(1)


def new(
    kind: Annotated[str, typer.Argument(metavar="strategy")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower case with underscores, as in my_method.")],
    folder: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Where (default: NAME).")] = None,
) -> None:
    """Write a working strategy with its test, to be changed into yours."""
    from .new import KINDS, new_strategy

    if kind not in KINDS:
        raise UsageError("KIND", kind, f"must be {', '.join(KINDS)}", KINDS)
    place = folder or Path(name)
    for path in new_strategy(name, place):
        typer.echo(str(path))
    typer.echo(f"next: fedcl check {place / name}.py, then fedcl run --plugin {place / name}.py strategy={name}")
