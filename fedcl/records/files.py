"""Files that are either the old version or the new one, whatever stops the process in between.

A file is written beside its final place and renamed over it. ``write_bytes`` and ``replace`` are the only two
functions of the core that touch the disk for whole files, so a fault is injected by replacing one of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from fedcl.errors import RunFailed


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into one line that names the file.

    Raises:
        RunFailed: the disk is full, the folder cannot be written, and so on.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk" if full else (error.strerror or str(error))
        raise RunFailed(f"cannot write {path}: {reason}; what was saved before is unchanged") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file; its content is in the system's hands, not yet on the disk."""
    path.write_bytes(data)


def replace(source: Path, target: Path) -> None:
    """Renames over ``target`` in one step."""
    os.replace(source, target)


def sync(path: Path) -> None:
    """Returns once a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(target: Path) -> Path:
    """Where the next version of ``target`` is written; one writer a target, so one name is enough."""
    return target.with_name(f".{target.name}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``, durably.

    Raises:
        RunFailed: it could not be written; the earlier content is intact.
    """
    beside = temporary(path)
    with writing(path):
        try:
            write_bytes(beside, data)
            sync(beside)
            replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def to_json(value: object, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity are refused, because readers disagree about them.

    Raises:
        ValueError: the value holds NaN or infinity.
        TypeError: the value holds something that JSON has no form for.

    >>> to_json({"a": [1, None]})
    '{"a": [1, null]}'
    """
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)
