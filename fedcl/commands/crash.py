"""Errors as one line on standard error; tracebacks go to a file."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ..errors import FedclError, RunFailed
from ..settings.values import one_line


@contextmanager
def crash_report(folder: Path) -> Iterator[None]:
    """Turns an unexpected error into :class:`RunFailed` and keeps its traceback in ``folder/error.txt``."""
    try:
        yield
    except (FedclError, BrokenPipeError):
        raise
    except Exception as error:
        raise RunFailed(stored(error, folder)) from error


def stored(error: BaseException, folder: Path | None) -> str:
    """Writes the traceback to ``folder/error.txt`` or a temporary file; returns the first cause."""
    first = error
    while (cause := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = cause
    text = "".join(traceback.format_exception(error))
    try:
        if folder is None or not folder.is_dir():
            raise FileNotFoundError
        place = folder / "error.txt"
        place.write_text(text, encoding="utf-8")
    except OSError:
        handle, name = tempfile.mkstemp(prefix="fedcl-error-", suffix=".txt")
        place = Path(name)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
    return f"{type(first).__name__}: {one_line(first)} (traceback in {place})"


def complain(text: str, code: int) -> int:
    """Prints one line on standard error and returns ``code``."""
    print("fedcl: " + " ".join(text.split()), file=sys.stderr)
    return code


def usage_text(error: click.ClickException) -> str:
    """What was wrong with a command line, in one line."""
    text = error.format_message()
    if isinstance(error, click.exceptions.NoSuchCommand) and text.count("Did you mean") > 1:
        # Click and typer both add a suggestion.
        text = text[: text.rindex("Did you mean")].rstrip()
    context = getattr(error, "ctx", None)
    return f"{text} See '{context.command_path} --help'." if context else text
