"""Messages to nodes that vanish, are late, or answer out of order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl import app
from fedcl.build import Experiment, build
from fedcl.errors import Interrupted
from fedcl.federation.call import Reply
from fedcl.federation.flower_internals import LocalGrid, Message, number_message
from fedcl.federation.reduction import Reducer
from fedcl.runtimes.links import Links, NodeLost, in_client_order
from fedcl.runtimes.setup import Setup

if TYPE_CHECKING:
    from fedcl.config import Config


@pytest.fixture
def experiment(tiny_config: Callable[[Mapping[str, Any]], Config]) -> Experiment:
    return build(tiny_config({"engine.runtime": "deploy", "engine.nodes": 2, "engine.timeout": 600}))


def links(experiment: Experiment, place: Path) -> Links:
    return Links("token", experiment.node, Setup.of(experiment, place), lambda record: None)


def test_a_supernode_without_heartbeat_is_lost(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.proto.task_pb2 import Task
    from flwr.server.superlink.linkstate import LinkStateFactory, in_memory_linkstate
    from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.run import Run
    from flwr.superlink.federation import NoOpFederationManager
    from flwr.superlink.grid import InMemoryGrid

    clock = in_memory_linkstate.now
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state: Any = factory.state()
    run = Run.create_empty(1)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    state.run_ids[1], state.task_store[1] = RunRecord(run=run), Task(task_id=1, run_id=1)
    for key in (b"a" * 32, b"b" * 32):
        node = state.create_node("flower", "flower", key, heartbeat_interval=30)
        state.acknowledge_node_heartbeat(node_id=node, heartbeat_interval=30)

    class Later(InMemoryGrid):  # type: ignore[misc]  # flwr is not followed by the type checker
        pulls = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            Later.pulls += 1
            if Later.pulls == 2:
                monkeypatch.setattr(in_memory_linkstate, "now", lambda: clock() + timedelta(seconds=61))
            return super().pull_messages(message_ids)

    grid = Later(factory)
    grid.set_run(run)
    with pytest.raises(NodeLost, match=r"node \d is gone: it gave no sign of life"):
        links(experiment, tmp_path).open(grid, 0, print)
    assert Later.pulls == 2


class Silent(LocalGrid):
    """Takes messages and never answers."""

    pause = 0.0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [number_message(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return []


def test_a_silent_node_is_late(tiny_config: Callable[[Mapping[str, Any]], Config], tmp_path: Path) -> None:
    late = build(tiny_config({"engine.runtime": "deploy", "engine.nodes": 1, "engine.timeout": 0.2}))
    with pytest.raises(NodeLost, match=r"node 0 did not answer 'hello' within engine.timeout=0.2 s"):
        links(late, tmp_path).open(Silent(app.client, 1), 0, print)


def test_the_stop_flag_ends_an_exchange(experiment: Experiment, tmp_path: Path) -> None:
    asked = count()
    experiment.node.stop = lambda: next(asked) > 3
    with pytest.raises(Interrupted):
        links(experiment, tmp_path).open(Silent(app.client, 2), 0, print)


def test_missing_nodes_are_awaited_and_said(tiny_config: Callable[[Mapping[str, Any]], Config], tmp_path: Path) -> None:
    from fedcl.errors import RunFailed

    few = build(tiny_config({"engine.runtime": "deploy", "engine.nodes": 3, "engine.timeout": 0.3}))
    said: list[str] = []
    with pytest.raises(RunFailed, match="2 of 3 nodes were there"):
        links(few, tmp_path).open(Silent(app.client, 2), 0, said.append)
    assert said == ["waiting for 3 nodes; 2 are there"]


def test_single_arrays_come_in_the_order_of_clients() -> None:
    rules: dict[str, Any] = {"model/": "stack", "s/n": "sum"}
    nodes = {0: [0, 2, 4], 1: [1, 5]}
    replies = []
    for clients in nodes.values():
        part = Reducer(rules)
        for client in clients:
            part.add({"model/w": torch.tensor([float(client)]), "s/n": torch.tensor(client)}, 10.0 + client)
        arrays, facts = part.partial()
        replies.append(Reply(arrays, {**facts, "clients": clients}, {}))
    whole = Reducer(rules)
    for reply in in_client_order(replies):
        whole.merge(reply.arrays, reply.facts)
    assert whole.weights == [10.0, 11.0, 12.0, 14.0, 15.0]
    assert [float(w) for w in whole.stacked("model/w")] == [0, 1, 2, 4, 5]
    assert int(whole.result(["s/n"])["s/n"]) == 12
