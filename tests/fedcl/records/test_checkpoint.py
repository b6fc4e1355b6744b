from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fedcl
from fedcl.errors import RunFailed
from fedcl.records import files
from fedcl.records.checkpoint import (
    Damaged,
    load_newest,
    pack_tensors,
    save_checkpoint,
    stored_metas,
    unpack_tensors,
)
from fedcl.records.hashing import model_sha256

CHECKOUT = str(Path(fedcl.__file__).parents[1])


def arrays(value: float = 0.0) -> dict[str, Tensor]:
    base = torch.arange(12.0).reshape(3, 4) + value
    return {
        "z.weight": base,
        "view": base[1:],
        "transposed": base.T,
        "image": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(
            memory_format=torch.channels_last
        ),
        "count": torch.tensor(2**53 + 1),
        "mask": torch.tensor([True, False]),
        "half": torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 7),
        "also_empty": torch.zeros(3, 0, dtype=torch.uint8),
        "double": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    }


def skipped_none(text: str) -> None:
    raise AssertionError(text)


def test_round_trip_keeps_bits_shapes_types_and_order(tmp_path: Path) -> None:
    given, meta = arrays(), {"task": 3, "rounds": [1, 2], "lr": 0.1, "none": None, "nested": {"é": True}}
    path = save_checkpoint(tmp_path / "checkpoints", 12, given, meta, keep=2)
    assert path == tmp_path / "checkpoints" / "000012"
    assert sorted(os.listdir(path)) == ["meta.json", "state.safetensors"]
    found = load_newest(tmp_path / "checkpoints", skipped_none)
    assert found is not None
    assert (found.index, found.meta) == (12, meta)
    assert list(found.arrays) == list(given)
    assert model_sha256(found.arrays) == model_sha256(given)
    found.arrays["view"].add_(1)
    assert found.arrays["z.weight"].equal(given["z.weight"])


def test_same_content_gives_the_same_bytes_and_nothing_is_fine() -> None:
    assert pack_tensors(arrays()) == pack_tensors(arrays())
    assert unpack_tensors(pack_tensors({})) == {}


def test_every_changed_byte_of_a_tensor_file_is_noticed() -> None:
    given = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(4)}
    data = pack_tensors(given)
    for place in range(len(data)):
        torn = bytearray(data)
        torn[place] ^= 0x04
        try:
            back = unpack_tensors(bytes(torn))
        except Damaged:
            continue
        assert model_sha256(back) == model_sha256(given), place  # spaces of the header may change
    for length in range(0, len(data), 7):
        with pytest.raises(Damaged):
            unpack_tensors(data[:length])


def test_keeps_the_newest(tmp_path: Path) -> None:
    for index in (1, 2, 5, 9):
        save_checkpoint(tmp_path, index, arrays(index), {}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["000005", "000009"]


def test_a_left_history_is_removed(tmp_path: Path) -> None:
    for index in (1, 2, 20):
        save_checkpoint(tmp_path, index, arrays(index), {}, keep=3)
    (tmp_path / "000020" / "meta.json").unlink()
    save_checkpoint(tmp_path, 3, arrays(3), {}, keep=1)
    assert os.listdir(tmp_path) == ["000003"]


def truncate(folder: Path) -> None:
    data = (folder / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(data[:-5])


def flip_tensor_bit(folder: Path) -> None:
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "state.safetensors").write_bytes(data)


def change_meta(folder: Path) -> None:
    text = (folder / "meta.json").read_text()
    assert '"round": 2' in text
    (folder / "meta.json").write_text(text.replace('"round": 2', '"round": 3'))


def torn_meta(folder: Path) -> None:
    (folder / "meta.json").write_text((folder / "meta.json").read_text()[:-4])


def other_version(folder: Path) -> None:
    stored = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**stored, "format": 99}))


def no_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


