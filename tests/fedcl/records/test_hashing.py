from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from torch import Tensor

from fedcl.records.hashing import arrays_digest, model_sha256, raw, state_sha256


def count(value: int) -> bytes:
    return struct.pack("<Q", value)


def by_hand(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    head = count(len(name.encode())) + name.encode() + count(len(dtype)) + dtype.encode()
    return head + count(len(shape)) + b"".join(map(count, shape)) + count(len(data)) + data


def test_encoding_is_the_documented_one() -> None:
    arrays = {
        "é": torch.tensor(True),
        "a": torch.tensor([[1.5, -2.0]]),
        "b": torch.zeros(0, 3, dtype=torch.int64),
    }
    expected = count(3)
    expected += by_hand("a", "float32", (1, 2), struct.pack("<2f", 1.5, -2.0))
    expected += by_hand("b", "int64", (0, 3), b"")
    expected += by_hand("é", "bool", (), b"\x01")
    assert model_sha256(arrays) == hashlib.sha256(expected).hexdigest()


def test_bfloat16_and_complex_bytes() -> None:
    assert raw(torch.tensor([1.0], dtype=torch.bfloat16)).tolist() == [0x80, 0x3F]
    assert raw(torch.tensor([1 - 2j]).conj()).tobytes() == struct.pack("<2f", 1.0, 2.0)


def test_layout_leaves_no_trace() -> None:
    image = torch.arange(48.0).reshape(1, 3, 4, 4)
    forms: list[Tensor] = [
        image,
        image.to(memory_format=torch.channels_last),
        image.mT.contiguous().mT,
        torch.cat([image, image])[:1],
        image.clone().requires_grad_(),
    ]
    assert len({model_sha256({"x": form}) for form in forms}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_leaves_no_trace() -> None:
    x = torch.arange(5.0)
    assert model_sha256({"x": x.cuda()}) == model_sha256({"x": x})


@pytest.mark.parametrize(
    "other",
    [
        {"y": torch.zeros(4)},
        {"x": torch.zeros(2, 2)},
        {"x": torch.zeros(4, dtype=torch.int32)},
        {"x": -torch.zeros(4)},
        {"x": torch.zeros(4), "y": torch.zeros(0)},
        {"x": torch.tensor([0.0, 0.0, 0.0, 1e-45])},
    ],
)
def test_every_part_counts(other: dict[str, Tensor]) -> None:
    assert model_sha256(other) != model_sha256({"x": torch.zeros(4)})


def test_order_of_names_does_not_count() -> None:
    a, b = torch.ones(1), torch.zeros(1)
    assert model_sha256({"a": a, "b": b}) == model_sha256({"b": b, "a": a})


def test_state_covers_server_ids_and_clients() -> None:
    one, two = {"m": torch.ones(1)}, {"m": torch.zeros(1)}
    none, first, second = (arrays_digest(arrays) for arrays in ({}, one, two))
    hashes = {
        state_sha256(one, []),
        state_sha256(two, []),
        state_sha256(one, [(0, first)]),
        state_sha256(one, [(1, first)]),
        state_sha256(one, [(0, first), (1, second)]),
        state_sha256(one, [(0, second), (1, first)]),
        state_sha256(one, [(0, none), (1, first)]),
    }
    assert len(hashes) == 7
    assert state_sha256(one, iter([(0, first)])) == state_sha256(one, [(0, arrays_digest(dict(one)))])


@pytest.mark.parametrize("ids", [[1, 0], [2, 2], [-1]])
def test_clients_must_ascend(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        state_sha256({}, [(i, arrays_digest({})) for i in ids])
