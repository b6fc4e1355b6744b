"""Arrays by reference, messages and the in-process grid."""

from __future__ import annotations

import copy
import logging
import pickle
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl.errors import RunFailed
from fedcl.federation import flower_internals as flower

ODD = {
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "count": torch.tensor([2**62 + 1, -1], dtype=torch.int64),
    "flag": torch.tensor([True, False]),
    "double": torch.tensor([[1 / 3]], dtype=torch.float64),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
    "brain": torch.tensor([1.0, float("nan"), float("inf"), -0.0, 3.1415, 1e-40]).bfloat16(),
    "brain_scalar": torch.tensor(-2.5).bfloat16(),
    "brain_empty": torch.empty(0).bfloat16(),
}


def bits(tensor: Tensor) -> bytes:
    raw = tensor.contiguous().reshape(-1)
    return b"" if raw.numel() == 0 else raw.view(torch.uint8).numpy().tobytes()


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape and bits(left[k]) == bits(right[k])
        for k in left
    )


def message_with(arrays: dict[str, Tensor]) -> flower.Message:
    return flower.make_message(flower.RecordDict({"arrays": flower.pack(arrays)}), 7, "train")


def over_proto(message: flower.Message) -> flower.Message:
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.message_pb2 import Message as ProtoMessage

    wire = message_to_proto(message).SerializeToString()
    return message_from_proto(ProtoMessage.FromString(wire))


def over_objects(message: flower.Message) -> flower.Message:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    contents = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


WIRES = {"proto": over_proto, "objects": over_objects, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


def test_pack_and_unpack_pass_by_reference_without_serialising() -> None:
    before = flower.TensorArray.serialisations
    back = flower.unpack(flower.pack(ODD), "cpu")
    assert all(back[name].data_ptr() == ODD[name].data_ptr() for name in ODD)
    assert same_bits(back, ODD)
    assert flower.TensorArray.serialisations == before


def test_pack_detaches() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not flower.unpack(flower.pack({"w": weight}), "cpu")["w"].requires_grad


@pytest.mark.parametrize("wire", WIRES)
def test_a_wire_keeps_every_bit_and_serialises_once(wire: str) -> None:
    message = message_with(ODD)
    before = flower.TensorArray.serialisations
    arrived = WIRES[wire](message)
    assert flower.TensorArray.serialisations - before == len(ODD)
    record = arrived.content["arrays"]
    assert {type(array) for array in record.values()} == {flower.Array}
    assert same_bits(flower.unpack(record, "cpu"), ODD)
    assert flower.TensorArray.serialisations - before == len(ODD)


def test_bytes_are_those_of_a_plain_flower_array() -> None:
    for name, tensor in ODD.items():
        if tensor.dtype != torch.bfloat16:
            plain, ours = flower.Array(np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape)), tensor
            array = flower.TensorArray(ours.contiguous())
            assert (array.dtype, array.shape, array.stype, array.data) == (
                plain.dtype,
                plain.shape,
                plain.stype,
                plain.data,
            ), name
            assert array.object_id == plain.object_id


def test_flower_refuses_to_read_bfloat16_bits_as_numbers() -> None:
    arrived = over_proto(message_with({"w": torch.ones(2).bfloat16()})).content["arrays"]["w"]
    assert arrived.dtype == "bfloat16"
    with pytest.raises(TypeError, match="bfloat16"):
        arrived.numpy()
    with pytest.raises(TypeError, match="bfloat16"):
        flower.TensorArray(torch.ones(2).bfloat16()).numpy()


def test_unpack_names_a_strange_serialisation() -> None:
    record = flower.ArrayRecord()
    record["w"] = flower.Array("float32", (1,), "pickle", b"x")
    with pytest.raises(RunFailed, match="'w' came serialised as 'pickle'"):
        flower.unpack(record, "cpu")


def test_numpy_is_a_copy_and_repr_does_not_serialise() -> None:
    weight = torch.ones(2)
    array = flower.TensorArray(weight)
    before = flower.TensorArray.serialisations
    array.numpy()[:] = 9
    assert weight.tolist() == [1, 1]
    assert "float32" in repr(array)
    assert flower.TensorArray.serialisations == before
    assert copy.deepcopy(array).numpy().tolist() == [1, 1]


def test_wide_arrays_read_as_float64() -> None:
    array = flower.WideTensorArray(torch.tensor([0.5, 3.0]).bfloat16())
    assert array.numpy().dtype == np.float64
    assert array.numpy().tolist() == [0.5, 3.0]
    plain = flower.Array(np.array([0.5, 3.0]))
    assert (array.dtype, array.stype, array.data) == (plain.dtype, plain.stype, plain.data)


# A least-squares client: full-batch gradient descent on its own rows.
DATA = [
    (torch.arange(6.0, dtype=torch.float64).reshape(3, 2) / 5 + shift, torch.tensor([1.0, 0.0, 2.0]).double())
    for shift in (0.0, 0.7, -0.4)
]
SIZES = [3.0, 1.0, 6.0]


def trained(weight: Tensor, client: int) -> Tensor:
    x, y = DATA[client]
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    model.weight.data = weight.clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(model(x).squeeze(1), y).backward()
        optimiser.step()
    return model.weight.detach()


def torch_app() -> flower.ClientApp:
    app = flower.ClientApp()

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        client = context.node_config["partition-id"]
        rounds = context.state.setdefault("rounds", flower.MetricRecord({"count": 0}))
        rounds["count"] += 1
        weight = flower.unpack(message.content["arrays"], "cpu")["weight"]
        content = flower.RecordDict(
            {
                "arrays": flower.pack({"weight": trained(weight, client)}),
                "metrics": flower.MetricRecord({"num-examples": SIZES[client]}),
            }
        )
        return flower.reply(content, message)

    return app


