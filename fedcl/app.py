"""The Flower app: one ServerApp and one ClientApp, whatever the runtime.

A node hosts clients. One message carries a call (:mod:`fedcl.federation.call`) for all clients of a node, the reply
their partial sums. In this process the apps find what they need under a run's token; nothing else is kept between
calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from .errors import RunFailed
from .federation.call import Call, Header, Reply
from .federation.flower_internals import make_message, pack, reply, unpack
from .federation.node import Node

TOKEN = "fedcl-run"
NODES: dict[str, Node] = {}
"""Nodes of this process by run token."""

MAINS: dict[str, Callable[[Grid], None]] = {}
"""Server loops of this process by run token."""

client = ClientApp()
server = ServerApp()


@server.main()  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def main(grid: Grid, context: Context) -> None:
    """Runs the server loop of the run that the context names."""
    token = str(context.run_config.get(TOKEN, ""))
    if token not in MAINS:
        raise RunFailed("this ServerApp was not started by fedcl: use `fedcl run`")
    MAINS[token](grid)


@client.train()  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def train(message: Message, context: Context) -> Message:
    """A round of local training."""
    return answer(message)


@client.query("ask")  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def ask(message: Message, context: Context) -> Message:
    """A call of a strategy's own function."""
    return answer(message)


def answer(message: Message) -> Message:
    """Decodes a call, lets this node answer it, and encodes the reply."""
    facts = message.content["call"]
    node = NODES[str(facts["run"])]
    call = Call.of(Header.from_json(str(facts["header"])), unpack(message.content["arrays"], node.store.device))
    result = node.handle(call)
    record = ConfigRecord({"facts": json.dumps(result.facts), "measured": json.dumps(result.measured)})
    return reply(RecordDict({"arrays": pack(result.arrays), "reply": record}), message)


def sender(grid: Grid, token: str, device: Any, timeout: float) -> Callable[[Call], Iterable[Reply]]:
    """A function that sends a call to the nodes that host its clients and yields their replies in node order.

    Client k lives on node k mod nodes.

    Raises:
        RunFailed: a node answered with an error or not within ``timeout`` seconds.
    """
    nodes = sorted(grid.get_node_ids())

    def send(call: Call) -> Iterator[Reply]:
        messages = []
        for index, node in enumerate(nodes):
            mine = [c for c in call.header.clients if c % len(nodes) == index]
            if not mine:
                continue
            part = call if len(nodes) == 1 else call.restricted(mine)
            record = ConfigRecord({"run": token, "header": part.header.to_json()})
            action = "train" if call.header.function == "train" else "query.ask"
            content = RecordDict({"arrays": pack(part.arrays()), "call": record})
            messages.append(make_message(content, node, action))
        replies = {m.metadata.src_node_id: m for m in grid.send_and_receive(messages, timeout=timeout)}
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in replies:
                raise RunFailed(f"node {node} did not answer {call.header.function!r} within {timeout:g} s")
            got = replies[node]
            if got.has_error():
                raise RunFailed(f"node {node} failed in {call.header.function!r}: {got.error.reason}")
            facts = got.content["reply"]
            yield Reply(
                unpack(got.content["arrays"], device),
                json.loads(str(facts["facts"])),
                json.loads(str(facts["measured"])),
            )

    return send
