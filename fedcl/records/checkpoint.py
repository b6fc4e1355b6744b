"""Checkpoints of the server: tensors and JSON, no code, and always one that can be read.

``checkpoints/000012/`` holds ``state.safetensors`` and ``meta.json`` (format version, SHA-256 of the tensor
file, the caller's own data, and a SHA-256 of all that). The directory is filled under another name, synced
and renamed; only then are older ones removed. So a crash at any point leaves the newest or the one before.

Tensors come back contiguous, on the CPU and in the order in which they were given.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedcl.records import files
from fedcl.records.hashing import encode

FORMAT = 2
_TENSORS, _META = "state.safetensors", "meta.json"
_UNFINISHED = ".unfinished-"
_NAME = re.compile(r"(\d{6,})(\.replaced)?")


class Damaged(Exception):
    """Stored bytes are not what was written. The message says how, without naming the file."""


def pack_tensors(arrays: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of ``arrays``, with their order and a CRC-32 of their encoding in its header.

    Any dense tensors will do: views, shared storage, other devices. The same arrays give the same bytes.
    """
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in arrays.items():
        value = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        where = value.untyped_storage().data_ptr()
        if where in seen:  # the file format refuses tensors that share memory
            value = value.clone()
        seen.add(where)
        plain[name] = value
    # One entry only: the library writes several in an order that differs between processes.
    header = {"fedcl": json.dumps({"names": list(plain), "crc32": _crc32(plain)})}
    data: bytes = save_tensors(plain, metadata=header)
    return data


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    """The arrays of :func:`pack_tensors`, each with memory of its own.

    Raises:
        Damaged: the bytes are cut short, changed, or were not written by :func:`pack_tensors`.
    """
    try:
        loaded = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        ours = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fedcl"])
        arrays = {name: loaded[name] for name in ours["names"]}
        expected = ours["crc32"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"not a whole tensor file ({error})") from error
    if len(arrays) != len(loaded) or _crc32(arrays) != expected:
        raise Damaged("its checksum does not match")
    return arrays


def _crc32(arrays: Mapping[str, Tensor]) -> int:
    value = 0
    for chunk in encode(arrays):
        value = zlib.crc32(chunk, value)
    return value


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`save_checkpoint` was given."""

    index: int
    arrays: dict[str, Tensor]
    meta: dict[str, Any]


def save_checkpoint(folder: Path, index: int, arrays: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int) -> Path:
    """Saves checkpoint ``index`` durably, then removes all but the newest ``keep``.

    Checkpoints with a higher index are removed too: they belong to a history that a resumed run has left.
    Only the process that holds the run folder's lock may call this.

    Args:
        folder: the run's ``checkpoints`` directory; made if missing.
        index: 0 or above; an existing checkpoint of this index is replaced.
        arrays: dense tensors of any dtype the format knows, device and layout.
        meta: what JSON gives back unchanged: text keys, lists (no tuples), finite numbers.
        keep: how many stay, at least 1.

    Returns:
        The checkpoint's directory.

    Raises:
        RunFailed: it could not be written; the earlier checkpoints are intact.
        ValueError: ``index``, ``keep`` or ``meta`` is not as above.
    """
    if index < 0 or keep < 1:
        raise ValueError(f"index={index} must be 0 or above and keep={keep} at least 1")
    plain = json.loads(files.to_json(meta))
    if plain != meta:
        raise ValueError("meta changes on its way through JSON: use text keys and lists")
    final = folder / f"{index:06d}"
    tensors = pack_tensors(arrays)
    body = {"format": FORMAT, "tensors_sha256": hashlib.sha256(tensors).hexdigest(), "meta": plain}
    text = files.to_json({**body, "sha256": _sha256_of(body)}, indent=1)
    temporary = folder / f"{_UNFINISHED}{index:06d}"
    with files.writing(final):
        remove_unfinished(folder)
        try:
            temporary.mkdir(parents=True)
            for name, data in ((_TENSORS, tensors), (_META, text.encode())):
                files.write_bytes(temporary / name, data)
                files.sync(temporary / name)
            files.sync(temporary)
            if final.exists():
                aside = final.with_name(f"{final.name}.replaced")
                if aside.exists():
                    _remove(aside)
                files.replace(final, aside)
            files.replace(temporary, final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        files.sync(folder)
        kept = 0
        for number, replaced, path in _stored(folder):
            if number > index or replaced or kept == keep:
                _remove(path)
            else:
                kept += 1
    return final


def load_newest(folder: Path, on_skip: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Reads only, so a run in progress may be looked at.

    Args:
        folder: the run's ``checkpoints`` directory; may be missing.
        on_skip: is told, in one line each, which newer checkpoints could not be used and why.
    """
    for number, _, path in _stored(folder):
        try:
            return _load(number, path)
        except FileNotFoundError as error:
            if path.exists():
                on_skip(f"checkpoint {path} is skipped: {Path(error.filename).name} is missing")
        except (Damaged, OSError) as error:
            on_skip(f"checkpoint {path} is skipped: {error}")
    return None


def stored_metas(folder: Path) -> list[dict[str, Any]]:
    """The ``meta`` of every checkpoint that :func:`load_newest` might fall back to, newest first.

    What a checkpoint refers to elsewhere, such as client states, must stay as long as it is listed here.
    Tensor files are not read, and a ``meta`` that cannot be read is left out.
    """
    metas: list[dict[str, Any]] = []
    for _, _, path in _stored(folder):
        with contextlib.suppress(Damaged, OSError):
            metas.append(_load_body(path)["meta"])
    return metas


def remove_unfinished(folder: Path) -> int:
    """Removes what a crash left half written or half deleted; returns how many directories that were."""
    leftovers = list(folder.glob(f"{_UNFINISHED}*")) if folder.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path)
    return len(leftovers)


def _load_body(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads((path / _META).read_bytes())
        body = {name: stored[name] for name in ("format", "tensors_sha256", "meta")}
        expected = stored["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{_META} cannot be read ({error})") from error
    if body["format"] != FORMAT:
        raise Damaged(f"format {body['format']!r} is not {FORMAT}, the one this version of fedcl reads")
    if _sha256_of(body) != expected:
        raise Damaged(f"{_META}: its checksum does not match")
    return body


def _load(index: int, path: Path) -> Checkpoint:
    body = _load_body(path)
    data = (path / _TENSORS).read_bytes()
    if hashlib.sha256(data).hexdigest() != body["tensors_sha256"]:
        raise Damaged(f"{_TENSORS}: its checksum does not match")
    try:
        return Checkpoint(index, unpack_tensors(data), body["meta"])
    except Damaged as error:
        raise Damaged(f"{_TENSORS}: {error}") from error


def _sha256_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _stored(folder: Path) -> list[tuple[int, bool, Path]]:
    """(index, whether it was being replaced, directory), best first."""
    found: list[tuple[int, bool, Path]] = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[1]), match[2] is not None, path))
    return sorted(found, key=lambda entry: (-entry[0], entry[1]))


def _remove(path: Path) -> None:
    """Renames first, so that a half deleted directory is never taken for a damaged checkpoint."""
    doomed = path.with_name(f"{_UNFINISHED}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    files.replace(path, doomed)
    shutil.rmtree(doomed)