def hand_fedavg(weight: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        locals_ = [trained(weight, client) * size for client, size in enumerate(SIZES)]
        weight = torch.stack(locals_).sum(0) / sum(SIZES)
    return weight


def test_unmodified_fedavg_on_the_grid_equals_fedavg_by_hand(capfd: pytest.CaptureFixture[str]) -> None:
    from flwr.serverapp.strategy import FedAvg

    grid = flower.LocalGrid(torch_app(), nodes=3)
    start = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    app = flower.ServerApp()
    results = {}

    @app.main()
    def main(grid: flower.Grid, context: flower.Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0)
        results["final"] = strategy.start(grid, flower.pack({"weight": start}), num_rounds=4).arrays

    flower.run_server_app(app, grid, flower.make_context(1))
    final = flower.unpack(results["final"], "cpu")["weight"]
    torch.testing.assert_close(final, hand_fedavg(start, 4), rtol=0, atol=1e-14)
    assert not torch.equal(final, hand_fedavg(start, 3))
    assert [context.state["rounds"]["count"] for context in grid.contexts.values()] == [4, 4, 4]
    assert capfd.readouterr() == ("", "")


def test_a_local_round_serialises_nothing_and_leaves_the_global_rng() -> None:
    grid = flower.LocalGrid(torch_app(), nodes=3)
    weight = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    before = flower.TensorArray.serialisations
    content = flower.RecordDict({"arrays": flower.pack({"weight": weight})})
    replies = grid.send_and_receive(flower.make_message(content, node, "train") for node in grid.get_node_ids())
    got = [flower.unpack(message.content["arrays"], "cpu")["weight"] for message in replies]
    assert flower.TensorArray.serialisations == before
    for client, array in enumerate(got):
        assert torch.equal(array, trained(weight, client))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def echo_app() -> flower.ClientApp:
    app = flower.ClientApp()

    @app.query("hello")
    def hello(message: flower.Message, context: flower.Context) -> flower.Message:
        message.content["more"] = flower.MetricRecord({"node": context.node_config["partition-id"]})
        message.content["config"]["seen"] = context.node_id
        return flower.reply(message.content, message)

    return app


def test_messages_and_replies_have_the_metadata_of_a_superlink() -> None:
    grid = flower.LocalGrid(echo_app(), nodes=2)
    content = flower.RecordDict({"config": flower.ConfigRecord({"a": 1})})
    sent = [flower.make_message(content, node, "query.hello") for node in grid.get_node_ids()]
    ids = grid.push_messages(sent)
    replies = grid.pull_messages([*ids, "unknown"])
    assert grid.pull_messages(ids) == []
    every = [m.metadata.message_id for m in (*sent, *replies)]
    assert len(set(every)) == 4
    assert [m.metadata.reply_to_message_id for m in replies] == ids
    assert [m.metadata.src_node_id for m in replies] == grid.get_node_ids()
    assert [m.metadata.dst_node_id for m in replies] == [m.metadata.src_node_id for m in sent]
    assert [m.content["more"]["node"] for m in replies] == [0, 1]
    assert {m.metadata.message_type for m in replies} == {"query.hello"}
    # Nodes got records of their own: neither saw what the other wrote, nor did the sender.
    assert [m.content["config"]["seen"] for m in replies] == grid.get_node_ids()
    assert dict(content["config"]) == {"a": 1}
    assert list(content) == ["config"]


def test_exceptions_of_the_client_app_arrive_as_they_are() -> None:
    app = flower.ClientApp()

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        raise KeyError("lost")

    @app.train("stop")
    def stop(message: flower.Message, context: flower.Context) -> flower.Message:
        raise KeyboardInterrupt

    grid = flower.LocalGrid(app)
    [node] = grid.get_node_ids()
    with pytest.raises(KeyError, match="lost"):
        grid.send_and_receive([flower.make_message(flower.RecordDict(), node, "train")])
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive([flower.make_message(flower.RecordDict(), node, "train.stop")])


def test_wrong_answers_and_nodes_are_named() -> None:
    app = flower.ClientApp()
    kept: list[flower.Message] = []

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        kept.append(message)
        return flower.reply(flower.RecordDict(), kept[0])

    @app.query()
    def query(message: flower.Message, context: flower.Context) -> None:
        return None

    grid = flower.LocalGrid(app)
    [node] = grid.get_node_ids()

    def send(action: str, node: int = node) -> list[flower.Message]:
        return grid.send_and_receive([flower.make_message(flower.RecordDict(), node, action)])

    send("train")
    with pytest.raises(RunFailed, match="reply to another message"):
        send("train")
    with pytest.raises(RunFailed, match="not a Message"):
        send("query")
    with pytest.raises(RunFailed, match="no node 99"):
        send("train", 99)
    with pytest.raises(ValueError, match="at least one node"):
        flower.LocalGrid(app, nodes=0)


def test_messages_after_the_timeout_are_not_delivered(caplog: pytest.LogCaptureFixture) -> None:
    grid = flower.LocalGrid(echo_app(), nodes=2)
    content = flower.RecordDict({"config": flower.ConfigRecord()})
    messages = [flower.make_message(content, node, "query.hello") for node in grid.get_node_ids()]
    with caplog.at_level(logging.WARNING, "flwr"):
        assert grid.send_and_receive(messages, timeout=0.0) == []
    assert "no reply from node" in caplog.text
    assert len(grid.send_and_receive(messages, timeout=60.0)) == 2
