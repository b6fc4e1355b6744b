"""The state of record of clients: what a client remembers between the rounds in which it is sampled.

One tensor file per client and sequence number, ``0012/0012345/s00000034.safetensors`` (client 12345, in the
directory of its thousand, after exchange 34). A client that was never sampled has no file and costs
nothing. The directory is read at every ``get``, so several processes may share a store as long as each
client has one writer.

``put`` returns once the file has its final name, which survives the death of the process, kill -9 included.
It does not wait for the disk, because a round may write a thousand files; :meth:`ClientStore.sync` does,
and is called before a checkpoint that relies on these states. What a power cut tears between two
checkpoints is newer than the checkpoint, and a resumed run discards it; a file that is damaged all the same
is an error that names it, never an older state.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fedcl.errors import RunFailed
from fedcl.records import files
from fedcl.records.checkpoint import Damaged, pack_tensors, unpack_tensors

_FILE = re.compile(r"s(\d{8,})\.safetensors")
_SHARD = 1000
_FEW = 64  # up to so many files are synced one by one; beyond, one call for everything is faster


class ClientStore:
    """States of clients on disk, with the last used ones in memory.

    The memory holds files, not tensors: a state read from memory and one read from disk are equal in every
    bit, order and layout, and what a caller does to a state it got changes nothing here.

    Args:
        folder: where the states are; made at the first ``put``.
        capacity_bytes: how many bytes of files may stay in memory, least recently used ones go first.
    """

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        self.folder = folder
        self.capacity_bytes = capacity_bytes
        self._memory: OrderedDict[Path, bytes] = OrderedDict()
        self._held = 0
        self._written: dict[int, Path] = {}  # since the last sync
        self._grown: set[int] | None = None  # clients that may have old states; None: any may

    def get(self, client: int, upto: int) -> dict[str, Tensor]:
        """The client's newest state whose sequence number is at most ``upto``; {} if there is none.

        Raises:
            RunFailed: the state's file is damaged or cannot be read.
        """
        if not os.path.isdir(self.folder):  # most methods keep no states: then nothing is looked for
            return {}
        numbers = [number for number in self._sequences(client) if number <= upto]
        return self._read(self._path(client, numbers[-1])) if numbers else {}

    def put(self, client: int, sequence: int, state: Mapping[str, Tensor]) -> None:
        """Writes the client's state after exchange ``sequence``; both are 0 or above.

        A state of the same client and sequence number is replaced.

        Raises:
            RunFailed: it could not be written; earlier states are intact.
        """
        if client < 0 or sequence < 0:
            raise ValueError(f"client={client} and sequence={sequence} must be 0 or above")
        path = self._path(client, sequence)
        data = pack_tensors(state)
        beside = files.temporary(path)
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                files.write_bytes(beside, data)
                files.replace(beside, path)
            except OSError:
                with contextlib.suppress(OSError):
                    beside.unlink(missing_ok=True)
                raise
        self._remember(path, data)
        self._written[client] = path
        if self._grown is not None:
            self._grown.add(client)

    def clients(self) -> Iterator[int]:
        """Ids of the clients that have a state, ascending."""
        for shard in _numbered(self.folder):
            for path in _numbered(shard):
                if _states(path):
                    yield int(path.name)

    def sync(self) -> None:
        """Returns once the newest state of each client that this object wrote is on the disk.

        Raises:
            RunFailed: the system could not write them.
        """
        with files.writing(self.folder):
            if len(self._written) > _FEW:
                os.sync()
            else:
                paths = list(self._written.values())
                parents = {p for path in paths for p in (path.parent, path.parents[1], self.folder, self.folder.parent)}
                for path in [*paths, *sorted(parents)]:
                    files.sync(path)
        self._written.clear()

    def discard_after(self, sequence: int) -> int:
        """Removes every state newer than ``sequence`` and unfinished files; returns how many states it was.

        A resumed run calls it with the sequence number of its checkpoint.
        """
        removed = 0
        for shard in _numbered(self.folder):
            for path in _numbered(shard):
                for unfinished in path.glob(".*.tmp"):
                    unfinished.unlink()
                for number in _states(path):
                    if number > sequence:
                        self._remove(self._path(int(path.name), number))
                        removed += 1
        self._written.clear()
        self._grown = None
        return removed

    def prune(self, upto_sequences_kept: Iterable[int]) -> None:
        """Removes states that neither a kept checkpoint nor the run in progress can ask for.

        What stays of a client is its newest state and, for each kept checkpoint, the newest one not after
        it. Only clients that were put since the last call, or had several left, are visited; all of them the
        first time.

        Args:
            upto_sequences_kept: the sequence numbers of the checkpoints that are kept.
        """
        bounds = list(upto_sequences_kept)
        visited = list(self.clients()) if self._grown is None else sorted(self._grown)
        self._grown = set()
        for client in visited:
            numbers = self._sequences(client)
            kept = {max((n for n in numbers if n <= bound), default=-1) for bound in bounds} | {*numbers[-1:]}
            for number in numbers:
                if number not in kept:
                    self._remove(self._path(client, number))
            if len(kept.intersection(numbers)) > 1:  # a later call may find the older ones superfluous
                self._grown.add(client)

    def _path(self, client: int, sequence: int) -> Path:
        return self._folder_of(client) / f"s{sequence:08d}.safetensors"

    def _folder_of(self, client: int) -> Path:
        return self.folder / f"{client // _SHARD:04d}" / f"{client:07d}"

    def _sequences(self, client: int) -> list[int]:
        return _states(self._folder_of(client))

    def _read(self, path: Path) -> dict[str, Tensor]:
        data = self._memory.get(path)
        if data is not None:
            self._memory.move_to_end(path)
            return unpack_tensors(data)
        try:
            data = path.read_bytes()
            state = unpack_tensors(data)
        except (OSError, Damaged) as error:
            raise RunFailed(f"client state {path} cannot be used: {error}") from error
        self._remember(path, data)
        return state

    def _remember(self, path: Path, data: bytes) -> None:
        self._forget(path)
        if len(data) > self.capacity_bytes:
            return
        self._memory[path] = data
        self._held += len(data)
        while self._held > self.capacity_bytes:
            self._forget(next(iter(self._memory)))

    def _forget(self, path: Path) -> None:
        self._held -= len(self._memory.pop(path, b""))

    def _remove(self, path: Path) -> None:
        self._forget(path)
        with files.writing(path):
            path.unlink(missing_ok=True)


def _numbered(folder: Path) -> list[Path]:
    """Directories whose names are numbers, ascending by number."""
    try:
        found = [entry.name for entry in os.scandir(folder) if entry.name.isdecimal()]
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(found, key=int)]


def _states(folder: Path) -> list[int]:
    """Sequence numbers of the states of one client, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))
