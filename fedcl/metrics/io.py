"""``accuracy_matrix.csv``: row i = after task i, column j = task j; no header; empty = undefined."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

from fedcl.errors import UsageError
from fedcl.metrics.matrix import FloatArray, Matrix, as_matrix


def write_matrix(path: Path, matrix: Matrix) -> None:
    """Write an accuracy matrix, (T, T), so that :func:`read_matrix` returns the same bits.

    The file appears whole or not at all: it is written beside the target and renamed.

    Raises:
        ValueError: not an accuracy matrix, see :func:`fedcl.metrics.matrix.as_matrix`.
    """
    rows = as_matrix(matrix).tolist()
    text = "".join(",".join("" if math.isnan(cell) else repr(cell) for cell in row) + "\n" for row in rows)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="ascii", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; results are read by others.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_matrix(path: Path) -> FloatArray:
    """Read an accuracy matrix, (T, T) float64 in [0, 1], with NaN where a cell is empty.

    Raises:
        UsageError: no such file, or its content is not an accuracy matrix.
    """
    allowed = "an accuracy matrix: T rows of T comma-separated numbers in [0, 1] or empty cells, no header"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        cells = [[float(cell) if cell.strip() else None for cell in line.split(",")] for line in lines]
        return as_matrix(cells)
    except OSError as error:
        raise UsageError("accuracy matrix", str(path), f"{allowed}; {error.strerror}") from None
    except ValueError as error:
        raise UsageError("accuracy matrix", str(path), f"{allowed}; {error}") from None
