from __future__ import annotations

import errno
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
from fedcl.federation.store import ClientStore
from fedcl.records import files

CHECKOUT = str(Path(fedcl.__file__).parents[1])
LARGE = 10**9


def state(value: float) -> dict[str, Tensor]:
    return {"z": torch.full((3,), value), "a": torch.tensor(int(value))}


def value(store: ClientStore, client: int, upto: int = LARGE) -> int | None:
    found = store.get(client, upto)
    return int(found["a"]) if found else None


@pytest.fixture(params=[0, LARGE], ids=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "clients", request.param)


def test_newest_state_not_after(store: ClientStore) -> None:
    assert store.get(7, 99) == {}
    for sequence in (3, 10, 12):
        store.put(7, sequence, state(sequence))
    assert [value(store, 7, upto) for upto in (2, 3, 9, 10, 11, 12, 99)] == [None, 3, 3, 10, 10, 12, 12]
    assert value(store, 8) is None
    assert list(store.get(7, 99)) == ["z", "a"]


def test_memory_and_disk_agree_and_callers_cannot_change_them(store: ClientStore) -> None:
    given = {"t": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    store.put(0, 1, given)
    given["t"].zero_()
    first = store.get(0, 1)
    first["t"].zero_()
    second = store.get(0, 1)
    assert second["t"].equal(torch.arange(6.0).reshape(2, 3).T)
    assert second["t"].is_contiguous()
    assert second["b"].dtype == torch.bfloat16


def test_layout_and_ids(store: ClientStore) -> None:
    for client in (1_234_567, 12, 999, 1000, 0):
        store.put(client, 34, state(1))
    assert (store.folder / "0000/0000012/s00000034.safetensors").is_file()
    assert (store.folder / "1234/1234567/s00000034.safetensors").is_file()
    assert list(store.clients()) == [0, 12, 999, 1000, 1_234_567]
    assert list(ClientStore(store.folder, 0).clients()) == [0, 12, 999, 1000, 1_234_567]
    with pytest.raises(ValueError, match="client=-1"):
        store.put(-1, 0, {})


def test_unsampled_clients_cost_nothing(store: ClientStore) -> None:
    assert not store.folder.exists()
    assert list(store.clients()) == []
    assert store.discard_after(3) == 0
    store.prune([3])
    store.sync()


def test_discard_after_a_checkpoint(store: ClientStore) -> None:
    for sequence in (1, 2, 3):
        store.put(4, sequence, state(sequence))
    store.put(5, 3, state(3))
    (store.folder / "0000/0000004/.s00000009.safetensors.tmp").write_bytes(b"torn")
    assert store.discard_after(2) == 2
    assert value(store, 4) == 2
    assert value(store, 5) is None
    assert list(store.clients()) == [4]
    assert sequences(store, 4) == [1, 2]
    store.put(4, 3, state(33))
    assert value(store, 4) == 33


def sequences(store: ClientStore, client: int) -> list[int]:
    folder = store.folder / f"{client // 1000:04d}/{client:07d}"
    return sorted(int(name[1:9]) for name in os.listdir(folder))


def test_prune_keeps_what_checkpoints_and_the_run_need(store: ClientStore) -> None:
    for sequence in (1, 4, 6, 8, 9):
        store.put(0, sequence, state(sequence))
    store.put(1, 2, state(2))
    store.prune([5, 8])
    assert sequences(store, 0) == [4, 8, 9]
    assert sequences(store, 1) == [2]
    assert [value(store, 0, bound) for bound in (5, 8)] == [4, 8]
    store.put(1, 10, state(10))
    store.prune([8, 10])
    assert sequences(store, 0) == [8, 9]
    assert sequences(store, 1) == [2, 10]
    store.prune([10])
    assert sequences(store, 0) == [9]
    assert sequences(store, 1) == [10]


def test_prune_sees_states_of_an_earlier_process(store: ClientStore) -> None:
    for sequence in (1, 2, 3):
        store.put(0, sequence, state(sequence))
    ClientStore(store.folder, 0).prune([3])
    assert sequences(store, 0) == [3]


def test_another_process_may_have_written(store: ClientStore) -> None:
    store.put(0, 1, state(1))
    ClientStore(store.folder, 0).put(0, 2, state(2))
    assert value(store, 0) == 2


def test_memory_is_bounded_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    probe = ClientStore(tmp_path / "probe", LARGE)
    probe.put(0, 0, state(0))
    one = (tmp_path / "probe/0000/0000000/s00000000.safetensors").stat().st_size
    store = ClientStore(tmp_path / "clients", 2 * one + 10)
    store.put(0, 0, state(0))
    store.put(1, 0, state(1))
    store.get(0, 0)
    store.put(2, 0, state(2))
    for path in (tmp_path / "clients").rglob("*.safetensors"):
        path.write_bytes(b"gone")
    assert (value(store, 0), value(store, 2)) == (0, 2)
    with pytest.raises(RunFailed):
        store.get(1, 0)


@pytest.mark.parametrize("content", [b"", b"\0" * 300, None])
def test_a_damaged_state_is_an_error_and_never_an_older_state(tmp_path: Path, content: bytes | None) -> None:
    store = ClientStore(tmp_path, 0)
    store.put(3, 1, state(1))
    store.put(3, 2, state(2))
    path = tmp_path / "0000/0000003/s00000002.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(bytes(flipped) if content is None else content)
    with pytest.raises(RunFailed, match=r"s00000002\.safetensors"):
        store.get(3, 2)
    assert value(store, 3, 1) == 1


def test_full_disk(store: ClientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(0, 1, state(1))

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(RunFailed, match=r"s00000002\.safetensors: no space left"):
        store.put(0, 2, state(2))
    assert value(store, 0) == 1
    assert os.listdir(store.folder / "0000/0000000") == ["s00000001.safetensors"]


@pytest.mark.parametrize("clients", [3, 70])
def test_sync_waits_for_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: int) -> None:
    store = ClientStore(tmp_path / "clients", 0)
    synced: list[Path] = []
    whole: list[bool] = []
    monkeypatch.setattr(files, "sync", synced.append)
    monkeypatch.setattr(os, "sync", lambda: whole.append(True))
    for client in range(clients):
        store.put(client, 0, state(0))
        store.put(client, 1, state(1))
    assert not synced
    store.sync()
    newest = set((tmp_path / "clients").rglob("s00000001.safetensors"))
    if clients == 3:
        assert newest | {p.parent for p in newest} | {store.folder, store.folder / "0000"} <= set(synced)
    else:
        assert whole == [True]
    synced.clear()
    store.sync()
    assert not synced


def test_survives_kill(tmp_path: Path) -> None:
    code = """
import os, signal, sys, torch
from pathlib import Path
from fedcl.records import files
from fedcl.federation.store import ClientStore
store = ClientStore(Path(sys.argv[1]), 0)
store.put(0, 1, {"a": torch.tensor(1)})
def die(source, target):
    os.kill(os.getpid(), signal.SIGKILL)
files.replace = die
store.put(0, 2, {"a": torch.tensor(2)})
"""
    env = {**os.environ, "PYTHONPATH": CHECKOUT}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = ClientStore(tmp_path, 0)
    assert value(store, 0) == 1
    assert len(os.listdir(tmp_path / "0000/0000000")) == 2
    store.discard_after(1)
    assert os.listdir(tmp_path / "0000/0000000") == ["s00000001.safetensors"]
