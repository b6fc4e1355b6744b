"""accuracy_matrix.csv: exact, atomic, no header, empty = undefined."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcl.errors import UsageError
from fedcl.metrics import read_matrix, write_matrix

cells = st.one_of(st.floats(0, 1), st.just(float("nan")))
matrices = st.integers(1, 5).flatmap(lambda t: arrays(np.float64, (t, t), elements=cells))


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "accuracy_matrix.csv"
    write_matrix(path, [[0.1, None], [1 / 3, 1]])
    assert path.read_bytes() == b"0.1,\n0.3333333333333333,1.0\n"


@given(matrices)
def test_same_bits(tmp_path_factory: pytest.TempPathFactory, matrix: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("io") / "accuracy_matrix.csv"
    write_matrix(path, matrix)
    assert np.array_equal(read_matrix(path), matrix, equal_nan=True)


def test_one_undefined_task(tmp_path: Path) -> None:
    path = tmp_path / "accuracy_matrix.csv"
    write_matrix(path, [[None]])
    assert path.read_text() == "\n"
    assert np.isnan(read_matrix(path)).tolist() == [[True]]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "accuracy_matrix.csv"
    write_matrix(path, [[0.5]])

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_matrix(path, [[0.75]])
    assert path.read_text() == "0.5\n"
    assert list(tmp_path.iterdir()) == [path]


def test_only_matrices_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="square"):
        write_matrix(tmp_path / "m.csv", [[0.5, 0.5]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "a,b\n0.5,0.5\n", "0.5,0.5\n", "1.5\n", "0.5,0.5\n0.5\n"])
def test_broken_files_name_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "accuracy_matrix.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"accuracy_matrix\.csv.*no header"):
        read_matrix(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_matrix(tmp_path / "accuracy_matrix.csv")
