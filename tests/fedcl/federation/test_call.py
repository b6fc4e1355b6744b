"""The message form of a call: what goes in comes out, also through Flower's wire format."""

from __future__ import annotations

import torch

from fedcl.federation.call import Call, Header, below, prefixed
from fedcl.federation.flower_internals import ArrayRecord, pack, unpack


def header(clients: list[int]) -> Header:
    return Header("train", clients, 1, 2, 3, 4, 17, 6, [0, 1, 2, 3], [2, 3])


def call() -> Call:
    return Call(
        header([2, 5, 9]),
        {"encoder.w": torch.ones(2, 2), "encoder.n": torch.tensor(3)},
        {"encoder.w": torch.zeros(2, 2)},
        {
            "fedewc": {"fisher/encoder.w": torch.arange(4.0).reshape(2, 2)},
            "x": {"a/b/c": torch.tensor([1], dtype=torch.uint8)},
        },
        {2: torch.tensor([7, 8]), 5: torch.zeros(0, dtype=torch.int64), 9: torch.tensor([1])},
    )


def same(one: Call, other: Call) -> bool:
    left, right = one.arrays(), other.arrays()
    return (
        one.header == other.header and list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)
    )


def test_header_survives_json() -> None:
    assert Header.from_json(header([0, 3]).to_json()) == header([0, 3])


def test_call_survives_flattening() -> None:
    back = Call.of(header([2, 5, 9]), call().arrays())
    assert same(back, call())
    assert back.down["x"].keys() == {"a/b/c"}
    assert [len(back.ids[c]) for c in (2, 5, 9)] == [2, 0, 1]


def test_call_survives_the_wire() -> None:
    record = pack(call().arrays())
    wire = ArrayRecord.inflate(record.deflate(), record.children)
    assert same(Call.of(header([2, 5, 9]), unpack(wire, "cpu")), call())


def test_call_without_clients() -> None:
    empty = Call(header([]), {}, {}, {}, {})
    assert Call.of(header([]), empty.arrays()).ids == {}


def test_restricted_call_carries_only_its_clients() -> None:
    flat = call().restricted([9]).arrays()
    assert flat["_ids"].tolist() == [1]
    assert flat["_ids_sizes"].tolist() == [1]
    assert Call.of(header([9]), flat).ids.keys() == {9}


def test_prefixes_are_inverse() -> None:
    arrays = {"a": torch.ones(1), "a/b": torch.zeros(1)}
    assert below({**prefixed(arrays, "s/"), "sa": torch.ones(2)}, "s/").keys() == arrays.keys()
