from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fedcl
from fedcl.tell.quiet import LOGGERS, quiet_libraries

CODE = """
import json, sys
from fedcl.tell.quiet import quiet_libraries
records = []
with quiet_libraries(records.append):
    from flwr.supercore.logger import log, FLOWER_LOGGER, warn_deprecated_feature
    import logging, warnings
    log(logging.INFO, "hello %s", "there")
    log(logging.DEBUG, "detail")
    warn_deprecated_feature("old")
    warnings.warn("careful")
outside = len(records)
log(logging.INFO, "after")
assert len(records) == outside
print(json.dumps(records))
"""


def test_flower_imported_inside_is_silent_and_speaks_afterwards() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(fedcl.__file__).parents[1]), "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "after" in done.stderr
    for silent in ("hello", "careful", "old", "detail"):
        assert silent not in done.stderr
    assert '{"event": "log", "source": "flwr", "level": "INFO", "message": "hello there"}' in done.stdout
    assert '"level": "UserWarning", "message": "careful"' in done.stdout
    assert "detail" not in done.stdout


class Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def log_and_fail(logger: logging.Logger, records: list[dict[str, object]]) -> None:
    with quiet_libraries(records.append):
        logger.warning("inside")
        raise KeyError


@pytest.mark.parametrize("name", [*LOGGERS, "avalanche.evaluation.metrics"])
def test_everything_is_restored_even_after_an_error(name: str) -> None:
    screen, records = Collect(), list[dict[str, object]]()
    parent, logger = logging.getLogger(name.partition(".")[0]), logging.getLogger(name)
    parent.addHandler(screen)
    level, propagate, show = parent.level, parent.propagate, warnings.showwarning
    parent.setLevel(logging.INFO)
    try:
        logger.warning("before")
        with pytest.raises(KeyError):
            log_and_fail(logger, records)
        logger.warning("after")
        assert screen.seen == ["before", "after"]
        assert records == [{"event": "log", "source": name, "level": "WARNING", "message": "inside"}]
        assert (parent.propagate, warnings.showwarning) == (propagate, show)
    finally:
        parent.removeHandler(screen)
        parent.setLevel(level)


def test_warnings_do_not_leak_paths() -> None:
    records: list[dict[str, object]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with quiet_libraries(records.append):
            warnings.warn("look", RuntimeWarning, stacklevel=1)
    assert len(records) == 1
    assert str(records[0]["source"]).startswith("test_quiet.py:")
    assert (records[0]["event"], records[0]["level"], records[0]["message"]) == (
        "warning",
        "RuntimeWarning",
        "look",
    )
