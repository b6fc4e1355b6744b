"""The hashes that say whether two runs ended in the same bits.

One encoding serves both hashes. All counts are unsigned 64-bit little-endian integers, all texts UTF-8 with
their length in front, so no two different states share an encoding::

    arrays := count, then each array in the order of its name
    array  := name, dtype, number of dimensions, each dimension, number of bytes, the bytes

A client's state enters the hash of a run by its own SHA-256, so that it need not leave the node that keeps it.

``dtype`` is torch's name (``float32``, ``bfloat16``, ``bool``). The bytes are the elements in row-major
order, each little-endian. Device, strides and memory format leave no trace; the sign of a zero and a NaN's
payload do.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Chunk = bytes | memoryview


def raw(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The elements of a dense tensor of any shape and dtype as row-major little-endian bytes, (bytes,).

    >>> raw(torch.tensor([[1, 2]], dtype=torch.int16)).tolist()
    [1, 0, 2, 0]
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if plain.is_complex():
        plain = torch.view_as_real(plain).reshape(-1)
    width = plain.element_size()
    data: npt.NDArray[np.uint8] = plain.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        data = np.ascontiguousarray(data.reshape(-1, width)[:, ::-1]).reshape(-1)
    return data


def _count(value: int) -> bytes:
    return struct.pack("<Q", value)


def _text(value: str) -> bytes:
    data = value.encode()
    return _count(len(data)) + data


def encode(arrays: Mapping[str, Tensor]) -> Iterator[Chunk]:
    """The encoding of named arrays (see the module), in pieces that may be fed to any checksum."""
    yield _count(len(arrays))
    for name in sorted(arrays):
        tensor = arrays[name]
        data = raw(tensor)
        head = [_text(name), _text(str(tensor.dtype).removeprefix("torch.")), _count(tensor.dim())]
        yield b"".join([*head, *map(_count, tensor.shape), _count(data.nbytes)])
        yield data.data


def model_sha256(arrays: Mapping[str, Tensor]) -> str:
    """SHA-256 of named arrays: the final shared parameters and buffers.

    >>> a, b = torch.ones(2), torch.zeros(3)
    >>> model_sha256({"a": a, "b": b}) == model_sha256({"b": b, "a": a})
    True
    >>> model_sha256({"a": a}) == model_sha256({"a": a.double()})
    False
    """
    digest = hashlib.sha256()
    for chunk in encode(arrays):
        digest.update(chunk)
    return digest.hexdigest()


def arrays_digest(arrays: Mapping[str, Tensor]) -> bytes:
    """As :func:`model_sha256`, the 32 bytes themselves: what a node tells of a client's state."""
    return bytes.fromhex(model_sha256(arrays))


def state_sha256(server: Mapping[str, Tensor], clients: Iterable[tuple[int, bytes]]) -> str:
    """SHA-256 of the server's arrays, then of every existing client: its id as a count, then its state's digest.

    Args:
        server: the server's state.
        clients: (client id, :func:`arrays_digest` of its state) with ids ascending.

    Raises:
        ValueError: ids are not ascending, so the hash would depend on the order of visits.

    >>> state_sha256({}, []) == state_sha256({}, [(0, arrays_digest({}))])
    False
    """
    digest = hashlib.sha256()
    for chunk in encode(server):
        digest.update(chunk)
    before = -1
    for client, state in clients:
        if client <= before:
            raise ValueError(f"client {client} follows client {before}: ids must ascend from 0")
        before = client
        digest.update(_count(client) + state)
    return digest.hexdigest()