def no_tensors(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "state.safetensors: its checksum"),
        (flip_tensor_bit, "state.safetensors: its checksum"),
        (change_meta, "meta.json: its checksum"),
        (torn_meta, "meta.json cannot be read"),
        (other_version, "format 99 is not 2"),
        (no_meta, "meta.json is missing"),
        (no_tensors, "state.safetensors is missing"),
    ],
)
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, damage: object, says: str) -> None:
    for index in (1, 2):
        save_checkpoint(tmp_path, index, arrays(index), {"round": index}, keep=2)
    assert callable(damage)
    damage(tmp_path / "000002")
    said: list[str] = []
    found = load_newest(tmp_path, said.append)
    assert found is not None
    assert (found.index, found.meta) == (1, {"round": 1})
    assert model_sha256(found.arrays) == model_sha256(arrays(1))
    assert len(said) == 1
    assert "000002" in said[0]
    assert says in said[0]
    save_checkpoint(tmp_path, 2, arrays(2), {"round": 2}, keep=2)
    again = load_newest(tmp_path, skipped_none)
    assert again is not None
    assert again.index == 2


def test_metas_of_all_that_may_be_used(tmp_path: Path) -> None:
    for index in (1, 2, 3, 4):
        save_checkpoint(tmp_path, index, {}, {"round": index}, keep=3)
    no_meta(tmp_path / "000003")
    assert stored_metas(tmp_path) == [{"round": 4}, {"round": 2}]
    assert stored_metas(tmp_path / "missing") == []


def test_nothing_whole_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "missing", skipped_none) is None
    save_checkpoint(tmp_path, 1, {}, {}, keep=1)
    no_meta(tmp_path / "000001")
    said: list[str] = []
    assert load_newest(tmp_path, said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("stage", ["write_bytes", "sync", "replace"])
def test_full_disk_keeps_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    save_checkpoint(tmp_path, 1, arrays(1), {}, keep=1)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, stage, refuse)
        with pytest.raises(RunFailed, match="000002: no space left"):
            save_checkpoint(tmp_path, 2, arrays(2), {}, keep=1)
    assert os.listdir(tmp_path) == ["000001"]
    found = load_newest(tmp_path, skipped_none)
    assert found is not None
    assert found.index == 1


@pytest.mark.parametrize(
    ("index", "meta", "keep"),
    [(-1, {}, 1), (0, {}, 0), (0, {"a": (1, 2)}, 1), (0, {1: 2}, 1), (0, {"a": float("nan")}, 1)],
)
def test_wrong_use(tmp_path: Path, index: int, meta: dict[str, object], keep: int) -> None:
    with pytest.raises(ValueError, match=r"index|meta|JSON"):
        save_checkpoint(tmp_path, index, {}, meta, keep)
    assert not list(tmp_path.iterdir())


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from fedcl.records import files
from fedcl.records.checkpoint import save_checkpoint
folder, index, doomed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
calls = 0
def deadly(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*arguments)
    return call
for name in ("write_bytes", "sync", "replace"):
    setattr(files, name, deadly(getattr(files, name)))
save_checkpoint(folder, index, {"x": torch.full((1000,), float(index))}, {"saved": "again"}, keep=1)
print("survived", calls)
"""


def run_child(folder: Path, index: int, doomed: int) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": CHECKOUT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(folder), str(index), str(doomed)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("doomed", [3, 6, 7, 8])
def test_killed_at_every_stage_of_a_save(tmp_path: Path, index: int, doomed: int) -> None:
    """Calls: write and sync of two files (1-4), sync of the directory (5), renames and pruning (6 on)."""
    save_checkpoint(tmp_path, 1, {"x": torch.full((1000,), 1.0)}, {"saved": "once"}, keep=1)
    done = run_child(tmp_path, index, doomed)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = load_newest(tmp_path, skipped_none)
    assert found is not None
    if doomed in (3, 6):
        assert (found.index, found.meta) == (1, {"saved": "once"})
    assert found.arrays["x"].eq(found.index).all()
    save_checkpoint(tmp_path, 3, {}, {}, keep=1)
    assert os.listdir(tmp_path) == ["000003"]
