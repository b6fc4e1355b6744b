from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedcl.errors import RunFailed
from fedcl.records import files


def full_disk(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    files.write_atomic(target, b"old")
    files.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("stage", ["write_bytes", "replace", "sync"])
def test_full_disk_is_one_line_and_the_old_content_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    target = tmp_path / "summary.json"
    files.write_atomic(target, b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, stage, full_disk if stage == "write_bytes" else refuse)
    with pytest.raises(RunFailed, match=r"summary\.json: no space left") as caught:
        files.write_atomic(target, b"newer")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_other_causes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="No such file or directory"):
        files.write_atomic(tmp_path / "missing" / "a", b"")


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": {"b": -float("inf")}}])
def test_json_is_strict(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.to_json(value)
