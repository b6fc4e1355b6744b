"""Keeps what libraries say out of the user's way, and in the run's events."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

# Flower logs everything to the first, Avalanche to the second and to children of it.
LOGGERS = ("flwr", "avalanche")
Sink = Callable[[dict[str, object]], None]


class _Divert(logging.Handler):
    """Takes a logger's records as a filter, before any handler, and its children's as a handler.

    A filter, because Flower adds a console handler when it is first imported, which may be later.
    """

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink

    def filter(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return False

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        if text and record.levelno >= logging.INFO:
            self._sink({"event": "log", "source": record.name, "level": record.levelname, "message": text})


@contextlib.contextmanager
def quiet_libraries(sink: Sink) -> Iterator[None]:
    """Sends log lines of Flower and Avalanche (from INFO up) and all Python warnings to ``sink``.

    Records are ``{"event": "log", "source", "level", "message"}`` and ``{"event": "warning", "source" (file
    name and line), "level" (category), "message"}``. What was there before is there again afterwards, and
    so are handlers that an import inside the block added. An error of ``sink`` reaches whoever logged or
    warned.
    """
    divert = _Divert(sink)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.propagate, list(logger.handlers)) for logger in loggers]
    show = warnings.showwarning

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        where = f"{Path(filename).name}:{lineno}"
        sink({"event": "warning", "source": where, "level": category.__name__, "message": str(message).strip()})

    for logger in loggers:
        logger.handlers = [divert]
        logger.propagate = False
        logger.addFilter(divert)
    warnings.showwarning = showwarning
    try:
        yield
    finally:
        warnings.showwarning = show
        for logger, propagate, handlers in before:
            logger.removeFilter(divert)
            logger.propagate = propagate
            logger.handlers = [
                *handlers,
                *(h for h in logger.handlers if h is not divert and h not in handlers),
            ]
